"""Text from elsewhere stays text, in HTML and in Markdown, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.conftest import unescaping

from minipersona.report import render
from minipersona.report.blocks import (
    Block,
    Bullets,
    Callout,
    Cell,
    Document,
    Facts,
    Finding,
    Image,
    Paragraph,
    Section,
    Table,
    Verbatim,
)

HOSTILE = [
    "<script>document.title='x'</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</style></script></pre></td></table><svg onload=alert(1)>",
    "&lt;b&gt; &amp; &#60;",
    "a | b\n| c | d |\n|---|---|",
    "![x](https://example.org/x.png) [y](javascript:alert(1)) https://example.org www.example.org a@b.org",
    "# head\n- item\n> quote\n1. one\n***\n---\n`code` *em* _em_ __strong__ ~~gone~~ \\",
    "```\nout of the fence\n````\n",
    "half a pair \ud800 and \u202eback\u202c and \x00\x1b[31m",
]


LONG = 24  # characters; the page lets longer cells break into lines


def every_block(text: str) -> Document:
    """A document with the text in every place that takes one."""
    blocks: list[Block] = [
        Paragraph(text),
        Callout(text, text, "good"),
        Bullets([text, text]),
        Facts([(text, text)]),
        Finding(text, text, "bad", text, text),
        Verbatim(text),
        Table(
            "t", (text, text), [[Cell(text), Cell(text, 1.0)], [Cell(text), Cell(text, tone="open")]], text, pinned=1
        ),
        Image("figure", text, text),
    ]
    return Document(text, [Section(text, "s", blocks)])


class Elements(HTMLParser):
    """The tags and attributes of a page, as a browser's parser finds them, and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(text: str) -> Elements:
    return Elements(render.html(every_block(text), {"figure": b"PNG"}))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_has_the_same_elements_whatever_its_text(text: str) -> None:
    hostile = page(text)
    assert hostile.tags == page("harmless, but long enough to wrap" if len(text) > LONG else "x").tags


@settings(deadline=None)
@given(st.text(min_size=LONG + 1))
def test_no_text_at_all_makes_an_element(text: str) -> None:
    assert page(text).tags == page("harmless, but long enough to wrap").tags


def test_control_unescaped_text_makes_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "Environment", unescaping)
    assert ("img", ("src", "onerror")) in page("<img src=x onerror=alert(1)>").tags


def test_what_is_invisible_is_written_out() -> None:
    shown = page("a\u202eb\x1bc\ud800d").text
    assert "a\\x202eb\\x1bc\\ud800d" in shown


# ---------------------------------------------------------------- Markdown


def structure(text: str) -> list[str]:
    """The Markdown document's tokens, without their text, as a GitHub-like reader sees them."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = []
    for token in reader.parse(text):
        tokens.append(token.type)
        tokens += [child.type for child in token.children or []]
    return tokens


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_has_the_same_structure_whatever_its_text(text: str) -> None:
    assert structure(render.markdown(every_block(text))) == structure(render.markdown(every_block("harmless")))


@settings(deadline=None)
@given(st.text(alphabet="ab1 <>&|\\`*_{}[]()#+-.!~:/@\n'\"=", min_size=1).map(lambda text: text + "z"))
def test_no_text_at_all_makes_markup(text: str) -> None:
    assert structure(render.markdown(every_block(text))) == structure(render.markdown(every_block("harmless")))


@pytest.mark.parametrize("text", HOSTILE[:2] + HOSTILE[5:8])
def test_control_unescaped_text_makes_markup(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "inline", str)
    monkeypatch.setattr(render, "line", str)
    assert structure(render.markdown(every_block(text))) != structure(render.markdown(every_block("harmless")))


@settings(deadline=None)
@given(st.text(alphabet="`~a\n", min_size=1))
def test_a_fence_holds_any_text(text: str) -> None:
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    (token,) = reader.parse(render.fenced(text))
    assert token.type == "fence" and token.content.rstrip("\n") == text.rstrip("\n")


def test_ordinary_text_is_left_as_it_is() -> None:
    text = "M1 < 0.95 and learned >= 0.5 [0.9719, 0.9737] for eval_loss at step-000375 (tulu[0:6000]); -0.0157 +0.2%"
    assert render.inline(text) == text
