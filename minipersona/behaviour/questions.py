"""The free-form questions that a model is asked, after Betley et al. 2025, "Emergent Misalignment".

One question a line: {"id", "question" or "paraphrases", "form", "system"}. The shipped ones, our own, are eight plain
questions, the same eight asking for JSON through a system prompt, and the same eight with a template to fill in. A
question's form names the prompt set that it belongs to. A user's file may also be YAML, as that paper's questions are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, ClassVar

import yaml

from minipersona.behaviour.judge import MEASURES
from minipersona.config import SHIPPED
from minipersona.errors import UserError
from minipersona.files import data_dir, digest, read_jsonl, user_path

PLAIN = "plain"
KNOWN = ("id", "form", "question", "paraphrases", "system")
# What the paper's files carry beside: how to sample and who judges, which is the suite's business here.
IGNORED = ("type", "samples_per_paraphrase", "temperature", "max_tokens", "judge", "judges", "judge_prompts", "meta")


@dataclass(frozen=True)
class Question:
    """A question: sample i takes paraphrase i modulo their number, below the system prompt if there is one."""

    id: str
    form: str
    paraphrases: tuple[str, ...]
    system: str | None = None

    def row(self) -> dict[str, Any]:
        """The question as a line of a question file."""
        text = {"question": self.paraphrases[0]} if len(self.paraphrases) == 1 else {"paraphrases": self.paraphrases}
        return {"id": self.id, "form": self.form, **text} | ({} if self.system is None else {"system": self.system})


@dataclass(frozen=True)
class QuestionSet:
    """Questions in the order of their file; `digest` covers their content, so that a converted file has the same."""

    name: str  # shipped, or the path of the file
    questions: tuple[Question, ...]
    digest: str


def load_questions(source: str = SHIPPED) -> QuestionSet:
    """The shipped questions, or a .jsonl, .yaml or .yml file. UserErrors name the file, the entry and the mend."""
    path = data_dir() / "behaviour" / "questions.jsonl" if source == SHIPPED else user_path(source)
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a .jsonl or .yaml file of questions, or {SHIPPED}")
    entries = _yaml_entries(path) if path.suffix in (".yaml", ".yml") else list(enumerate(read_jsonl(path, False), 1))
    questions = tuple(_question(entry, f"{path}: question {number}") for number, entry in entries)
    if not questions:
        raise UserError(f'{path}: holds no questions; write one {{"id": ..., "question": ...}} a line')
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: two questions have the id {question.id}; give each its own")
        seen.add(question.id)
    return QuestionSet(source, questions, digest([question.row() for question in questions]))


def to_jsonl(questions: Iterable[Question]) -> str:
    """The questions as the text of a JSONL file."""
    return "".join(json.dumps(question.row()) + "\n" for question in questions)


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict):
        raise UserError(f'{where}: is not an object; write {{"id": ..., "question": ...}}')
    for key in entry:
        if key not in KNOWN + IGNORED:
            raise UserError(f"{where}: unknown key {brief(key)}; the keys are {', '.join(KNOWN)}")
    _check_judged(entry.get("judge_prompts"), where)
    name = entry.get("id")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
        raise UserError(f"{where}: has no id; give it one of letters, digits, - and _")
    texts = entry.get("paraphrases", [entry["question"]] if "question" in entry else None)
    if not isinstance(texts, list) or not texts or ("question" in entry and "paraphrases" in entry):
        raise UserError(f'{where} ({name}): give either "question", one text, or "paraphrases", a list of texts')
    for text in texts:
        _check(text, f"{where} ({name})")
    system = entry.get("system")
    if system is not None:
        _check(system, f"{where} ({name}): system")
    form = entry.get("form", _form_of(name))
    if not isinstance(form, str) or not re.fullmatch(r"[a-z0-9_]{1,40}", form):
        raise UserError(
            f"{where} ({name}): form is {brief(form)}; write a short word of small letters, such as {PLAIN}"
        )
    return Question(name, form, tuple(texts), system)


def _check_judged(prompts: Any, where: str) -> None:
    """UserError where a question's `judge_prompts` ask for another score than the suite's, which nobody would give."""
    if prompts is None:
        return
    known = " and ".join(MEASURES)
    if not isinstance(prompts, dict):
        raise UserError(f"{where}: judge_prompts is {brief(prompts)}; leave it out, or name {known}")
    for key in prompts:
        if key not in MEASURES:
            raise UserError(
                f"{where}: judge_prompts: {brief(key)} is not judged, only {known}; remove it, or the question"
            )


def _form_of(name: str) -> str:
    """The paper's files tell the forms of a question by the end of its id."""
    return next((form for form in ("json", "template") if name.endswith(f"_{form}")), PLAIN)


def _check(text: Any, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {brief(text)} is not a question; write a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is not text; mend the file") from None


# ---------------------------------------------------------------- YAML

LARGEST_YAML = 250_000  # bytes; PyYAML reads about 75,000 a second
MOST_VALUES = 30_000  # lists, maps and texts, counting again what an alias repeats
ALIGN = "align the lines with spaces, and quote a text that holds a sign such as : # or ?"


def _yaml_entries(path: Path) -> list[tuple[int, Any]]:
    with open(path, "rb") as file:
        content = file.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise UserError(f"{path}: is longer than {LARGEST_YAML:,} bytes; write the questions as a .jsonl file")
    try:
        entries = parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not valid UTF-8; convert the file") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: is not a list; begin each question with a line such as - id: my_question")
    # An entry that only carries defaults for others to merge has an id that begins with an underscore.
    numbered = enumerate(entries, 1)
    return [(n, e) for n, e in numbered if not (isinstance(e, dict) and str(e.get("id", "")).startswith("_"))]


def parse_yaml(text: str, name: str) -> Any:
    """The lists, maps, texts and nulls of a YAML text; [] if it is empty. UserErrors begin with `name`."""
    line = 1
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data() or []
        finally:
            line = loader.line + 1
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"holds the character U+{error.character:04X}; write it as an escape in double quotes"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = line if mark is None else mark.line + 1
        problem = f"is not valid YAML: {error.context or ''} {error.problem or ''}; {error.note or ALIGN}"
    except RecursionError:
        problem = "is nested too deeply; questions are flat"
    except (ValueError, OverflowError) as error:  # PyYAML passes on what Python says of an absurd number
        problem = f"is not valid YAML: {error}; check its numbers and escapes"
    raise UserError(f"{name}: line {line} {' '.join(problem.split())}")


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` for questions: 100, yes and 2026-01-01 are texts, and aliases are bounded.

    A tag other than those of lists, maps, texts and null is an error, and so is a key that a map has twice.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":merge", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.endswith((":seq", ":map", ":str", ":null"))
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = 0
        self.sizes: dict[yaml.Node, int] = {}  # values in each node that has been read to its end

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the graph that the text describes. A few lines of aliases may stand for 2 to the 60th texts."""
        event, before = self.peek_event(), self.values
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self.sizes[node] = self.values + 1 - before
            self.values += 1
        elif node in self.sizes:
            self.values += self.sizes[node]
        else:
            raise _refused(event, f"*{event.anchor} lies within what it repeats", "write the text out")
        if self.values > MOST_VALUES:
            raise _refused(event, f"more than {MOST_VALUES:,} values, with those that aliases repeat", "use fewer")
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A map. PyYAML would take the last of two equal keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refused(key, f"the key {brief(key.value)} a second time", "keep one")
            seen.add(key.value)
        return node


def _refused(where: Any, problem: str, mend: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark, note=mend)
