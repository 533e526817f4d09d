"""A report as one HTML page and as Markdown. In neither can its text turn into markup.

The page needs no other file. Jinja2 escapes everything that page.html.j2 shows. If something slipped through, the
page's content security policy would still stop it: the browser runs no script and applies no style but the page's own
two, named by their SHA-256, and loads nothing from anywhere (W3C, Content Security Policy Level 3).
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

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
    Table,
    Verbatim,
    one_line,
    plain,
)

HERE = Path(__file__).parent

# ---------------------------------------------------------------- HTML


def html(document: Document, figures: Mapping[str, bytes]) -> str:
    """The page; `figures` holds the PNG of each `Image` by its name."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"verbatim": _verbatim, "sha256": _sha256}
    return environment.get_template("page.html.j2").render(
        document=document,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        images={name: Markup(b64encode(png).decode("ascii")) for name, png in figures.items()},
    )


def _finalize(value: object) -> object:
    """What Jinja2 escapes and writes in place of a value: one line of visible characters, unless it is markup."""
    return value if isinstance(value, Markup) else one_line(value)


def _verbatim(text: str) -> Markup:
    return escape(plain(text))


def _sha256(text: str) -> str:
    """The hash by which a content security policy names an inline script or style."""
    return b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# ---------------------------------------------------------------- Markdown

# A backslash before one of these shows the character itself. An underscore within a word is not markup, and neither is
# < before a space or a bracket that no second bracket follows. Addresses would become links without a backslash.
MARKUP = re.compile(
    r"[\\`*~|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|!(?=\[)|(?<=:)/(?=/)|(?<=\b[wW]{3})\.|(?<=\w)@"
)
AT_LINE_START = re.compile(r"^([-+=#>]|\d+(?=[.)](\s|$)))")


def markdown(document: Document) -> str:
    """The document as GitHub and CommonMark readers show it."""
    parts = [f"# {inline(document.title)}"]
    for section in document.sections:
        parts += [f"## {inline(section.title)}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def inline(text: object) -> str:
    """One line of text that Markdown shows as it is, within a line."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def line(text: object) -> str:
    """The same at the start of a line, where it must not become a heading, list, quotation or rule."""
    return AT_LINE_START.sub(lambda m: m[1] + "\\" if m[1].isdigit() else "\\" + m[1], inline(text))


def fenced(text: str) -> str:
    """`text` between fences longer than any run of backticks in it."""
    text = plain(text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _markdown(block: Block) -> str:
    match block:
        case Paragraph(text):
            return line(text)
        case Callout(title, text):
            return f"> **{inline(title)}**\n>\n> {line(text)}"
        case Bullets(items):
            return "\n".join(f"- {line(item)}" for item in items)
        case Facts(rows):
            return _table(Table("", ("", ""), [[Cell(name), Cell(value)] for name, value in rows]))
        case Finding():
            rows = (("Verdict", f"**{inline(block.verdict)}**"), ("Evidence", inline(block.evidence)),
                    ("Implication", inline(block.implication)))  # fmt: skip
            return f"**{inline(block.claim)}**\n\n" + "\n".join(f"- {name}: {value}" for name, value in rows)
        case Verbatim(text):
            return fenced(text)
        case Table():
            return _table(block) + (f"\n\n{line(block.caption)}" if block.caption else "")
        case Image(name, title, caption):
            alternative = re.sub(MARKUP.pattern + r"|[\[\]]", r"\\\g<0>", one_line(title))  # a bracket would end it
            return f"![{alternative}](figures/{name}.png)\n\n{line(caption)} ([numbers](figures/{name}.csv))"


def _table(table: Table) -> str:
    lines: list[Sequence[str]] = [
        [inline(column) for column in table.columns],
        ["---:" if numeric else "---" for numeric in table.numeric],
        *([inline(cell.text) for cell in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
