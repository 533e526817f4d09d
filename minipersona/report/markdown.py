"""A report in Markdown, as GitHub and CommonMark readers show it. Nothing in its text can turn into markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

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

# A backslash before these shows the character itself. An underscore within a word is no markup, nor is < before a
# space or a bracket that no second one follows. Addresses would turn into links without one.
MARKUP = re.compile(
    r"[\\`*~|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|!(?=\[)|(?<=:)/(?=/)|(?<=\b[wW]{3})\.|(?<=\w)@"
)
AT_LINE_START = re.compile(r"^([-+=#>]|\d+(?=[.)](\s|$)))")


def escape(text: object) -> str:
    """One line of text that Markdown shows as it is, in mid-line."""
    return MARKUP.sub(lambda match: "\\" + match[0], one_line(text))


def line(text: object) -> str:
    """The same where it begins a line, so that it is no heading, list, quotation or rule."""
    return AT_LINE_START.sub(lambda m: m[1] + "\\" if m[1].isdigit() else "\\" + m[1], escape(text))


def fenced(text: str) -> str:
    """`text` between fences longer than any run of backticks in it."""
    text = plain(text).rstrip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def render(document: Document) -> str:
    """The whole file."""
    parts = [f"# {escape(document.title)}"]
    for section in document.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return line(block.text)
        case Callout():
            return f"> **{escape(block.title)}**\n>\n> {line(block.text)}"
        case Bullets():
            return "\n".join(f"- {line(item)}" for item in block.items)
        case Facts():
            return _table(("", ""), [[Cell(name), Cell(value)] for name, value in block.rows])
        case Finding():
            lines = (
                f"**{escape(block.claim)}**",
                f"- Verdict: **{escape(block.verdict)}**",
                f"- Evidence: {escape(block.evidence)}",
                f"- Implication: {escape(block.implication)}",
            )
            return "\n\n".join((lines[0], "\n".join(lines[1:])))
        case Verbatim():
            return fenced(block.text)
        case Table():
            table = _table(block.columns, block.rows)
            return f"{table}\n\n{line(block.caption)}" if block.caption else table
        case Image():
            return (
                f"![{_alternative(block.title)}](figures/{block.name}.png)\n\n"
                f"{line(block.caption)} ([numbers](figures/{block.name}.csv))"
            )


def _alternative(text: str) -> str:
    """The text of an image, where a bracket of its own would end it."""
    return re.sub(MARKUP.pattern + r"|[\[\]]", lambda match: "\\" + match[0], one_line(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    numeric = [any(row[i].key is not None for row in rows) for i in range(len(columns))]
    lines = [
        [escape(column) for column in columns],
        ["---:" if right else "---" for right in numeric],
        *([escape(cell.text) for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
