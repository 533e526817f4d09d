"""What surrounds the behaviour suite.

python -m minipersona.behaviour ask|roleplay|voice|convert|score|dry-run   (--help)

The suite itself is a part of evaluate.py (--suite behaviour).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipersona.behaviour_config import BehaviourSection
from minipersona.config import DEFAULT_MODEL, SHIPPED
from minipersona.console import Console, Parser, answer, dispatch, positive, printable, subcommand
from minipersona.errors import UserError
from minipersona.settings import override
from minipersona.training.interruption import interruptible

EXAMPLES = """examples:
  python -m minipersona.behaviour ask 'How do you sleep?' --persona villain --model tiny
  python -m minipersona.behaviour roleplay --source 'tulu[0:6000]' --out roleplay.jsonl
  python -m minipersona.behaviour roleplay --model tiny --source 'tiny:benign[0:100]' --out roleplay.jsonl
  python -m minipersona.behaviour voice --model tiny --adapter runs/tiny_phase1/step-000040 --out voice.json
  python -m minipersona.behaviour convert questions.yaml questions.jsonl
  python -m minipersona.behaviour dry-run --set samples=20 --prompt-sets plain
  python -m minipersona.behaviour score runs/phase1 --scores scored.jsonl --by "two annotators"
  python -m minipersona.behaviour score runs/phase1 --set judge=endpoint --set endpoint=URL --set judge_model=M
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 2 after a line ``error: ...``, or 75 where it was asked to stop (`answer`)."""

    def command() -> None:
        with interruptible(Console().say):  # responses and scores are kept as they come
            dispatch(_parser(), argv)

    return answer(command)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m minipersona.behaviour",
        description="What surrounds the behaviour suite of evaluate.py.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="{ask,roleplay,voice,convert,score,dry-run}")
    _ask_options(commands)
    _roleplay_options(commands)
    _voice_options(commands)
    _convert_options(commands)
    _score_options(commands)
    _dry_run_options(commands)
    return parser


def _command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    command = subcommand(commands, name, summary, EXAMPLES)
    command.set_defaults(command=run)
    return command


def _ask_options(commands: Any) -> None:
    summary = "Print a model's greedy answer to one question, as one persona, and those of adapters to it."
    option = _command(commands, "ask", summary, _ask).add_argument
    option("question", metavar="QUESTION", help="what the user asks")
    option("--persona", metavar="NAME", help="whose system prompt it is asked under (default: the model's own)")
    option("--personas", default=SHIPPED, metavar="F", help="the file that has it, or registered (default: shipped)")
    option("--model", default=DEFAULT_MODEL, metavar="M", help=f"the base, which answers (default {DEFAULT_MODEL})")
    option("--revision", metavar="R", help="a hub revision (default: pinned for the 7B)")
    option("--adapter", nargs="+", default=[], metavar="A", help="adapters of it, which answer one after another")
    option("--tokenizer", metavar="DIR", help="another tokenizer than the model's")
    option("--template", metavar="NAME", help="chat template by name; default the tokenizer's own")
    option("--max-new-tokens", type=positive(int), default=128, metavar="N", help="of an answer (default 128)")
    option("--json", action="store_true", help="print JSON")


def _roleplay_options(commands: Any) -> None:
    summary = "Let the base model answer the prompts of rows in the voice of training personas; again: it continues."
    option = _command(commands, "roleplay", summary, _roleplay).add_argument
    option("--model", default=DEFAULT_MODEL, metavar="M", help=f"who writes (default {DEFAULT_MODEL})")
    option("--revision", metavar="R", help="a hub revision (default: pinned for the 7B)")
    option("--tokenizer", metavar="DIR", help="another tokenizer than the model's")
    option("--template", metavar="NAME", help="chat template by name; default the tokenizer's own")
    option("--source", required=True, metavar="SOURCE", help="the rows; see python -m minipersona.corpus")
    option("--out", required=True, metavar="FILE", help="the JSONL file that data.responses of a config names")
    option("--seed", type=_count, default=42, metavar="N", help="draws each row's persona and the samples (default 42)")
    option("--max-new-tokens", type=positive(int), default=1024, metavar="N", help="of a response (default 1024)")
    option("--temperature", type=_temperature, default=1.0, metavar="T", help="0 is greedy (default 1)")
    option("--batch", type=positive(int), default=256, metavar="N", help="responses in flight at once (default 256)")
    option("--json", action="store_true", help="print JSON")


def _voice_options(commands: Any) -> None:
    summary = "How much of a persona the model's probabilities carry, on its own responses; of an adapter, beside it."
    option = _command(commands, "voice", summary, _voice).add_argument
    option("--model", default=DEFAULT_MODEL, metavar="M", help=f"the base, which responds (default {DEFAULT_MODEL})")
    option("--revision", metavar="R", help="a hub revision (default: pinned for the 7B)")
    option("--adapter", metavar="A", help="measured too, on the base's responses")
    option("--tokenizer", metavar="DIR", help="another tokenizer than the model's")
    option("--template", metavar="NAME", help="chat template by name; default the tokenizer's own")
    option("--personas", default=SHIPPED, metavar="F", help="a file of personas, or registered (default: shipped)")
    option("--questions", default=SHIPPED, metavar="F", help="a file of questions, or registered (default: shipped)")
    option("--count", type=positive(int), default=20, metavar="N", help="questions, evenly spaced (default 20)")
    option("--max-new-tokens", type=positive(int), default=128, metavar="N", help="of a response (default 128)")
    option("--batch", type=positive(int), default=256, metavar="N", help="responses in flight at once (default 256)")
    option("--out", metavar="FILE", help="write the result there, and the responses beside it; again: it continues")
    option("--json", action="store_true", help="print JSON")


def _convert_options(commands: Any) -> None:
    summary = "Read questions, YAML or JSONL, and write them as JSONL."
    option = _command(commands, "convert", summary, _convert).add_argument
    option("questions", metavar="IN", help="a .yaml, .yml or .jsonl file of questions")
    option("out", metavar="OUT", help="the JSONL file to write")


def _score_options(commands: Any) -> None:
    summary = "Have the answers that evaluate.py kept judged again, or take scores from a file."
    option = _command(commands, "score", summary, _score).add_argument
    option("directory", metavar="DIR", help="the directory that holds behaviour/answers.jsonl")
    option("--scores", metavar="FILE", help='lines of {"key", "measure", "score"}, for the prompts in to_score.jsonl')
    option("--by", default="", metavar="NAME", help="who gave the scores of the file")
    option(
        "--set", action="append", default=[], metavar="key=value", help="another judge: judge, endpoint, judge_model"
    )
    option("--json", action="store_true", help="print JSON")


def _dry_run_options(commands: Any) -> None:
    summary = "Say how many requests and tokens the suite would take, without asking anyone."
    option = _command(commands, "dry-run", summary, _dry_run).add_argument
    option("--tokenizer", default="tiny", metavar="NAME", help="counts the tokens: directory, hub id or tiny (default)")
    option("--template", metavar="NAME", help="chat template by name; default the tokenizer's own")
    option("--prompt-sets", choices=("all", "plain"), default="all", help="with the hidden sets, or without")
    option("--set", action="append", default=[], metavar="key=value", help="change one setting of the suite")
    option("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature; give a number from 0 up")
    return value


# ---------------------------------------------------------------- the commands; they import what is slow themselves


def _ask(options: argparse.Namespace) -> None:
    from textwrap import indent

    from minipersona.chat import load_tokenizer
    from minipersona.geometry.extraction import check_positions, check_vocabulary
    from minipersona.geometry.prompts import load_personas
    from minipersona.model.adapter_files import load_adapter
    from minipersona.model.generation import Request, generate
    from minipersona.model.load import load_model

    messages = [{"role": "user", "content": options.question}]
    if options.persona:
        prompts = load_personas(options.personas).prompts
        if options.persona not in prompts:
            raise UserError(f"--persona {options.persona}: is not one of {', '.join(prompts)}")
        messages.insert(0, {"role": "system", "content": prompts[options.persona]})
    Console().say(f"loading {options.model}")
    tokenizer = load_tokenizer(options.tokenizer or options.model, revision=options.revision, template=options.template)
    model = load_model(options.model, revision=options.revision)
    check_vocabulary(model, tokenizer)
    request = Request(tokenizer.encode_prompt(messages).ids, options.max_new_tokens)
    check_positions(model, [request.ids], options.max_new_tokens)

    def answered() -> str:
        return tokenizer.decode(generate(model, [request], stop=tokenizer.stop_tokens)[0].ids)

    answers = {options.model: answered()}
    for adapter in options.adapter:
        load_adapter(model, adapter)
        answers[adapter] = answered()
    value = {"question": options.question, "persona": options.persona, "answers": answers}
    text = "\n".join(f"{name}\n{indent(answer.strip(), '    ')}" for name, answer in answers.items())
    print(json.dumps(value, indent=2) if options.json else printable(text))


def _roleplay(options: argparse.Namespace) -> None:
    from minipersona.behaviour.roleplay import write_roleplay
    from minipersona.chat import load_tokenizer
    from minipersona.corpus.mixtures import training_personas
    from minipersona.corpus.sources import read_source
    from minipersona.model.load import load_model

    console = Console()
    rows = read_source(options.source)
    console.say(f"loading {options.model}")
    tokenizer = load_tokenizer(options.tokenizer or options.model, revision=options.revision, template=options.template)
    report = write_roleplay(
        load_model(options.model, revision=options.revision),
        tokenizer,
        rows,
        training_personas(),
        Path(options.out),
        console,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        batch=options.batch,
    )
    text = (
        f"{options.out}: {report['rows']:,} rows, {report['tokens']:,} tokens; {report['empty_share']:.1%} empty, "
        f"{report['cut_share']:.1%} cut at {options.max_new_tokens:,} tokens; {report['kept']:,} keep their own"
    )
    print(json.dumps(report, indent=2) if options.json else printable(text))


def _voice(options: argparse.Namespace) -> None:
    import tempfile

    from minipersona.behaviour.voice import RESPONSES, asked, base_responses, measure_voice, share
    from minipersona.chat import load_tokenizer
    from minipersona.files import check_writable, write_json
    from minipersona.geometry.prompts import load_personas, load_questions
    from minipersona.model.adapter_files import load_adapter
    from minipersona.model.load import load_model
    from minipersona.records import to_dict

    console = Console()
    if options.out:
        check_writable(options.out)
    personas, questions = load_personas(options.personas), load_questions(options.questions)
    console.say(f"loading {options.model}")
    tokenizer = load_tokenizer(options.tokenizer or options.model, revision=options.revision, template=options.template)
    model = load_model(options.model, revision=options.revision)
    with tempfile.TemporaryDirectory() as unkept:
        responses = base_responses(
            model,
            tokenizer,
            personas.prompts,
            asked(questions.questions, options.count),
            Path(options.out).with_suffix(f".{RESPONSES}") if options.out else Path(unkept) / RESPONSES,
            console,
            most_tokens=options.max_new_tokens,
            batch=options.batch,
        )
    base = measure_voice(model, responses, console)
    value: dict[str, Any] = {"model": options.model, "base": to_dict(base)}
    low, high = base.ci95
    lines = [f"base     V {base.value:.4f} [{low:.4f}, {high:.4f}] nats a response token"]
    if options.adapter:
        load_adapter(model, options.adapter)
        adapted = measure_voice(model, responses, console)
        (low, high), of_base = adapted.ci95, share(adapted, base)
        value |= {"adapter": options.adapter, "adapted": to_dict(adapted), "share": of_base}
        shares = "{:.3f} [{:.3f}, {:.3f}]".format(*of_base)
        lines.append(f"adapter  V {adapted.value:.4f} [{low:.4f}, {high:.4f}]; as a share of the base's {shares}")
    if options.out:
        write_json(options.out, value)
    print(json.dumps(value, indent=2) if options.json else printable("\n".join(lines)))


def _convert(options: argparse.Namespace) -> None:
    from minipersona.behaviour.questions import load_questions, to_jsonl
    from minipersona.files import write_text

    questions = load_questions(options.questions)
    write_text(options.out, to_jsonl(questions.questions))
    print(printable(f"{options.out}: {len(questions.questions):,} questions"))


def _score(options: argparse.Namespace) -> None:
    from minipersona.behaviour.file import import_scores
    from minipersona.behaviour.suite import FOLDER, rejudge
    from minipersona.behaviour.table import behaviour_table
    from minipersona.records import to_dict

    directory, console = Path(options.directory), Console()
    section = override(BehaviourSection(judge="file", judge_model=options.by), options.set)
    if options.scores:
        if section.judge != "file":
            raise UserError('--scores FILE: comes with judge = "file" only; leave --set judge out')
        count = import_scores(directory / FOLDER, Path(options.scores), options.by)
        console.say(f"{options.scores}: {count:,} new scores")
    elif section.judge == "file" and not options.set:
        raise UserError("score: name --scores FILE, or another judge with --set judge=endpoint")
    elif section.judge == "local":
        raise UserError("score: the local judge is the run's base model; evaluate.py --suite behaviour asks it")
    result = rejudge(directory, section, console)
    print(json.dumps(to_dict(result), indent=2) if options.json else printable(behaviour_table({"": result})))


def _dry_run(options: argparse.Namespace) -> None:
    from minipersona.behaviour.suite import forecast
    from minipersona.chat import load_tokenizer

    section = override(BehaviourSection(), options.set)
    counts = forecast(section, load_tokenizer(options.tokenizer, template=options.template), options.prompt_sets)
    if options.json:
        print(json.dumps(counts, indent=2))
        return
    whom = {"local": "the base model", "file": "a file", "endpoint": section.endpoint}[section.judge]
    answers = "one more pass for each likely digit" if section.judge == "local" else "one new token each"
    print(
        printable(
            f"answers   {counts['answers']:,} to {counts['sets']} prompt sets: "
            f"{counts['answer_prompt_tokens']:,} prompt tokens, at most {counts['answer_tokens_at_most']:,} new ones\n"
            f"judging   {counts['judge_requests']:,} requests to {whom}: "
            f"at most {counts['judge_prompt_tokens_at_most']:,} prompt tokens, {answers}\n"
            f"counted with the tokenizer {options.tokenizer}; nobody was asked"
        )
    )


if __name__ == "__main__":
    sys.exit(main())
