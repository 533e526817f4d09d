"""The page in a real browser: its tables sort, and nothing but its own script runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest
from report.conftest import unescaping

from minipersona.report import render
from minipersona.report.blocks import Cell, Document, Image, Paragraph, Section, Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic")  # fmt: skip
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
SCRIPT = "<script>document.title='taken'</script>"
HANDLER = "<img src=x onerror=\"document.title='taken'\">"

VALUES = (0.5, None, 10.0, 9.0)
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
TABLE = Table(
    "recipes",
    ("recipe", "M1"),
    [[Cell("base"), Cell("99", 99.0)]]
    + [[Cell(name), Cell("-" if v is None else str(v), v)] for name, v in zip("bdac", VALUES, strict=True)],
    pinned=1,
)


pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., str]:
    """The document of a page after its scripts have run."""

    def load(page: str, fragment: str = "", width: int = 800) -> str:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        assert BROWSER is not None
        size = f"--window-size={width},1000"
        command = [BROWSER, *FLAGS, profile, size, "--dump-dom", f"{file.as_uri()}{fragment}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    return load


def page(text: str = "") -> str:
    return render.html(Document("the title", [Section("s", "s", [Paragraph(text), TABLE])]), {})


def order(dom: str) -> list[str]:
    return re.findall(r'<th scope="row"[^>]*>(\w+)', dom)


def title(dom: str) -> str:
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found
    return found[1]


@pytest.mark.parametrize(
    "fragment, expected",
    [
        ("", ["base", "b", "d", "a", "c"]),
        ("#sort=recipes,1", ["base", "a", "b", "c", "d"]),
        ("#sort=recipes,2", ["base", "b", "c", "a", "d"]),  # as numbers, 10 after 9; what is unknown comes last
        ("#sort=recipes,2,down", ["base", "a", "c", "b", "d"]),
        ("#sort=recipes,7", ["base", "b", "d", "a", "c"]),
    ],
)
def test_the_address_sorts_a_table_below_its_pinned_rows(
    loaded: Callable[..., str], fragment: str, expected: list[str]
) -> None:
    assert order(loaded(page(), fragment)) == expected


def test_a_click_sorts_and_the_address_keeps_it(loaded: Callable[..., str]) -> None:
    """The clicks are scripted, so this page is let off its policy; the script itself is the report's."""
    click = (
        "<script>addEventListener('load', () => { const head = document.querySelectorAll('th button')[1];"
        "head.click(); head.click(); document.title = location.hash; })</script></body>"
    )
    dom = loaded(POLICY.sub("", page()).replace("</body>", click))
    assert order(dom) == ["base", "a", "c", "b", "d"]
    assert title(dom) == "#sort=recipes,2,down"
    assert 'aria-sort="descending"' in dom


@pytest.mark.parametrize("text", [SCRIPT, HANDLER])
def test_hostile_text_does_nothing(loaded: Callable[..., str], text: str) -> None:
    assert title(loaded(page(text))) == "the title"


@pytest.mark.parametrize("text", [SCRIPT, HANDLER])
def test_the_policy_stops_what_would_slip_through(
    loaded: Callable[..., str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "Environment", unescaping)
    slipped = page(text)
    assert text in slipped
    assert title(loaded(slipped)) == "the title"
    assert title(loaded(POLICY.sub("", slipped))) == "taken"  # the control: without the policy it runs


def test_the_policy_lets_only_the_pages_own_style_and_script_in(loaded: Callable[..., str]) -> None:
    dom = loaded(page(), "#sort=recipes,2")
    assert order(dom)[1] == "b"  # its own script ran
    policy = POLICY.search(dom)
    assert policy and "default-src 'none'" in policy[0] and "unsafe" not in policy[0] and "http:" not in policy[0]
    changed = page().replace("const places", "let places")  # no longer the script that the policy names
    assert order(loaded(changed, "#sort=recipes,1")) == ["base", "b", "d", "a", "c"]


MEASURE = """
<script>addEventListener('load', () => {
  const right = (element) => Math.floor(element.getBoundingClientRect().right);
  const boxes = [...document.querySelectorAll('.scroll')].map((box) => {
    const last = box.querySelector('thead th:last-child, img');
    const before = right(last);
    box.scrollLeft = 1e6;
    return [before > innerWidth, right(last) <= innerWidth];
  });
  const heights = [...document.querySelectorAll('tr > *')].map((cell) => cell.getBoundingClientRect().height);
  document.title = JSON.stringify({
    page: document.documentElement.scrollWidth <= innerWidth, boxes, whole: heights.every(Number.isInteger),
  });
})</script></body>"""


def test_a_narrow_window_scrolls_tables_and_figures_and_not_the_page(loaded: Callable[..., str]) -> None:
    """Their right ends can be reached, and rows are whole pixels high, so that no line is hidden by a sticky cell."""
    cells = [Cell("a name of some length"), *[Cell("FAIL", tone="bad")] * 12]
    table = Table("wide", [f"column {i}" for i in range(13)], [cells, cells], pinned=1)
    blocks = [Paragraph("long" * 100), table, Image("figure", "title", "caption")]
    wide = render.html(Document("the title", [Section("s", "s", blocks)]), {"figure": PIXEL})
    measured = json.loads(title(loaded(POLICY.sub("", wide).replace("</body>", MEASURE), width=420)))
    assert measured == {"page": True, "boxes": [[True, True], [True, True]], "whole": True}
