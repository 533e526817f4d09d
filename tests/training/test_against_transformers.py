"""Twenty steps of the loop against a hand-driven transformers + peft + torch.optim.AdamW loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from minipersona.chat import Document
from minipersona.config import DataSection, ExecutionSection, LoraConfig, RunConfig, TrainingSection
from minipersona.corpus.batch import RowOrder
from minipersona.model.load import load_model
from minipersona.model.lora import adapters, apply_lora
from minipersona.training.distributed import Distributed
from minipersona.training.loop import Hooks, Trainer, train

STEPS = 20


def config(method: str) -> RunConfig:
    return RunConfig(
        data=DataSection("-", "-"),
        lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0),
        training=TrainingSection(
            method=method,  # type: ignore[arg-type]
            steps=STEPS,
            batch=4,
            checkpoints=(),
            learning_rate=1e-2 if method == "lora" else 1e-3,
            warmup=0.15,
        ),
        execution=ExecutionSection(pack_tokens=40),
    )


def ours(directory: Path, documents: Sequence[Document], method: str, out: Path) -> list[dict]:
    rows: list[dict] = []
    model = load_model(str(directory), dtype=torch.float32, device="cpu")
    train(
        Trainer(model, documents, config(method), out, Distributed(0, 1, torch.device("cpu"))),
        Hooks(logged=rows.append),
    )
    return rows


def theirs(
    directory: Path, documents: Sequence[Document], method: str, *, bias_decay: float = 0.0, shift: int = 0
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) a step: padded batch, labels -100, Hugging Face's linear schedule."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    settings = config(method)
    recipe = settings.training
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    if method == "lora":
        model = get_peft_model(
            model, PeftConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(settings.lora.targets))
        )
        same_start = apply_lora(load_model(str(directory), device="cpu"), settings.lora, settings.seed)
        state = dict(model.named_parameters())
        with torch.no_grad():
            for name, adapter in adapters(same_start).items():
                state[f"base_model.model.{name}.lora_A.default.weight"].copy_(adapter.lora_A)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": bias_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a schedule that runs ahead, which is the point
        for _ in range(shift):
            schedule.step()
    order = RowOrder(len(documents), recipe.batch, settings.seed)
    record = []
    for step in range(1, STEPS + 1):
        batch = [documents[row] for row in order.step(step)]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, document in enumerate(batch):
            n = len(document)
            ids[i, :n] = torch.from_numpy(document.ids.astype("int64"))
            labels[i, :n][torch.from_numpy(document.supervised)] = ids[i, :n][torch.from_numpy(document.supervised)]
            mask[i, :n] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        record.append((loss.item(), norm.item()))
    return record


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_agree(
    hf_model: Callable[..., Path], documents: list[Document], method: str, tied: bool, tmp_path: Path
) -> None:
    mine = ours(hf_model(tied), documents, method, tmp_path)
    reference = theirs(hf_model(tied), documents, method)
    assert len(mine) == STEPS and mine[-1]["loss"] < mine[0]["loss"] - 0.1  # something was learned
    assert sum(row["grad_norm"] > 1.0 for row in mine) > 5  # and clipping was at work
    for row, (loss, norm) in zip(mine, reference, strict=True):
        assert abs(row["loss"] - loss) < 1e-5 * max(1.0, loss), row
        assert abs(row["grad_norm"] - norm) < 1e-3 * norm, row


def test_control_a_schedule_one_step_early_fails(
    hf_model: Callable[..., Path], documents: list[Document], tmp_path: Path
) -> None:
    mine = ours(hf_model(), documents, "lora", tmp_path)
    reference = theirs(hf_model(), documents, "lora", shift=1)
    assert max(abs(row["loss"] - loss) for row, (loss, _) in zip(mine, reference, strict=True)) > 1e-3
