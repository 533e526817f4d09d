"""The shipped prompts: what they ask is what is checked, and can be done. And files of users, sound and damaged."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minipersona.behaviour.instructions.dataset import Instruction, Prompt, load_instructions
from minipersona.behaviour.instructions.formats import ANSWERS
from minipersona.behaviour.instructions.registry import KINDS
from minipersona.behaviour.instructions.scoring import follows
from minipersona.errors import UserError

SHIPPED = load_instructions().prompts
SAMPLES = json.loads(Path(__file__).with_name("language_samples.json").read_text(encoding="utf-8"))
AT_LEAST = "at least"


def given(prompt: Prompt, kind: str) -> list[dict[str, Any]]:
    """The arguments of the prompt's instructions of a kind."""
    return [dict(i.arguments) for i in prompt.instructions if i.kind.split(":")[1] == kind]


def total(prompt: Prompt, kind: str, count: str) -> int:
    """The most that "at least" asks for."""
    relations = ("relation", "let_relation", "capital_relation")
    wanted = [a for a in given(prompt, kind) if all(a.get(name, AT_LEAST) == AT_LEAST for name in relations)]
    return max((a[count] for a in wanted), default=0)


def ideal_answer(prompt: Prompt) -> str:
    """An answer without sense that follows every instruction: the least that each of them asks for, put together."""
    pieces = [word for a in given(prompt, "existence") for word in a["keywords"]]
    for a in given(prompt, "frequency"):
        pieces += [a["keyword"]] * (a["frequency"] if a["relation"] == AT_LEAST else 0)
    if given(prompt, "json_format"):
        return json.dumps({"all": pieces})
    for a in given(prompt, "response_language"):
        pieces.append(SAMPLES[a["language"]])
    for a in given(prompt, "letter_frequency"):
        pieces.append(a["letter"] * (a["let_frequency"] if a["let_relation"] == AT_LEAST else 0))
    pieces += ["OK"] * total(prompt, "capital_word_frequency", "capital_frequency")
    pieces += ["*so*"] * total(prompt, "number_highlighted_sections", "num_highlights")
    pieces += ["[it]"] * total(prompt, "number_placeholders", "num_placeholders")
    pieces += ["<<so>>"] * len(given(prompt, "title"))
    pieces += [ANSWERS[1]] * len(given(prompt, "constrained_response"))
    pieces += ["so."] * total(prompt, "number_sentences", "num_sentences")
    pieces += ["so"] * total(prompt, "number_words", "num_words")
    text = " ".join(filter(None, pieces)) or "so"
    for a in given(prompt, "number_bullet_lists"):
        text += "\n* so" * a["num_bullets"]
    for a in given(prompt, "multiple_sections"):
        text += "".join(f"\n{a['section_spliter']} {number} so" for number in range(1, a["num_sections"] + 1))
    for a in given(prompt, "number_paragraphs"):
        text += "\n***\nso" * (a["num_paragraphs"] - 1)
    for a in given(prompt, "nth_paragraph_first_word"):
        blocks = ["so"] * a["num_paragraphs"]
        blocks[a["nth_paragraph"] - 1] = f"{a['first_word']} {text}"
        text = "\n\n".join(blocks)
    if given(prompt, "two_responses"):
        text += "\n******\nno"
    for a in given(prompt, "postscript"):
        text += f"\n{a['postscript_marker']} so"
    for a in given(prompt, "end_checker"):
        text += f" {a['end_phrase']}"
    for a in given(prompt, "repeat_prompt"):
        text = f"{a['prompt_to_repeat']}\n{text}"
    if given(prompt, "quotation"):
        text = f'"{text}"'
    if given(prompt, "english_capital"):
        text = text.upper()
    return text.lower() if given(prompt, "english_lowercase") else text


def test_the_size_of_the_set() -> None:
    kinds = Counter(i.kind for prompt in SHIPPED for i in prompt.instructions)
    assert len(SHIPPED) >= 240 and kinds.keys() == KINDS.keys() and min(kinds.values()) >= 10
    assert len({prompt.text for prompt in SHIPPED}) == len(SHIPPED)
    assert {len(prompt.instructions) for prompt in SHIPPED} == {1, 2, 3}


def test_only_a_bare_name_is_the_shipped_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_instructions("shipped") == load_instructions() == load_instructions("")
    for path in ("./shipped", "sets/shipped", "instructions.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            load_instructions(path)


def test_every_prompt_can_be_followed() -> None:
    failed = [(p.key, i) for p in SHIPPED for i in p.instructions if not follows(i, ideal_answer(p))]
    assert failed == []


def test_control_contradictions_have_no_ideal_answer() -> None:
    lower, upper = Instruction("change_case:english_lowercase", {}), Instruction("change_case:english_capital", {})
    no_comma = Instruction("punctuation:no_comma", {})
    ends = Instruction("startend:end_checker", {"end_phrase": "yes, please"})
    for pair in ((lower, upper), (no_comma, ends)):
        answer = ideal_answer(Prompt("1", "Write.", pair))
        assert not all(follows(i, answer) for i in pair)


def test_no_instruction_is_kept_by_every_answer() -> None:
    """What keeps one answer from following an instruction is either what it lacks or what it holds too much of."""
    for prompt in SHIPPED:
        for i in prompt.instructions:
            texts = [v for value in i.arguments.values() for v in (value if isinstance(value, list) else [value])]
            excess = "So, OK. " * 400 + " ".join(f"{text} " * 400 for text in texts)
            assert not follows(i, "Ja") or not follows(i, excess), (prompt.key, i)


# ---------------------------------------------------------------- what is checked is what is asked

NUMBERS = {
    1: "1 a one it once first", 2: "2 two twice second both", 3: "3 three third", 4: "4 four fourth", 5: "5 five",
    6: "6 six", 7: "7 seven", 8: "8 eight", 9: "9 nine", 10: "10 ten",
}  # fmt: skip
LANGUAGES = {
    "de": "German", "es": "Spanish", "fi": "Finnish", "fr": "French", "hi": "Hindi", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
SAID = {  # how a prompt asks for what has no arguments
    "no_comma": "comma", "json_format": "json", "title": "double angular brackets", "two_responses": "******",
    "english_capital": "capital", "english_lowercase": "lowercase|(no|without) capital", "quotation": "quot",
    "repeat_prompt": "repeat|echo|copy|say this request again", "number_paragraphs": r"\*\*\*", "postscript": "p.s",
    "number_bullet_lists": "bullet", "number_placeholders": "placeholder", "number_highlighted_sections": r"\*\w+",
    "nth_paragraph_first_word": "blank line", "forbidden_words": "not|without|avoid|leave out|neither",
}  # fmt: skip


def says(text: str, number: int) -> bool:
    """Whether a prompt names a number, in digits or in words."""
    forms = NUMBERS.get(number, str(number)).split()
    return any(re.search(rf"(?<!\w){form}(?!\w)", text) for form in forms)


def states(text: str, instruction: Instruction) -> bool:
    """Whether the prompt asks for what the instruction checks."""
    kind, text = instruction.kind.split(":")[1], text.lower()
    less = "less than" in instruction.arguments.values()
    if kind in SAID and not re.search(SAID[kind].replace("******", r"\*{6}"), text):
        return False
    if kind == "constrained_response":
        return all(answer.lower() in text for answer in ANSWERS)
    for name, value in instruction.arguments.items():
        if name == "language":
            stated = LANGUAGES[value].lower() in text
        elif isinstance(value, int):
            brackets = name == "num_placeholders" and len(re.findall(r"\[[^\]]+\]", text)) >= value
            stated = says(text, value) or (less and (says(text, value - 1) or "without" in text)) or brackets
        elif "relation" in name:
            stated = True  # by its number
        else:
            stated = all(v.lower() in text for v in (value if isinstance(value, list) else [value]))
        if not stated:
            return False
    return True


def test_every_prompt_says_what_is_checked() -> None:
    assert [(p.key, i) for p in SHIPPED for i in p.instructions if not states(p.text, i)] == []


def test_control_an_unstated_instruction_is_seen() -> None:
    text = "Write at least 120 words about fog and do not use the word 'grey'."
    assert states(text, Instruction("length_constraints:number_words", {"num_words": 120, "relation": AT_LEAST}))
    assert not states(text, Instruction("length_constraints:number_words", {"num_words": 150, "relation": AT_LEAST}))
    assert not states(text, Instruction("keywords:forbidden_words", {"forbidden_words": ["mist"]}))
    assert not states(text, Instruction("punctuation:no_comma", {}))


# ---------------------------------------------------------------- files of users


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(key: Any = 1, **changes: Any) -> dict[str, Any]:
    kinds = ["punctuation:no_comma", "length_constraints:number_words"]
    arguments = [{}, {"num_words": 9, "relation": AT_LEAST}]
    return {"key": key, "prompt": "Write.", "instruction_id_list": kinds, "kwargs": arguments, **changes}


def test_nulls_of_other_kinds_are_not_there(tmp_path: Path) -> None:
    every = {name: None for kind in KINDS.values() for name in kind.arguments}
    filled = [{**every, **arguments} for arguments in row()["kwargs"]]
    with_nulls = load_instructions(write(tmp_path / "a.jsonl", row(kwargs=filled)))
    assert with_nulls.prompts == load_instructions(write(tmp_path / "b.jsonl", row())).prompts
    assert [dict(i.arguments) for i in with_nulls.prompts[0].instructions] == row()["kwargs"]


def test_rows_that_cannot_be_checked_are_left_out_and_counted(tmp_path: Path) -> None:
    unknown = row(2, instruction_id_list=["punctuation:no_comma", "detectable_format:sonnet"], kwargs=[{}, {"n": 1}])
    language = row(3, instruction_id_list=["language:response_language"], kwargs=[{"language": "la"}])
    both = row(4, instruction_id_list=["detectable_format:sonnet"] * 2, kwargs=[None, {}])
    found = load_instructions(write(tmp_path / "a.jsonl", row(1), unknown, language, both))
    assert [prompt.key for prompt in found.prompts] == ["1"]
    assert found.skipped == {"detectable_format:sonnet": 2, "language:response_language (la)": 1}
    assert found.skipped_rows == 3
    assert found.left_out() == (
        "3 of 4 rows are left out: 'detectable_format:sonnet' (rows: 2), 'language:response_language (la)' (rows: 1)"
    )
    assert load_instructions(write(tmp_path / "a.jsonl", row(1))).left_out() == ""


def test_a_file_of_unknown_kinds_alone_is_refused_and_they_are_named(tmp_path: Path) -> None:
    rows = [row(i, instruction_id_list=["sound:whistle"], kwargs=[{}]) for i in range(3)]
    rows += [row(f"k{i}", instruction_id_list=[f"sound:{i}"], kwargs=[{}]) for i in range(12)]
    with pytest.raises(UserError) as error:
        load_instructions(write(tmp_path / "a.jsonl", *rows))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'a.jsonl'}: holds no row that can be checked; unknown are 'sound:whistle' ")
    assert "'sound:whistle' (rows: 3), 'sound:0' (rows: 1), " in said and " and 3 more; write one" in said
    assert len(load_instructions(write(tmp_path / "a.jsonl", *rows, row("known"))).prompts) == 1  # the control


WORDS = "length_constraints:number_words"


def one(kind: str, arguments: Any) -> dict[str, Any]:
    return row(instruction_id_list=[kind], kwargs=[arguments])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([1], "row 2 is not a JSON object"),
        (row(key=None), 'row 2 has no "key"'),
        (row(key=True), 'row 2 has no "key"'),
        (row(key="first"), "row 2: key first is there twice"),
        (row(prompt=" "), 'row 2 has no "prompt"'),
        (row(prompt=7), 'row 2 has no "prompt"'),
        (row(prompt="\ud800"), "row 2: holds half of a surrogate pair"),
        (row(instruction_id_list=[]), 'row 2 has no "instruction_id_list"'),
        (row(instruction_id_list=[3, 4]), 'row 2 has no "instruction_id_list"'),
        (row(kwargs=[{}]), '"kwargs" must be a list of 2'),
        (row(kwargs={}), '"kwargs" must be a list of 2'),
        (one(WORDS, []), 'its entry in "kwargs" is not an object'),
        (one(WORDS, {"num_words": 9}), 'relation is None; it must be "at least" or "less than"'),
        (one(WORDS, {"num_words": 9, "relation": "at most"}), "relation is 'at most'; it must be"),
        (one(WORDS, {"num_words": "9", "relation": AT_LEAST}), "num_words is '9'; it must be a whole number from 1"),
        (one(WORDS, {"num_words": 0, "relation": AT_LEAST}), "num_words is 0; it must be a whole number from 1"),
        (one(WORDS, {"num_words": True, "relation": AT_LEAST}), "num_words is True; it must be a whole number"),
        (one(WORDS, {"num_words": 9, "relation": AT_LEAST, "n": 1}), "no argument 'n'; it takes num_words, relation"),
        (one("punctuation:no_comma", {"commas": 0}), "no argument 'commas'; it takes none"),
        (one("keywords:existence", {"keywords": "fog"}), "keywords is 'fog'; it must be a list of texts"),
        (one("keywords:existence", {"keywords": []}), "keywords is []; it must be a list of texts"),
        (one("startend:end_checker", {"end_phrase": " "}), "end_phrase is ' '; it must be a text that is not blank"),
        (
            one("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": AT_LEAST}),
            "letter is 'ab'; it must be one character",
        ),
    ],
)
def test_a_damaged_row_is_one_line_that_names_it(tmp_path: Path, bad: Any, says: str) -> None:
    path = write(tmp_path / "bad.jsonl", row("first"), bad)
    with pytest.raises(UserError) as error:
        load_instructions(path)
    assert says in str(error.value) and str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"key": 1', "line 1 is not JSON"),
        (b"\xff\xfe", "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"", "holds no row that can be checked"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_instructions(str(path))
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_instructions(str(path))
