"""A report as one HTML file that needs nothing beside it and can do nothing but sort its tables.

Everything that is shown passes through `html.escape`. Should something slip through all the same, the page's content
security policy lets the browser run no script and use no style but the page's own two, named by their SHA-256,
and load nothing from anywhere (W3C, Content Security Policy Level 3).
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape as escape_markup
from pathlib import Path

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
    Tone,
    Verbatim,
    one_line,
    plain,
)

HERE = Path(__file__).parent
LONG = 24  # characters; longer cells may break into lines


def escape(text: object) -> str:
    """One line of text, safe between tags and within a quoted attribute."""
    return escape_markup(one_line(text), quote=True)


def render(document: Document, figures: Mapping[str, bytes]) -> str:
    """The whole page; `figures` holds the PNG of each `Image` by its name."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{escape(s.anchor)}">{escape(s.title)}</a></li>' for s in document.sections)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(document.title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{escape(document.title)}</h1></header>",
            f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
            "<main>",
            *(_section(section, figures) for section in document.sections),
            "</main>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        )
    )


def _source(text: str) -> str:
    """The policy's name for an inline script or style."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _section(section: Section, figures: Mapping[str, bytes]) -> str:
    blocks = "\n".join(_block(block, figures) for block in section.blocks)
    return f'<section id="{escape(section.anchor)}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, figures: Mapping[str, bytes]) -> str:
    match block:
        case Paragraph():
            return f"<p>{escape(block.text)}</p>"
        case Callout():
            return f'<div class="callout {block.tone}"><h3>{escape(block.title)}</h3><p>{escape(block.text)}</p></div>'
        case Bullets():
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
        case Facts():
            rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in block.rows)
            return f'<dl class="facts">{rows}</dl>'
        case Finding():
            return (
                f'<div class="finding"><h3>{escape(block.claim)} {_badge(block.verdict, block.tone)}</h3>'
                f"<p><b>Evidence.</b> {escape(block.evidence)}</p>"
                f"<p><b>Implication.</b> {escape(block.implication)}</p></div>"
            )
        case Verbatim():
            return f"<pre>{escape_markup(plain(block.text), quote=True)}</pre>"
        case Table():
            return _table(block)
        case Image():
            data = b64encode(figures[block.name]).decode("ascii")
            return (
                f'<figure id="figure-{block.name}"><img alt="{escape(block.title)}" src="data:image/png;base64,{data}">'
                f"<figcaption><b>{escape(block.title)}.</b> {escape(block.caption)}</figcaption></figure>"
            )


def _badge(text: str, tone: Tone) -> str:
    return f'<span class="badge {tone}">{escape(text)}</span>'


def _table(table: Table) -> str:
    numeric = [any(row[i].key is not None for row in table.rows) for i in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{_class("number" if right and i else "")}>'
        f'<button type="button">{escape(column)}</button></th>'
        for i, (column, right) in enumerate(zip(table.columns, numeric, strict=True))
    )
    pinned = "\n".join(_row(row, numeric) for row in table.rows[: table.pinned])
    free = "\n".join(_row(row, numeric) for row in table.rows[table.pinned :])
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable" id="{escape(table.name)}">\n'
        f"<thead><tr>{heads}</tr></thead>\n"
        + (f'<tbody class="pinned">\n{pinned}\n</tbody>\n' if table.pinned else "")
        + f'<tbody class="free">\n{free}\n</tbody></table></div>{caption}'
    )


def _row(row: Sequence[Cell], numeric: Sequence[bool]) -> str:
    cells = []
    for i, (cell, right) in enumerate(zip(row, numeric, strict=True)):
        text = _badge(cell.text, cell.tone) if cell.tone else escape(cell.text)
        key = f' data-key="{cell.key!r}"' if cell.key is not None else (' data-key=""' if right else "")
        kind = "number" if right else "long" if len(cell.text) > LONG else ""
        cells.append(f'<th scope="row"{key}>{text}</th>' if i == 0 else f"<td{_class(kind)}{key}>{text}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
