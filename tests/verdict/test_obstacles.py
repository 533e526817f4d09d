"""How what stands against H_null is listed; what stands against it is in test_fooled.py and test_verdict.py."""

from __future__ import annotations

import pytest

from minipersona.verdict.obstacles import listed


@pytest.mark.parametrize(
    "count, said", [(1, "r0"), (3, "r0, r1, r2"), (4, "r0, r1, r2 and 1 more"), (9, "r0, r1, r2 and 6 more")]
)
def test_names_beyond_the_first_are_counted(count: int, said: str) -> None:
    assert listed([f"r{number}" for number in range(count)], 3) == said
