"""Tables for people to read."""

from __future__ import annotations

from minipersona.run.tables import extraction_table


def test_a_ratio_to_what_rounding_left_is_not_printed() -> None:
    row = {
        "m1": 0.9, "m1_ci95": [0.8, 0.95], "m1_noise_floor": 0.01, "centred_cosine": -0.1, "shared_mean_share": 0.9,
        "between_variance": 47.5, "effective_rank": 2.0, "nearest_centroid_accuracy": 1.0,
    }  # fmt: skip

    def shown(within: float) -> str:
        return extraction_table({"6": {**row, "within_variance": within}}).splitlines()[-1].split()[6]

    assert shown(5.0) == "9.5000"
    assert shown(1e-20) == shown(0.0) == "-"
