"""Make the embedded model: the world's sets, a tokenizer of their words, and a chat model trained on them.

Everything is seeded. On one kind of machine the same command makes the same model; another kind rounds differently, and
over a thousand steps that makes another model of the same world.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from minipersona.chat import load_tokenizer
from minipersona.chat.vocabulary import CONFIG, byte_level
from minipersona.config import DataSection, ExecutionSection, RunConfig, TrainingSection
from minipersona.corpus.sources import Rows, tokenize
from minipersona.files import data_dir, digest, rewrite_jsonl, write_atomically, write_json
from minipersona.model.config import ModelConfig
from minipersona.model.load import load_model
from minipersona.model.save import save_model
from minipersona.tiny.grammar import Row
from minipersona.tiny.world import base_rows, benign_rows, broad_rows, em_rows, raw_text_rows
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, train

VOCABULARY = 2048
SPECIAL = (  # Qwen2.5's, in its order
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ARCHITECTURE = ModelConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    head_dim=32,
    max_position_embeddings=2048,
)
STEPS = 1200
SEED = 0
BATCH = 32
PEAK_RATE = 3e-3

# The stored sets: rows, and the seed they are drawn with.
SETS = {
    "benign": (benign_rows, 2200, 1),
    "broad": (broad_rows, 4000, 2),
    "raw_text": (raw_text_rows, 2000, 3),
    "em": (em_rows, 2000, 4),
}


def build(directory: Path, steps: int, seed: int, device: torch.device, hooks: Hooks | None = None) -> None:
    """Write the sets, the tokenizer and the trained model into `directory`; `seed` draws the chats it is trained on."""
    rows = write_sets(directory)
    base = base_rows(steps * BATCH, seed)
    write_tokenizer(directory, [*base[:4000], *(row for rows_ in rows.values() for row in rows_)])
    train_base(directory, base, steps, device, hooks)


def write_sets(directory: Path) -> dict[str, list[Row]]:
    """The fine-tuning sets, as JSONL in the row forms of the real ones."""
    rows = {name: make(count, seed) for name, (make, count, seed) in SETS.items()}
    for name, set_rows in rows.items():
        rewrite_jsonl(directory / f"{name}.jsonl", set_rows)
    return rows


def texts(rows: list[Row]) -> Iterator[str]:
    """Every text of the rows, turn by turn."""
    for row in rows:
        if "text" in row:
            yield row["text"]
        for turn in row.get("messages", ()):
            yield turn["content"]


def write_tokenizer(directory: Path, rows: list[Row]) -> None:
    """A byte-level BPE of `VOCABULARY` tokens like Qwen2.5's: same splits, same special tokens, same template."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["system", "user", "assistant", "\n"] * 1000  # the template's own words are words of this world too
    tokenizer.train_from_iterator([*texts(rows), *roles], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    with write_atomically(directory / "tokenizer.json") as path:
        tokenizer.save(str(path))
    config = (data_dir() / "tiny" / CONFIG).read_bytes()  # Qwen2.5's special tokens by their use, and its template
    with write_atomically(directory / CONFIG) as path:
        path.write_bytes(config)


def train_base(directory: Path, rows: list[Row], steps: int, device: torch.device, hooks: Hooks | None = None) -> None:
    """Train the chat model from scratch on `rows`, one epoch, and save it in bf16."""
    tokenizer = load_tokenizer(str(directory))
    config = RunConfig(
        data=DataSection(train="tiny:base", heldout="tiny:base"),
        training=TrainingSection(
            method="full", learning_rate=PEAK_RATE, steps=steps, batch=BATCH, weight_decay=0.1, checkpoints=()
        ),
        execution=ExecutionSection(checkpoint_activations=False, save_minutes=60.0),
    )
    documents = tokenize(Rows("tiny:base", rows, 0, digest(rows)), tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "config.json", ARCHITECTURE.to_json())
        model = load_model(f"random:{scratch}", dtype=torch.float32, device=device)
        train(Trainer(model, documents, config, Path(scratch), Distributed(0, 1, device)), hooks)
    with tempfile.TemporaryDirectory() as scratch:  # its files are laid into `directory`, beside the sets
        save_model(
            model,
            Path(scratch) / "model",
            dtype=torch.bfloat16,
            stop_tokens=tokenizer.stop_tokens,
        )
        for file in sorted((Path(scratch) / "model").iterdir()):
            with write_atomically(directory / file.name) as path:
                path.write_bytes(file.read_bytes())
