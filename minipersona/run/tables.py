"""Results as tables on a terminal; of a run, the untrained base is the first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minipersona.geometry.compare import Comparison
from minipersona.run.judgement import (
    LEAST_DISCRIMINABILITY,
    LEAST_LEARNED,
    LEAST_LEARNED_PERSONAS,
    MEAN_GROWTH_SPREAD,
    MOST_LOSS_RATIO,
    PASS_M1,
    bounds_for,
)
from minipersona.run.result import Checkpoint, LayerMeasures, RunResult

COLUMNS = (
    "step",
    "M1",
    "95% interval",
    "held-out loss",
    "learned",
    "under personas",
    "discriminability",
    "|dtheta|",
    "PASS registered",
    "PASS substantive",
    "",
)


def result_table(result: RunResult) -> str:
    """One line a model, and below them what was measured and the rule that each verdict follows."""
    rows = [_row("base", result.base)]
    rows += [_row("adapter" if row.step is None else str(row.step), row) for row in result.checkpoints]
    return "\n".join([*_aligned([COLUMNS, *rows]), "", *_legend(result)])


def runs_table(results: Mapping[str, RunResult]) -> str:
    """The last step of each run by its name, below the base, and the rules; the runs are `check_side_by_side`'s."""
    columns = ("run", "M1", "95% interval", "separation", "between", "within", "discriminability", "held-out loss",
               "learned", "under personas", "PASS substantive", "")  # fmt: skip
    first = next(iter(results.values()))
    last = {run: result.checkpoints[-1] for run, result in results.items()}
    rows = [_side_by_side("base", first.base, first.base)]
    rows += [_side_by_side(run, row, results[run].base) for run, row in last.items()]
    lines = [
        *_measured(first),
        "separation: (1 - M1) / (1 - M1 of the base); between, within: persona variance as a share of the base's, and "
        "discriminability their ratio",
        *_substantive(),
        *(f"{run}: no pass, {'; '.join(row.shortfalls)}" for run, row in last.items() if row.shortfalls),
    ]
    return "\n".join([*_aligned([columns, *rows]), "", *lines])


def _side_by_side(label: str, row: Checkpoint, base: Checkpoint) -> tuple[str, ...]:
    low, high = row.m1_ci95
    return (
        label,
        f"{row.m1:.4f}",
        f"{low:.4f}-{high:.4f}",
        _number(row.separation, ".2f"),
        _number(row.spread, ".2f"),
        _number(_ratio(row.within_variance, base.within_variance), ".2f"),
        _number(row.discriminability, ".2f"),
        _number(row.eval_loss, ".4f"),
        _number(row.learned, ".2f"),
        _number(row.learned_personas, ".2f"),
        _verdict(row.substantive_pass),
        standing(row),
    )


def extraction_table(layers: Mapping[str, LayerMeasures]) -> str:
    """One line a layer."""
    columns = ("layer", "M1", "95% interval", "noise floor", "centred cosine", "mean's share", "between / within",
               "effective rank", "nearest centroid")  # fmt: skip
    rows = [
        (
            layer,
            f"{row.m1:.4f}",
            "{:.4f}-{:.4f}".format(*row.m1_ci95),
            f"{row.m1_noise_floor:.4f}",
            _number(row.centred_cosine, ".4f"),
            _number(row.shared_mean_share, ".4f"),
            _number(_ratio(row.between_variance, row.within_variance), ".4f"),
            _number(row.effective_rank, ".2f"),
            _number(row.nearest_centroid_accuracy, ".3f"),
        )
        for layer, row in layers.items()
    ]
    return "\n".join(_aligned([columns, *rows]))


def _ratio(between: float | None, within: float | None) -> float | None:
    """None where questions differ by rounding alone, as equal ones do."""
    return between / within if between is not None and within and within > 1e-9 * abs(between) else None


def response_table(lengths: dict[str, dict[str, float]]) -> str:
    """One line a persona: how long its responses were (Method B)."""
    rows = [
        (persona, f"{row['mean']:.1f}", f"{row['shortest']:.0f}", f"{row['longest']:.0f}", f"{row['empty']:.0f}")
        for persona, row in lengths.items()
    ]
    return "\n".join(_aligned([("persona", "response tokens", "shortest", "longest", "empty"), *rows]))


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """What changed from a to b, a line a layer; of one layer alone, a line a persona below."""
    columns = ("layer", "M1 a", "M1 b", "b - a", "95% interval", "p, questions", "p, personas", "Procrustes",
               "spread b / a", "collapse")  # fmt: skip
    rows = [
        (
            str(one.layer),
            f"{one.m1_a:.4f}",
            f"{one.m1_b:.4f}",
            f"{one.m1_difference:+.4f}",
            "{:+.4f} to {:+.4f}".format(*one.m1_difference_interval),
            f"{one.p_questions:.4f}",
            f"{one.p_personas:.4f}",
            _number(one.procrustes, ".4f"),
            _number(one.spread_ratio, ".4f"),
            f"{one.collapse_norm:.4f}",
        )
        for one in comparisons
    ]
    lines = [
        *_aligned([columns, *rows]),
        "",
        "p: permutation tests of b - a; collapse: length of the personas' mean shift, the collapse direction",
    ]
    if len(comparisons) > 1:
        return "\n".join([*lines, "how each persona moved is shown for one layer: add --layer L"])
    shifts = [
        (s.persona, f"{s.norm:.4f}", f"{s.cosine:.4f}", _number(s.collapse_share, ".3f"))
        for one in comparisons
        for s in one.shifts
    ]
    return "\n".join([*lines, "", *_aligned([("persona", "shift", "cosine", "along collapse"), *shifts])])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of right-aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _row(label: str, row: Checkpoint) -> tuple[str, ...]:
    low, high = row.m1_ci95
    return (
        label,
        f"{row.m1:.4f}",
        f"{low:.4f}-{high:.4f}",
        _number(row.eval_loss, ".4f"),
        _number(row.learned, ".2f"),
        _number(row.learned_personas, ".2f"),
        _number(row.discriminability, ".2f"),
        _number(row.delta_norm, ".3f"),
        _verdict(row.registered_pass),
        _verdict(row.substantive_pass),
        standing(row),
    )


def standing(row: Checkpoint) -> str:
    """What the row is besides its passes, in a word or two; often nothing."""
    if row.collapsed:
        return "collapsed"
    if row.mean_growth:
        return "mean growth"
    return "trade-off" if row.trade_off else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(value: bool | None) -> str:
    return {True: "PASS", False: "FAIL", None: "-"}[value]


def _measured(result: RunResult) -> list[str]:
    """What the numbers are of, and the bounds that they are held against."""
    protocol, bounds = result.protocol, bounds_for(result.protocol, result.base.m1)
    kind = "half and 0.3 of the base's separation 1 - M1 are left" if bounds.relative else "as registered"
    return [
        f"M1 at layer {protocol.layer} (stream leaving that block, counted from 0), method {protocol.method}, "
        f"{protocol.persona_set} personas, {protocol.question_set} questions; loss in nats per token",
        f"bounds on M1: {bounds.passing:.4f} and {bounds.collapsed:.4f} ({kind})",
    ]


def _substantive() -> list[str]:
    """The rule that decides, and what is said of an M1 that reaches the second bound."""
    return [
        f"substantive: the interval of M1 lies below the first bound, also without any one persona; learned >= "
        f"{LEAST_LEARNED}, under the measured personas >= {LEAST_LEARNED_PERSONAS}; between / within persona variance "
        f">= {LEAST_DISCRIMINABILITY} of the base's",
        f"collapsed: M1 reaches the second bound; mean growth: it does, but the between-persona variance is still "
        f">= {MEAN_GROWTH_SPREAD} of the base's",
    ]


def _legend(result: RunResult) -> list[str]:
    lines = [
        *_measured(result),
        f"registered: M1 < {PASS_M1} and loss <= {MOST_LOSS_RATIO:g} x baseline's",
        *_substantive(),
    ]
    if result.base.registered_pass:
        lines.append("The untrained base passes the registered rule, so that rule alone shows nothing.")
    if result.baseline is None:
        lines.append(
            "No baseline is known, and without it learned and PASS have no value: finish this run where it is its own "
            "baseline, or name another run with --baseline."
        )
    if result.best is not None:
        lines.append(f"best: step {result.best}")
    elif result.checkpoints and all(row.substantive_pass is False for row in result.checkpoints):
        lines.append(f"best: none passes substantively; the last step: {'; '.join(result.checkpoints[-1].shortfalls)}")
    elif result.checkpoints and (lacking := result.checkpoints[-1].shortfalls):
        lines.append(f"the substantive pass of the last step is open: {'; '.join(lacking)}")
    return lines
