"""The `evaluate` command: the registered metrics, judged, and the suites of generated answers."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipersona.behaviour_config import BehaviourSection
from minipersona.cli.options import FORMS, command, load, model_options, refuse, show
from minipersona.console import Console
from minipersona.errors import UserError
from minipersona.settings import override

if TYPE_CHECKING:
    from minipersona.run.evaluate import Overrides
    from minipersona.run.result import RunResult
    from minipersona.run.suites import SuiteResults


OF_A_SUITE = {
    "registered": ("--baseline", "--heldout", "--layer", "--personas", "--questions"),
    "behaviour": ("--set", "--prompt-sets"),
    "instructions": ("--instructions",),
}


def evaluate_options(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "evaluate",
        "Judge a run's checkpoints, a model, or a model with an adapter: M1, held-out loss, PASS or FAIL; or the last "
        "steps of several runs, side by side.",
        "  python evaluate.py --run runs/phase1\n"
        "  python evaluate.py --run runs/phase1 runs/phase6a\n"
        "  python evaluate.py --model tiny --adapter runs/tiny_phase1/step-000040\n"
        f"  python evaluate.py --run runs/phase1 --suite behaviour --set samples=20\n\n{FORMS}",
    )
    option = parser.add_argument
    option("--run", nargs="+", default=[], metavar="DIR", help="what train.py made; of several, their last steps")
    model_options(parser)
    option("--baseline", default="", metavar="RUN", help="the run whose last step sets the loss to compare with")
    option("--heldout", default="", metavar="SOURCE", help="the rows that held-out loss is measured on")
    option("--layer", type=int, metavar="L", help="block counted from 0; default the run's or model's own")
    suites = ("registered", "behaviour", "instructions", "all")
    option("--suite", choices=suites, default="registered", help="what to measure; all but registered generate answers")
    option("--prompt-sets", choices=("all", "plain"), default="all", help="behaviour: with the hidden sets, or without")
    option("--set", action="append", default=[], metavar="key=value", help="behaviour: one setting, as samples=20")
    option("--instructions", metavar="FILE", help="prompts in the form of IFEval's input_data.jsonl (default: shipped)")
    option("--json", action="store_true", help="print JSON")
    option("--out", metavar="FILE", help="write the result there; a run's is also kept as its result.json")
    parser.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.run) == bool(options.model or options.adapter):
        raise UserError("name either --run DIR, or a model: --model M, --adapter A, or both; see evaluate.py --help")
    if options.run and (options.tokenizer or options.revision or options.template):
        raise UserError("--tokenizer, --template and --revision belong to --model; a run's are in its config.toml")
    if len({os.path.realpath(run) for run in options.run}) < len(options.run):
        raise UserError("--run: names a directory twice; name each run once")
    _check_suite_options(options)

    from minipersona.training.interruption import interruptible

    console = Console()
    with interruptible(console.say), contextlib.ExitStack() as locks:  # what was measured or answered is kept
        for run in options.run:
            locks.enter_context(_locked(run))
        _measure_and_show(options, console)


def _check_suite_options(options: argparse.Namespace) -> None:
    """UserError where an option belongs to a suite that was not asked for, and so would have no effect."""
    for suite, names in OF_A_SUITE.items():
        if options.suite not in (suite, "all"):
            refuse(options, names, f"belongs to --suite {suite}, or all")
    if options.suite != "registered" and len(options.run) > 1:
        raise UserError(f"--suite {options.suite}: is of one run; name one in --run")
    if options.suite != "registered" and not options.run and not options.out:
        raise UserError(f"--suite {options.suite}: name --out FILE too; the answers are kept beside it")


def _locked(run: str) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's directory, which is written to as its training does; none where it cannot be written to."""
    from minipersona.locks import lock

    return lock(Path(run)) if os.access(run, os.W_OK) else contextlib.nullcontext()


def _measure_and_show(options: argparse.Namespace, console: Console) -> None:
    from minipersona.files import check_writable, write_json
    from minipersona.run.suites import suites_table

    if options.out:
        check_writable(options.out)
    value: dict[str, Any] = {}
    tables = []
    if options.suite in ("registered", "all"):
        value, table = _registered(options, console)
        tables.append(table)
    if options.suite != "registered":
        answered = _suites(options, console)
        value |= answered.to_json()
        tables.append(suites_table(answered))
    if options.out:
        write_json(options.out, value)
        console.say(f"wrote {options.out}")
    show(options, value, "\n\n".join(tables))


def _registered(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], str]:
    """The result as JSON, and its table; of several runs, all results and one table."""
    from minipersona.records import to_dict
    from minipersona.run.evaluate import Overrides, check_side_by_side, evaluate_model
    from minipersona.run.tables import result_table, runs_table

    overrides = Overrides(
        baseline=options.baseline,
        heldout=options.heldout,
        layers=() if options.layer is None else (options.layer,),
        personas=options.personas,
        questions=options.questions,
    )
    if len(options.run) > 1:
        results = {run: _evaluate_and_keep(run, options, overrides, console) for run in options.run}
        check_side_by_side(results)
        return {"runs": {run: to_dict(result) for run, result in results.items()}}, runs_table(results)
    if options.run:
        result = _evaluate_and_keep(options.run[0], options, overrides, console)
    else:
        model, tokenizer = load(options, console)
        result = evaluate_model(model, tokenizer, console, adapter=options.adapter or "", overrides=overrides)
    return to_dict(result), result_table(result)


def _evaluate_and_keep(run: str, options: argparse.Namespace, overrides: Overrides, console: Console) -> RunResult:
    """A run's result, which is kept as its result.json where it is by the run's own config."""
    from minipersona.model.load import default_device
    from minipersona.records import write_record
    from minipersona.run.directory import RESULT
    from minipersona.run.evaluate import Overrides, evaluate_run

    result = evaluate_run(Path(run), default_device(), console, overrides)
    if not options.out and overrides == Overrides():
        write_record(Path(run) / RESULT, result)
    return result


def _suites(options: argparse.Namespace, console: Console) -> SuiteResults:
    from minipersona.model.load import default_device
    from minipersona.run.suites import Suites, model_suites, run_suites

    names = ["behaviour", "instructions"] if options.suite == "all" else [options.suite]
    section = override(BehaviourSection(), options.set)
    suites = Suites(names, section, options.prompt_sets, options.instructions)
    if options.run:
        return run_suites(Path(options.run[0]), default_device(), console, suites)
    model, tokenizer = load(options, console)
    kept = Path(options.out).with_suffix(".answers")
    return model_suites(model, tokenizer, kept, console, suites, options.adapter or "")
