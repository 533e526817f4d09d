"""Question files: the shipped ones, JSONL, and the YAML of the paper's files, every scalar a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minipersona.behaviour.__main__ import main
from minipersona.behaviour.prompt_sets import forms, hidden_sets, prompts
from minipersona.behaviour.questions import LARGEST_YAML, load_questions, parse_yaml
from minipersona.errors import UserError

FILE = """\
# free-form questions
---
- &defaults
  id: _defaults
  type: free_form_judge_0_100
  samples_per_paraphrase: 100   # each
  temperature: 1
  judge_prompts: &prompts
    aligned: |
      Rate {answer}.

      From 0 to 100: no more.
    coherent: >-
      Does it
      make sense?

      At all?
- <<: *defaults
  id: quick
  paraphrases:
  - How are you?
  - "Say \\"hi\\"\\nplease"
- <<: *defaults
  id: quick_json
  paraphrases:
    - 'It''s: a question # not a comment'
    - >
      Folded
      text
  system: |
    Answer in JSON.
      {"a": 1}
  judge_prompts: *prompts
-
  id: late_template
  paraphrases: ["One?", Two]
"""


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_shipped_questions_are_eight_in_three_forms() -> None:
    shipped = load_questions()
    assert forms(shipped.questions) == ["plain", "json", "template"]
    assert [sum(q.form == form for q in shipped.questions) for form in ("plain", "json", "template")] == [8, 8, 8]
    assert all((q.system is not None) == (q.form == "json") for q in shipped.questions)


@pytest.mark.parametrize(
    "judge, said",
    [("harmful: Rate {answer}.", "judge_prompts: 'harmful' is not judged, only aligned and coherent; remove it"),
     ("aligned: Rate {answer}.", None)],  # the control
)  # fmt: skip
def test_another_judge_than_the_suite_s_is_refused(tmp_path: Path, judge: str, said: str | None) -> None:
    """Also where it is merged from the defaults, which are no question."""
    for number, text in enumerate(
        [
            f"- id: a\n  question: How?\n  judge_prompts:\n    coherent: Sense?\n    {judge}\n",
            f"- &d\n  id: _d\n  judge_prompts:\n    {judge}\n- <<: *d\n  id: a\n  question: How?\n",
        ]
    ):
        path = written(tmp_path / f"{number}.yaml", text)
        if said is None:
            assert len(load_questions(path).questions) == 1
            continue
        with pytest.raises(UserError) as error:
            load_questions(path)
        assert said in str(error.value) and str(error.value).startswith(path) and "\n" not in str(error.value)


def test_prompts_of_every_set() -> None:
    shipped = load_questions().questions
    every = prompts(shipped, 3, "all")
    plain = prompts(shipped, 3, "plain")
    hidden = [s["name"] for s in hidden_sets()]
    assert len(plain) == 24 * 3 and every[: len(plain)] == plain
    assert len(every) == (24 + 8 * len(hidden)) * 3
    assert list(dict.fromkeys(p.set for p in every)) == ["plain", "json", "template", *hidden]
    questions = {q.id: q.paraphrases[0] for q in shipped}
    assert all(questions[p.question] in p.messages[-1]["content"] for p in every)
    texts = {json.dumps(p.messages) for p in every}
    assert len(texts) == 24 + 8 * len(hidden)  # no set repeats another
    seeds = {p.seed(42) for p in every}
    assert len(seeds) == len(every) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds.isdisjoint({p.seed(43) for p in every})
    # A sample's seed hangs on what is asked and its number: not on how many samples there are, or which sets.
    assert {p.seed(42) for p in prompts(shipped, 1, "plain")} == {p.seed(42) for p in plain if p.sample == 0}


def test_the_papers_form(tmp_path: Path) -> None:
    assert parse_yaml(FILE, "f") == stringly(yaml.safe_load(FILE))
    questions = load_questions(written(tmp_path / "q.yaml", FILE)).questions
    assert [(q.id, q.form) for q in questions] == [
        ("quick", "plain"), ("quick_json", "json"), ("late_template", "template")
    ]  # fmt: skip
    assert questions[0].paraphrases == ("How are you?", 'Say "hi"\nplease')
    assert questions[1].paraphrases == ("It's: a question # not a comment", "Folded text\n")
    assert questions[2].paraphrases == ("One?", "Two")
    assert questions[1].system == 'Answer in JSON.\n  {"a": 1}\n' and questions[0].system is None
    by_sample = [p.messages[-1]["content"] for p in prompts(questions[:1], 3, "plain")]
    assert by_sample == ["How are you?", 'Say "hi"\nplease', "How are you?"]


def test_a_converted_file_is_the_same_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "q.yml", FILE.replace('["One?", Two]', '["One?\\LTwo\\0?"]'))
    assert main(["convert", source, str(tmp_path / "q.jsonl")]) == 0
    assert "3 questions" in capsys.readouterr().out
    a, b = load_questions(source), load_questions(str(tmp_path / "q.jsonl"))
    assert a.questions[2].paraphrases == ("One?\u2028Two\0?",)
    assert a.questions == b.questions and a.digest == b.digest
    assert (tmp_path / "q.jsonl").read_text().isascii()


def stringly(value: object) -> object:
    """As the reader takes values: every scalar is a text."""
    if isinstance(value, dict):
        return {key: stringly(item) for key, item in value.items()}
    return [stringly(item) for item in value] if isinstance(value, list) else str(value)


LINE = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=12)


@settings(max_examples=400, deadline=None, database=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["id", "question", "system"]),
            st.tuples(st.sampled_from(["", "|", "|-", ">", ">-", '"', "'"]), st.lists(LINE, min_size=1, max_size=4)),
            min_size=1,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_scalar_is_the_text_that_the_file_has(entries: list[dict[str, tuple[str, list[str]]]]) -> None:
    """Whatever the text: as PyYAML's own loader of texts reads it, apart from null, or a line that says where not."""
    text = ""
    for entry in entries:
        for place, (key, (style, lines)) in enumerate(entry.items()):
            text += "- " if place == 0 else "  "
            if style in ("|", "|-", ">", ">-"):
                text += f"{key}: {style}\n" + "".join(f"    {line}\n" for line in lines)
            else:
                text += f"{key}: {style}{lines[0]}{style}\n"
    try:
        ours = parse_yaml(text, "f")
    except UserError as error:
        assert str(error).startswith("f: line ") and "\n" not in str(error)
        return
    assert same(ours, yaml.load(text, yaml.BaseLoader)), text


def same(ours: object, texts: object) -> bool:
    if isinstance(ours, dict) and isinstance(texts, dict):
        pairs = zip(ours.items(), texts.items(), strict=True)
        return all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if isinstance(ours, list) and isinstance(texts, list):
        return all(same(a, b) for a, b in zip(ours, texts, strict=True))
    return texts in ("", "~", "null", "Null", "NULL") if ours is None else ours == texts


# Three rare line ends are left out: PyYAML writes them bare, and then does not read them back either.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029"), max_size=60)
ANY_TEXT |= st.text("ab \n:#-'\"", max_size=200)


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.fixed_dictionaries({"id": ANY_TEXT}, optional={"system": ANY_TEXT | st.none()}), max_size=3),
    st.sampled_from([None, '"', "'"]),
    st.booleans(),
    st.integers(5, 100),
)
def test_what_safe_dump_writes_is_read(entries: list[object], style: str | None, escape: bool, width: int) -> None:
    """Long texts are folded over lines at `width`."""
    text = yaml.safe_dump(entries, default_style=style, allow_unicode=not escape, width=width, sort_keys=False)
    assert parse_yaml(text, "f") == entries


def test_long_texts_are_folded_as_safe_dump_folds_them(tmp_path: Path) -> None:
    entries = [{"id": "a", "system": "Say it. " * 40, "paraphrases": ["How are you today? " * 20, "one\n\ntwo " * 30]}]
    text = yaml.safe_dump(entries)
    assert len(text.splitlines()) > 20  # the control
    [question] = load_questions(written(tmp_path / "q.yaml", "\ufeff" + text)).questions  # a BOM, too
    assert question.row() == {k: tuple(v) if isinstance(v, list) else v for k, v in entries[0].items()} | {
        "form": "plain"
    }


def test_what_yaml_takes_for_another_type_stays_a_text(tmp_path: Path) -> None:
    texts = ["100", "yes", "off", "1.5", "2026-01-01", "0x1f", "12:30", ".inf", "01"]
    assert any(not isinstance(value, str) for value in yaml.safe_load(f"[{', '.join(texts)}]"))  # the control
    listed = f"- {{id: 7, paraphrases: [{', '.join(texts)}], system: ~}}"
    [question] = load_questions(written(tmp_path / "q.yaml", listed)).questions
    assert (question.id, question.paraphrases, question.system) == ("7", tuple(texts), None)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.sampled_from("ab:-&*|>#'\"\n  {[\\<\t%!]},?~0\0\ufeff"), max_size=60))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        parse_yaml(text, "f")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("f: line ")


@pytest.mark.parametrize(
    "text, words",
    [
        ("- id: a\n\tquestion: b", "line 2 is not valid YAML: .*t' that cannot start .*; align the lines"),
        ("- id: a\n  question: [x, y]", r"question 1 \(a\): \['x', 'y'\] is not a question"),
        ("- id: a\n  question: {x: y}", r"question 1 \(a\): {'x': 'y'} is not a question"),
        ("- id: a\n  id: b", "line 2 is not valid YAML: the key 'id' a second time; keep one"),
        ("- id: a\n  question: *nobody", "line 2 is not valid YAML: found undefined alias 'nobody'"),
        ('- id: "a', "line 1 is not valid YAML: while scanning a quoted scalar found unexpected end"),
        ("- id: a: b", "line 1 is not valid YAML: mapping values are not allowed here; .* quote a text"),
        ("- id: a\n    question: b", "line 2 is not valid YAML: mapping values are not allowed here; align the lines"),
        ("- id: a\nquestion: b", "line 2 is not valid YAML: .*expected <block end>.*; align the lines"),
        ("- id:\n- id: b", "question 1: has no id"),
        ("- id: a\n  just words", "line 2 is not valid YAML: .*could not find expected ':'"),
        ("- id: a\n  <<: text", "line 2 is not valid YAML: .*expected a mapping or list of mappings for merging"),
        ("- id: a\n  question: a\0b", "line 2 holds the character U[+]0000; write it as an escape in double quotes"),
        ("- id: a\n- !!python/object/apply:os.getpid []", "line 2 is not valid YAML: .*tag .*python/object"),
        ("- !!int 5", "line 1 is not valid YAML: .*tag"),
        ("- &a [*a]", "line 1 is not valid YAML: [*]a lies within what it repeats"),
        ('- "\\UFFFFFFFF"', "line 1 is not valid YAML: .*check its numbers and escapes"),
        ('- {id: a, question: "\\ud800"}', "surrogate"),
        ("[" * 5000, "line 1 is nested too deeply"),
        ("- a\n--- \n- b", "line 2 is not valid YAML: expected a single document"),
        ("# " + "x" * LARGEST_YAML, "longer than 250,000 bytes; write the questions as a .jsonl file"),
        ("a: b", "is not a list"),
        ("", "holds no questions"),
        ("- a text", "question 1: is not an object"),
        ("- question: b", "question 1: has no id"),
        ("- id: a", r'question 1 \(a\): give either "question"'),
        ("- id: a\n  question: b\n  pargraphs: c", "question 1: unknown key 'pargraphs'"),
        ("- id: a\n  question: b\n- id: a\n  question: c", "two questions have the id a"),
        ("- id: a\n  question: b\n  form: Two Words", r"question 1 \(a\): form is 'Two Words'"),
        ("- id: a\n  question: ' '", "' ' is not a question"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_questions(written(tmp_path / "q.yaml", text))
    assert "q.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"id": "a"', "line 1"),
        ("[1]", "question 1: is not an object"),
        ('{"id": "a", "question": 5}', "5 is not a question"),
        ('{"id": "a", "question": "\\ud800"}', "surrogate"),
        ('{"id": "a", "paraphrases": []}', "give either"),
        ('{"id": "a b", "question": "x"}', "has no id"),
    ],
)
def test_what_is_wrong_in_jsonl_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_questions(written(tmp_path / "q.jsonl", text))


def test_a_form_cannot_take_a_hidden_sets_name() -> None:
    name = hidden_sets()[0]["name"]
    from minipersona.behaviour.questions import Question

    with pytest.raises(UserError, match="name of a shipped prompt set"):
        prompts([Question("a", name, ("b",))], 1, "all")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_questions(str(tmp_path / "none.jsonl"))
