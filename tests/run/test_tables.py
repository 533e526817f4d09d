"""Tables for people to read."""

from __future__ import annotations

from dataclasses import replace

from minipersona.run.result import LayerMeasures
from minipersona.run.tables import extraction_table


def test_a_ratio_to_what_rounding_left_is_not_printed() -> None:
    row = LayerMeasures(
        m1=0.9, m1_ci95=(0.8, 0.95), m1_noise_floor=0.01, centred_cosine=-0.1, shared_mean_share=0.9,
        between_variance=47.5, within_variance=None, effective_rank=2.0, nearest_centroid_accuracy=1.0,
    )  # fmt: skip

    def shown(within: float | None) -> str:
        return extraction_table({"6": replace(row, within_variance=within)}).splitlines()[-1].split()[6]

    assert shown(5.0) == "9.5000"
    assert shown(1e-20) == shown(0.0) == shown(None) == "-"
