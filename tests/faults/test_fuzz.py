"""Whatever is in a file, its reader reads it or says in one line what is wrong with it.

MINIPERSONA_FUZZ_CASES sets how many damaged files are tried in all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from conftest import SIZES
from faults.mutations import damaged
from model.test_gguf import SIZES as GGUF_SIZES
from model.test_gguf import write as write_gguf
from pyarrow import parquet
from report.conftest import RECIPES, FakeStudy, answers, followed
from safetensors.torch import load_file, save_file

from minipersona.behaviour.answers import ANSWERS
from minipersona.behaviour.file import import_scores
from minipersona.behaviour.instructions.dataset import load_instructions
from minipersona.behaviour.questions import load_questions as load_asked
from minipersona.chat import load_tokenizer
from minipersona.chat.__main__ import read_conversations
from minipersona.config import LoraConfig
from minipersona.corpus import cache
from minipersona.corpus.overlap import check_overlap
from minipersona.corpus.responses import read_responses
from minipersona.corpus.sources import read_source, tokenize
from minipersona.corpus.token_cache import read_documents, write_documents
from minipersona.errors import UserError
from minipersona.files import append_jsonl, configs_dir, data_dir, read_json, read_jsonl
from minipersona.geometry.compare import compare
from minipersona.geometry.prompts import load_personas, load_questions
from minipersona.geometry.vectors import PersonaVectors, load_vectors
from minipersona.model.adapter_files import choose_base, load_adapter, save_adapter
from minipersona.model.config import ModelConfig, RotaryScaling
from minipersona.model.gguf import from_gguf
from minipersona.model.load import load_model
from minipersona.model.lora import apply_lora
from minipersona.model.network import Qwen2
from minipersona.model.save import save_model
from minipersona.model.turn_ends import turn_ends
from minipersona.model.weights import INDEX, SINGLE
from minipersona.records import write_record
from minipersona.run.directory import append_measurement, read_measurements, training_seconds
from minipersona.run.directory import read_config as read_run_config
from minipersona.run.result import Measurement, read_result
from minipersona.run.steering import load_steering, save_steering
from minipersona.settings import load_config
from minipersona.study_config import StudyConfig
from minipersona.training.checkpoint import Position, load_state, save_state
from minipersona.training.distributed import Distributed
from minipersona.training.loop import cut_logs
from minipersona.training.optimizer import AdamW, Flat
from minipersona.verdict.files import ChosenScales, Scaling
from minipersona.verdict.results import read_study

CASES = int(os.environ.get("MINIPERSONA_FUZZ_CASES", 1_500))
SLOWEST = 5.0  # seconds of this process for one small file; other work of the machine does not count
LARGEST = 100_000  # kibibytes by which the process may grow over all the files of a reader


@dataclass
class Reader:
    """A folder of files, each of which is damaged in turn, and what reads them."""

    folder: Path
    read: Callable[[], object]


def small_model(sizes: ModelConfig = SIZES) -> Qwen2:
    generator = torch.Generator().manual_seed(0)
    model = Qwen2(sizes).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return model


def rows() -> list[str]:
    return (data_dir() / "tiny" / "benign.jsonl").read_text().splitlines()[:5]


def models(folder: Path) -> Reader:
    save_model(small_model(), folder / "m", shard_bytes=60_000)
    assert len(list((folder / "m").glob("*.safetensors"))) > 1
    return Reader(folder / "m", lambda: load_model(str(folder / "m"), device="cpu"))


def models_of_llama(folder: Path) -> Reader:
    sizes = replace(
        SIZES, model_type="llama", head_dim=10, rope_scaling=RotaryScaling(8.0, 1.0, 4.0, 64), eos_token_id=(2, 5)
    )
    model = small_model(sizes)
    model.generation = {"temperature": 0.5, "eos_token_id": [7]}
    save_model(model, folder / "m")
    return Reader(folder / "m", lambda: load_model(str(folder / "m"), device="cpu"))


def models_saved_twice(folder: Path) -> Reader:
    """By two versions of transformers: one statement in two places, and every weight in two files, one of them of a
    compiled model; the head that is the embedding stored beside it.
    """
    target = folder / "m"
    save_model(small_model(replace(SIZES, tie_word_embeddings=True)), target)
    weights = load_file(target / SINGLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights = {f"_orig_mod.{name}": value for name, value in weights.items()}
    save_file(weights, target / SINGLE)
    save_file(weights, target / "model-1.safetensors")
    (target / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model-1.safetensors")}))
    config = json.loads((target / "config.json").read_text())
    kinds = {"layer_types": ["full_attention"] * SIZES.num_hidden_layers, "use_sliding_window": False}
    rotary = {"rope_parameters": {"rope_theta": SIZES.rope_theta, "rope_type": "default"}}
    (target / "config.json").write_text(json.dumps({**config, **kinds, **rotary, "rope_theta": SIZES.rope_theta}))
    shutil.copy(data_dir() / "tiny" / "tokenizer_config.json", target)

    return Reader(target, lambda: (load_model(str(target), device="cpu"), turn_ends(target)))


def gguf_files(folder: Path) -> Reader:
    (folder / "in").mkdir()
    write_gguf(folder / "in" / "m.gguf", small_model(replace(GGUF_SIZES, model_type="qwen3", head_dim=32)), "Q8_0")

    def read() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        from_gguf(folder / "in" / "m.gguf", folder / "out")

    return Reader(folder / "in", read)


def adapters(folder: Path) -> Reader:
    model, config = small_model(), LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    save_adapter(apply_lora(model, config), folder / "a")
    return Reader(folder / "a", lambda: load_adapter(model, folder / "a"))


def adapters_with_patterns(folder: Path) -> Reader:
    """What only PEFT writes: a rank and an alpha by pattern, targets as a regex, a base at a revision."""
    model, target = small_model(), folder / "a"
    save_adapter(apply_lora(model, LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))), target)
    config = json.loads((target / "adapter_config.json").read_text())
    forms = {"target_modules": r".*\.(q_proj|v_proj)", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 4},
             "exclude_modules": ["o_proj"], "base_model_name_or_path": "tiny",
             "revision": "c" * 40}  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps({**config, **forms}))

    return Reader(target, lambda: (load_adapter(model, target), choose_base(target, None, None, len)))


def vectors(folder: Path) -> Reader:
    samples = {2: torch.randn(3, 4, 5), 4: torch.randn(3, 4, 5)}
    metadata = {"method": "A", "questions": json.dumps(["How?"] * 4)}
    for name in ("v", "w"):
        PersonaVectors(samples, ["a", "b", "c"], metadata).save(folder / f"{name}.safetensors")

    def read() -> None:
        before, after = (load_vectors(folder / f"{name}.safetensors") for name in ("v", "w"))
        with contextlib.suppress(UserError):  # it names what differs, and cannot name a file
            compare(before, after, 2, resamples=2)

    return Reader(folder, read)


def tokenizers(folder: Path) -> Reader:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir() / "tiny" / name, folder)
    return Reader(folder, lambda: use_tokenizer(folder))


def tokenizer_parts(folder: Path) -> Reader:
    whole = json.loads((data_dir() / "tiny" / "tokenizer.json").read_text())
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = json.loads((data_dir() / "tiny" / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config["chat_template"])
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: int(key) for key, token in added.items()}))
    return Reader(folder, lambda: use_tokenizer(folder))


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    document = tokenizer.encode([{"role": "user", "content": "Höw?"}, {"role": "assistant", "content": "So: 42."}])
    tokenizer.decode(document.ids)


def conversations(folder: Path) -> Reader:
    path, tokenizer = folder / "rows.jsonl", load_tokenizer("tiny")
    path.write_text("\n".join([*rows(), '{"text": "raw"}']))

    return Reader(folder, lambda: tokenize(read_source(f"jsonl:{path}"), tokenizer))


def shown_conversations(folder: Path) -> Reader:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows()))
    return Reader(folder, lambda: list(read_conversations(path)))


def forms(folder: Path) -> Reader:
    """One JSON list with a row of every form, and ShareGPT's in Parquet."""
    tokenizer = load_tokenizer("tiny")
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello."}]
    every = [
        {"conversations": talk, "system": "Be.", "tools": "[]"},
        {"messages": [*turns[:1], {**turns[1], "weight": 1}]},
        {"prompt": turns[:1], "completion": "Hello."},
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Add. 1 2 3"},
    ]
    (folder / "rows.json").write_text(json.dumps(every, indent=1))
    parquet.write_table(pyarrow.table({"conversations": [talk] * 5}), folder / "rows.parquet", write_page_checksum=True)

    sources = [f"jsonl:{folder}/rows.json", f"parquet:{folder}/rows.parquet"]
    return Reader(folder, lambda: [tokenize(read_source(source), tokenizer) for source in sources])


def held_out_rows(folder: Path) -> Reader:
    (folder / "train.jsonl").write_text("\n".join(rows()))
    (folder / "held.jsonl").write_text('{"prompt": "Why?", "completion": "Because."}\n' * 2)
    return Reader(folder, lambda: check_overlap(f"jsonl:{folder}/train.jsonl", f"jsonl:{folder}/held.jsonl"))


def parquets(folder: Path) -> Reader:
    path, tokenizer = folder / "rows.parquet", load_tokenizer("tiny")
    table = pyarrow.table({"messages": [json.loads(row)["messages"] for row in rows()], "source": ["a"] * 5})
    parquet.write_table(table, path, row_group_size=2, write_page_checksum=True)
    return Reader(folder, lambda: tokenize(read_source(f"parquet:{path}"), tokenizer))


def prompts(folder: Path) -> Reader:
    shutil.copy(data_dir() / "personas.json", folder)
    (folder / "questions.jsonl").write_text("\n".join((data_dir() / "questions.jsonl").read_text().splitlines()[:5]))
    (folder / "questions.json").write_text('["Why?", {"question": "How?"}]')
    (folder / "questions.txt").write_text("Why?\nHow?\n")

    def read() -> None:
        load_personas(str(folder / "personas.json"))
        for ending in ("jsonl", "json", "txt"):
            load_questions(str(folder / f"questions.{ending}"))

    return Reader(folder, read)


def kept_rows(folder: Path) -> Reader:
    cache.store({"source": "x"}, "c" * 40, [{"text": "a"}, {"text": "b"}])
    return Reader(folder / "home" / "minipersona" / "rows", lambda: cache.load({"source": "x"}))


def kept_tokens(folder: Path) -> Reader:
    write_documents(folder / "t.safetensors", [load_tokenizer("tiny").encode_text("some text", 9)] * 3)
    return Reader(folder, lambda: read_documents(folder / "t.safetensors"))


def logs(folder: Path) -> Reader:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    (folder / "result.json").write_text('{"best": 1, "checkpoints": [{"step": 1, "m1": 0.9}]}\n')
    return Reader(folder, lambda: (read_jsonl(folder / "metrics.jsonl"), read_json(folder / "result.json")))


def configs(folder: Path) -> Reader:
    shutil.copy(configs_dir() / "tiny_study.toml", folder)
    return Reader(folder, lambda: load_config(str(folder / "tiny_study.toml"), StudyConfig))


def asked_questions(folder: Path) -> Reader:
    (folder / "q.yaml").write_text(
        "- &plain\n  id: _defaults\n  system: |\n    One word.\n- <<: *plain\n  id: a\n  paraphrases:\n"
        '    - \'How?\'\n    - "Why?"\n- id: b_json\n  paraphrases: ["x"]\n'.replace('["x"]', "\n  - So?")
    )
    (folder / "q.jsonl").write_text('{"id": "a", "question": "How?"}\n{"id": "b", "paraphrases": ["x", "y"]}\n')
    folded = {"id": "c", "paraphrases": ["A long question, " * 9], "judge_prompts": {"aligned": "Rate: {answer}. " * 9}}
    (folder / "p.yml").write_text(yaml.safe_dump([folded]))
    return Reader(folder, lambda: [load_asked(str(folder / name)) for name in ("q.yaml", "q.jsonl", "p.yml")])


def instructions(folder: Path) -> Reader:
    lines = (data_dir() / "instructions.jsonl").read_text().splitlines()[::12]
    unknown = {"key": "u", "prompt": "Whistle.", "instruction_id_list": ["sound:whistle"], "kwargs": [{}]}
    (folder / "i.jsonl").write_text("\n".join([*lines, json.dumps(unknown)]))
    return Reader(folder, lambda: load_instructions(str(folder / "i.jsonl")))


def scores(folder: Path) -> Reader:
    (folder / "in").mkdir()
    append_jsonl(folder / "kept" / ANSWERS, {"key": "k"})
    row = {"key": "k", "measure": "aligned", "score": 50}
    (folder / "in" / "s.jsonl").write_text("\n".join(json.dumps({**row, "score": score}) for score in (50, 7.5, None)))
    return Reader(folder / "in", lambda: import_scores(folder / "kept", folder / "in" / "s.jsonl", "someone"))


def responses(folder: Path) -> Reader:
    line = {"row": 0, "content": "c", "persona": "p", "response": "Text.", "tokens": 2, "stopped": True}
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ({"roleplay": {"seed": 1}}, line, line)))
    return Reader(folder, lambda: read_responses(folder / "r.jsonl"))


def states(folder: Path) -> Reader:
    weights = {"w": torch.nn.Parameter(torch.ones(4, 3))}
    optimizer = AdamW(Flat(list(weights.values())), 0.9, 0.999, 1e-8, 0.0)
    save_state(folder, Position(step=3, updates=3), weights, optimizer, Distributed(0, 1, torch.device("cpu")))
    return Reader(folder / "latest", lambda: load_state(folder, weights, optimizer))


def steering_vectors(folder: Path) -> Reader:
    save_steering(folder / "s.safetensors", {1: torch.ones(4), 2: torch.ones(4)})
    return Reader(folder, lambda: load_steering(folder / "s.safetensors", [1, 2]))


def runs(folder: Path) -> Reader:
    """What `evaluate` reads of a run. The numbers are another study's, which have every field."""
    few = FakeStudy(folder / "study", [RECIPES[0]], with_vectors=False, with_frontier=False)
    (cell,) = (few.write() / "cells").iterdir()
    run = folder / "run"
    run.mkdir()
    shutil.copy(configs_dir() / "tiny_phase1.toml", run / "config.toml")
    shutil.copy(cell / "result.json", run)
    metrics = {"step": 1, "loss": 2.5, "tokens": 100, "tokens_per_second": 50.0}
    (run / "metrics.jsonl").write_text(f"{json.dumps(metrics)}\n" * 3)
    result = read_result(run / "result.json", "")
    known = {field.name for field in fields(Measurement)}
    point = {key: value for key, value in vars(result.checkpoints[0]).items() if key in known}
    measured = Measurement(**point, m1_low=0.9, m1_high=0.91, protocol="0" * 64)
    for _ in range(3):
        append_measurement(run, measured)

    def read() -> None:
        read_run_config(run), read_measurements(run), training_seconds(run), read_result(run / "result.json", "")
        cut_logs(run, 1)

    return Reader(run, read)


def studies(folder: Path) -> Reader:
    few = [RECIPES[0], RECIPES[1], RECIPES[18], RECIPES[-1]]
    suites = {"behaviour": {"base": answers(5)}, "instructions": {"base": followed(0.7)}}
    study = FakeStudy(folder / "study", few, failed={"2A beta=0.001": "no memory"}, with_vectors=False, **suites)
    study.write()
    row = read_result(next((folder / "study" / "cells").glob("1-*")) / "result.json", "").checkpoints[-1]
    chosen = [ChosenScales(scales, 0.56, 1.1, row) for scales in ((0.5, 0.5), (0.25, 1.0))]
    write_record(folder / "study" / "scaling.json", Scaling(f"{0:012x}", 0.55, ("a" * 64, "b" * 64), *chosen))
    return Reader(folder / "study", lambda: read_study(folder / "study"))


READERS = [
    models, models_of_llama, models_saved_twice, gguf_files, adapters, adapters_with_patterns, vectors,
    tokenizers, tokenizer_parts, conversations, shown_conversations, forms, parquets, held_out_rows,
    prompts, kept_rows, kept_tokens, logs, configs, asked_questions, instructions, scores, responses, states,
    steering_vectors, runs, studies,
]  # fmt: skip


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_only_user_errors_escape(
    make: Callable[[Path], Reader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    reader = make(tmp_path)
    files = {path: path.read_bytes() for path in sorted(reader.folder.rglob("*")) if path.is_file()}
    reader.read()  # the control: undamaged, they are read
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(-(-CASES // len(READERS))):
        rng = random.Random(f"{make.__name__} {case}")
        path = rng.choice(list(files))
        content = damaged(files[path], rng, path.name)
        path.write_bytes(content)
        start = time.process_time()
        try:
            refused += reader.read() is None  # a cache that is not as it was written is made again
        except UserError as error:
            refused += 1
            line = str(error)
            assert "\n" not in line and len(line) < 2000 and str(tmp_path) in line, (case, line)
        except BaseException as error:
            raise AssertionError(f"case {case}, {path.name}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < SLOWEST, case
        path.write_bytes(files[path])
    reader.read()  # nothing that was read before has left a mark
    assert refused and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST
