"""The commands: parse, call, print. `minipersona train` and `python train.py` are the same.

torch is imported by the commands, not by this file: `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipersona import __version__
from minipersona.config import DEFAULT_MODEL, SHIPPED, BehaviourSection, RunConfig
from minipersona.console import Console, Parser, answer, dispatch, printable, subcommand
from minipersona.errors import Interrupted, UserError
from minipersona.settings import load_config, override

if TYPE_CHECKING:
    from minipersona.chat import ChatTokenizer
    from minipersona.model.network import Qwen2
    from minipersona.run.evaluate import Overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 2 after one line ``error: ...`` on stderr, or 75 where it was asked to stop (`answer`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Idle threads of torch spin by default. Beside another busy process that makes two threads slower than one (64 s
    # against 19 s for a small run on two cores); sleeping ones cost next to nothing. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Packs differ in length, so that blocks of memory of a fixed size soon fit nothing; these grow. Read likewise.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "RANK" in os.environ:  # a lost rank is named in one line (`training.watch`), not in a stack of frames a rank
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return answer(lambda: dispatch(_parser(), argv), debug="--debug" in argv)


# ---------------------------------------------------------------- the options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minipersona", description="Does a fine-tuning recipe leave persona geometry alone?")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="{train,extract,evaluate,study}")
    _train_options(commands)
    _extract_options(commands)
    _evaluate_options(commands)
    _study_options(commands)
    return parser


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser = subcommand(commands, name, summary, f"example:\n{example}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _train_options(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "Fine-tune a model by one recipe, measuring it at the checkpoint steps. The same command continues a run.",
        "  python train.py --config configs/tiny_phase1.toml\n"
        "  torchrun --nproc-per-node 2 train.py --config configs/phase1.toml --set training.learning_rate=1e-5",
    )
    option = parser.add_argument
    option("--config", required=True, metavar="C", help="a TOML file, or the name of a shipped config")
    option("--model", metavar="M", help="directory, hub id, tiny or random:<hub id>; in place of the config's")
    option("--out", metavar="DIR", help="the run's directory, in place of the config's")
    option("--set", action="append", default=[], metavar="section.key=value", help="change one setting; repeatable")
    option("--plan", action="store_true", help="print the resolved config and what it will take, and do nothing")
    parser.set_defaults(command=_train)


def _extract_options(commands: Any) -> None:
    parser = _command(
        commands,
        "extract",
        "Extract persona vectors and print their M1; or compare the vectors of two files or runs.",
        "  python extract.py --layer 20 --out vectors.safetensors\n"
        "  python extract.py --model tiny --layer 4 6\n"
        "  python extract.py compare before.safetensors after.safetensors",
    )
    option = parser.add_argument
    option("compare", nargs="*", metavar="compare A B", help="two vector files, or runs (their last step)")
    _model_options(parser)
    option("--adapter", metavar="DIR", help="a PEFT adapter to put on the model")
    option("--layer", type=int, nargs="+", metavar="L", help="blocks counted from 0; default the model's own (7B: 20)")
    option("--method", choices=["A", "B"], default="A", help="A: last token of the prompt; B: mean over a response")
    option("--out", metavar="FILE", help="write the vectors there (safetensors)")
    option("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_extract)


def _evaluate_options(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        "Judge a run's checkpoints, a model, or a model with an adapter: M1, held-out loss, PASS or FAIL.",
        "  python evaluate.py --run runs/phase1\n"
        "  python evaluate.py --model tiny --adapter runs/tiny_phase1/step-000040\n"
        "  python evaluate.py --run runs/phase1 --suite behaviour --set samples=20",
    )
    option = parser.add_argument
    option("--run", metavar="DIR", help="a directory that train.py made")
    _model_options(parser)
    option("--adapter", metavar="DIR", help="a PEFT adapter to put on the model")
    option("--baseline", default="", metavar="RUN", help="the run whose last step sets the loss to compare with")
    option("--heldout", default="", metavar="SOURCE", help="the rows that held-out loss is measured on")
    option("--layer", type=int, metavar="L", help="block counted from 0; default the run's or model's own")
    suites = ("registered", "behaviour", "instructions", "all")
    option("--suite", choices=suites, default="registered", help="what to measure; all but registered is generated")
    option(
        "--prompt-sets", choices=("all", "plain"), default="all", help="of the behaviour suite: with hidden sets or not"
    )
    option("--set", action="append", default=[], metavar="key=value", help="of the behaviour suite, such as samples=20")
    option("--instructions", metavar="FILE", help="prompts in the form of IFEval's input_data.jsonl (default: shipped)")
    option("--json", action="store_true", help="print JSON")
    option("--out", metavar="FILE", help="write the result there; a run's is also kept as its result.json")
    parser.set_defaults(command=_evaluate)


def _study_options(commands: Any) -> None:
    parser = _command(
        commands,
        "study",
        "Run the whole search, or continue it, and write its verdict and report; or write a study's report anew.",
        "  python study.py --config configs/tiny_study.toml --exhaustive\n"
        "  python study.py --config configs/study.toml --gpus all\n"
        "  python study.py report studies/study",
    )
    option = parser.add_argument
    option("report", nargs="*", metavar="report DIR", help="write the report of the study in DIR from what it holds")
    option("--config", metavar="C", help="a TOML file, or the name of a shipped config")
    option("--out", metavar="DIR", help="the study's directory, in place of the config's")
    option("--set", action="append", default=[], metavar="section.key=value", help="change one setting; repeatable")
    option("--exhaustive", action="store_true", help="run every phase, also after a recipe has passed")
    option("--phases", default="", metavar="1,2", help="only these of 1 to 5, and the baseline")
    option("--plan", action="store_true", help="print every recipe and what the study will take, and do nothing")
    option("--gpus", default="", metavar="all|0,1", help="a process on each of these GPUs of this machine")
    option("--workers", type=int, metavar="N", help="so many processes on this machine's CPU cores")
    option("--ray", default="", metavar="ADDRESS", help="the devices of a Ray cluster, such as auto (docs/cluster.md)")
    parser.set_defaults(command=_study)


def _model_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--model", metavar="M", help=f"directory, hub id, tiny or random:<hub id> (default {DEFAULT_MODEL})")
    option("--revision", metavar="R", help="a hub revision (default: pinned for the 7B)")
    option("--tokenizer", metavar="DIR", help="another tokenizer than the model's")
    option("--personas", default="", metavar="F", help="shipped (default), registered, or a file")
    option("--questions", default="", metavar="F", help="shipped (default), registered, or a file")


# ---------------------------------------------------------------- the commands


def _train(options: argparse.Namespace) -> None:
    config = override(load_config(options.config, RunConfig), options.set)
    if options.model is not None:
        config = replace(config, model=replace(config.model, name=options.model, revision=""))
    if options.out is not None:
        config = override(config, [f"out={options.out}"])

    if options.plan:
        from minipersona.run.plan import plan

        print(plan(config), end="")
        return

    from minipersona.run.train import run
    from minipersona.training.interruption import Stop, heed_signals
    from minipersona.training.world import end_rank, in_world

    stop = Stop()
    with heed_signals(stop), in_world(config.execution.device, config.execution.timeout_minutes, stop) as world:
        console = Console(quiet=not world.first)
        try:
            run(config, world, console)
        except Interrupted as interrupted:
            console.say(f"{interrupted}; the same command continues")
            raise
    if world.size > 1:
        end_rank()


def _extract(options: argparse.Namespace) -> None:
    if options.compare:
        _compare(options)
        return
    from minipersona.files import check_writable
    from minipersona.geometry.extraction import extract
    from minipersona.geometry.measures import all_measures
    from minipersona.geometry.prompts import load_personas, load_questions
    from minipersona.geometry.statistics import bootstrap_m1, noise_floor
    from minipersona.geometry.vectors import response_lengths
    from minipersona.run.tables import extraction_table, response_table

    if options.out:
        check_writable(options.out)
    personas = load_personas(options.personas or SHIPPED)
    questions = load_questions(options.questions or SHIPPED).questions
    console = Console()
    model, tokenizer = _load(options, console)
    layers = options.layer or [model.config.probe_layer]
    passes = 2 if options.method == "B" else 1  # answered, then read
    with console.progress("extracting", passes * len(personas.prompts) * len(questions), "prompts") as progress:
        vectors = extract(
            model,
            tokenizer,
            personas.prompts,
            questions,
            layers,
            options.method,
            progress=lambda done, total: progress.advance(done),
        )
    if options.out:
        vectors.save(options.out)
    report = {}
    for layer in vectors.layers:
        samples = vectors.at(layer)
        interval = {"m1_ci95": list(bootstrap_m1(samples)), "m1_noise_floor": noise_floor(samples)}
        report[str(layer)] = {**all_measures(samples), **interval}
    metadata = {k: v for k, v in vectors.metadata.items() if k not in ("questions", "system_prompts")}
    value: dict[str, Any] = {"layers": report, "personas": vectors.personas, **metadata}
    text = extraction_table(report)
    if vectors.response_tokens is not None:
        value["response_tokens"] = response_lengths(vectors)
        text += "\n\n" + response_table(value["response_tokens"])
    _show(options, value, text)


def _compare(options: argparse.Namespace) -> None:
    if options.compare[0] != "compare" or len(options.compare) != 3:
        raise UserError(f"{' '.join(options.compare)}: write extract.py compare A B, two vector files or runs")
    from minipersona.geometry.compare import compare
    from minipersona.geometry.vectors import load_vectors
    from minipersona.run.tables import comparison_table
    from minipersona.run.train import last_vectors

    a, b = (load_vectors(last_vectors(Path(name))) for name in options.compare[1:])
    layers = options.layer or [None]
    if len(layers) > 1:
        raise UserError(f"--layer {' '.join(map(str, layers))}: a comparison takes one layer")
    comparison = compare(a, b, layers[0])
    _show(options, comparison.to_json(), comparison_table(comparison))


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.run) == bool(options.model or options.adapter):
        raise UserError("name either --run DIR, or --model M (and --adapter DIR); see evaluate.py --help")
    if options.run and (options.tokenizer or options.revision):
        raise UserError("--tokenizer and --revision belong to --model; a run's are in its config.toml")

    _check_suite_options(options)

    from minipersona.training.interruption import interruptible

    console = Console()
    with interruptible(console.say), _held(options.run):  # what was measured or answered is kept
        _evaluate_held(options, console)


def _held(run: str | None) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's directory, which is written to as its training does; not on one that nobody can write to."""
    from minipersona.locks import lock

    return lock(Path(run)) if run and os.access(run, os.W_OK) else contextlib.nullcontext()


def _evaluate_held(options: argparse.Namespace, console: Console) -> None:
    from minipersona.files import check_writable, write_json
    from minipersona.run.evaluate import Overrides
    from minipersona.run.suites import suites_table
    from minipersona.run.tables import result_table

    overrides = Overrides(
        baseline=options.baseline,
        heldout=options.heldout,
        layers=() if options.layer is None else (options.layer,),
        personas=options.personas,
        questions=options.questions,
    )
    if options.out:
        check_writable(options.out)
    result: dict[str, Any] = {}
    tables = []
    if options.suite in ("registered", "all"):
        result = _registered(options, overrides, console)
        tables.append(result_table(result))
        if options.run and not options.out and overrides == Overrides():
            write_json(Path(options.run) / "result.json", result)
    if options.suite != "registered":
        answered = _suites(options, console)
        result |= answered
        tables.append(suites_table(answered))
    if options.out:
        write_json(options.out, result)
    _show(options, result, "\n\n".join(tables))


def _check_suite_options(options: argparse.Namespace) -> None:
    """What is said about a suite that was not asked for would have no effect."""
    asked = options.suite in ("behaviour", "all")
    for given, name in ((options.set, "--set"), (options.prompt_sets != "all", "--prompt-sets")):
        if given and not asked:
            raise UserError(f"{name}: belongs to --suite behaviour, or all")
    if options.instructions and options.suite not in ("instructions", "all"):
        raise UserError("--instructions: belongs to --suite instructions, or all")
    if options.suite != "registered" and not options.run and not options.out:
        raise UserError(f"--suite {options.suite}: name --out FILE too; the answers are kept beside it")


def _registered(options: argparse.Namespace, overrides: Overrides, console: Console) -> dict[str, Any]:
    from minipersona.model.load import default_device
    from minipersona.run.evaluate import evaluate_model, evaluate_run

    if options.run:
        return evaluate_run(Path(options.run), default_device(), console, overrides)
    model, tokenizer = _load(options, console, adapter=False)
    return evaluate_model(model, tokenizer, console, adapter=options.adapter or "", overrides=overrides)


def _suites(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from minipersona.model.load import default_device
    from minipersona.run.suites import Suites, model_suites, run_suites

    names = ["behaviour", "instructions"] if options.suite == "all" else [options.suite]
    section = override(BehaviourSection(), options.set)
    suites = Suites(names, section, options.prompt_sets, options.instructions)
    if options.run:
        return run_suites(Path(options.run), default_device(), console, suites)
    model, tokenizer = _load(options, console, adapter=False)
    kept = Path(options.out).with_suffix(".answers")
    return model_suites(model, tokenizer, kept, console, suites, options.adapter or "")


def _study(options: argparse.Namespace) -> None:
    from minipersona.cli.study import report, study

    if options.report:
        report(options)
    else:
        study(options)


def _load(options: argparse.Namespace, console: Console, adapter: bool = True) -> tuple[Qwen2, ChatTokenizer]:
    """The model and tokenizer that the options name."""
    from minipersona.chat import load_tokenizer
    from minipersona.model.adapter_files import load_adapter
    from minipersona.model.load import load_model

    name = options.model or DEFAULT_MODEL
    console.say(f"loading {name}")
    tokenizer = load_tokenizer(options.tokenizer or name, revision=None if options.tokenizer else options.revision)
    model = load_model(name, revision=options.revision)
    if adapter and options.adapter:
        load_adapter(model, options.adapter)
    return model, tokenizer


def _show(options: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value, indent=2) if options.json else printable(text))  # ASCII, which steers no terminal
