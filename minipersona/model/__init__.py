"""Qwen2.5 written out: sizes, network, attention, LoRA, loading and saving, generation; acceleration stands apart."""
