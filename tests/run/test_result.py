"""The records of a run: written and read back, refused in one line where they are damaged, and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipersona.errors import UserError
from minipersona.files import append_jsonl, digest, read_json
from minipersona.records import to_dict, write_record
from minipersona.run.directory import (
    PROBES,
    RESULT,
    append_measurement,
    read_measurements,
    stored_measurement,
)
from minipersona.run.judgement import ABSOLUTE, judge_result
from minipersona.run.provenance import DataSource, Environment, Hardware, Provenance, read_provenance, write_provenance
from minipersona.run.result import Baseline, Checkpoint, MeasurementProtocol, Metrics, RunResult, read_result
from minipersona.run.tables import result_table

PROTOCOL = MeasurementProtocol(
    model="tiny",
    revision=None,
    compute_dtype="float32",
    layer=6,
    layers=(6, 2),
    layer_convention="residual stream leaving decoder block",
    method="A",
    persona_set="shipped",
    persona_digest="p",
    question_set="shipped",
    question_digest="q",
    heldout="tiny:benign[0:2]",
    heldout_digest="h",
    max_tokens=64,
    tokenizer_digest="t",
)
MEASURES: dict[str, Any] = {
    "centred_cosine": None,
    "shared_mean_share": 0.9,
    "between_variance": 2.0,
    "within_variance": 1.0,
    "effective_rank": None,
    "nearest_centroid_accuracy": 0.5,
    "layer": 6,
    "m1_noise_floor": 0.01,
    "m1_by_layer": {"6": 0.9, "2": 0.95},
}
METRICS = Metrics(**MEASURES, m1=0.9, m1_low=0.89, m1_high=0.91, eval_loss=2.0)


def row(step: int | None, m1: float, loss: float | None, **more: Any) -> Checkpoint:
    """A row whose flags are wrong."""
    return Checkpoint(
        **{**MEASURES, "between_variance": 20 * (1 - m1)},
        m1_without=dict.fromkeys("abc", m1),
        persona_loss=loss,
        step=step,
        m1=m1,
        m1_ci95=(m1 - 0.01, m1 + 0.01),
        eval_loss=loss,
        delta_norm=1.0,
        learned=9.0,
        registered_pass=True,
        substantive_pass=True,
        collapsed=True,
        **more,
    )


RESULTS = RunResult(
    protocol=PROTOCOL,
    base=row(0, 0.90, 2.0),
    baseline=Baseline("self", 1.0, 9),
    checkpoints=(row(3, 0.91, 1.4), row(6, 0.92, 1.05), row(9, 0.98, 1.0)),
    best=3,
    gpu_seconds=None,
)


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    adapted = replace(RESULTS, base=row(0, 0.9, None), checkpoints=(row(None, 0.9, None, adapter="a"),), seconds=1.5)
    for result in (RESULTS, adapted, replace(RESULTS, baseline=None)):
        write_record(tmp_path / RESULT, result)
        assert read_result(tmp_path / RESULT, "again") == result


def test_a_key_that_may_be_missing_is_left_out_and_any_other_is_null(tmp_path: Path) -> None:
    write_record(tmp_path / RESULT, replace(RESULTS, baseline=Baseline("runs/b", None), best=None))
    written = read_json(tmp_path / RESULT)
    assert written["best"] is written["gpu_seconds"] is written["baseline"]["eval_loss"] is None
    assert "seconds" not in written and "adapter" not in written["base"] and "step" not in written["baseline"]
    assert to_dict(replace(RESULTS, seconds=0.0))["seconds"] == 0.0  # the control: only the default is left out


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: r.pop("protocol"), "protocol.model is missing"),
        (lambda r: r["checkpoints"][1].pop("m1"), "m1 is missing"),
        (lambda r: r["base"].update(m2=0.5), "unknown result.json key base.m2; did you mean base.m1?"),
        (lambda r: r["base"].update(collapsed=None), "base.collapsed = None: must be true or false"),
        (lambda r: r["base"].update(m1_ci95=[0.1]), "base.m1_ci95 = [0.1]: must be a list of 2"),
        (lambda r: r.update(protocol=3), "protocol must be a table"),
    ],
)
def test_what_is_not_a_result_is_refused_with_the_mend(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    write_record(tmp_path / RESULT, RESULTS)
    changed = read_json(tmp_path / RESULT)
    change(changed)
    (tmp_path / RESULT).write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        read_result(tmp_path / RESULT, "evaluate the run again")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / RESULT}: ") and words in line and line.endswith("; evaluate the run again")


# ---------------------------------------------------------------- measurements


def test_a_measurement_is_found_by_step_and_protocol(tmp_path: Path) -> None:
    assert read_measurements(tmp_path) == []
    base, trained = METRICS.at_step(0, PROTOCOL.digest), METRICS.at_step(4, PROTOCOL.digest, 0.5, learned=1.0)
    for measurement in (base, trained):
        append_measurement(tmp_path, measurement)
    assert read_measurements(tmp_path) == [base, trained]
    assert stored_measurement(tmp_path, 4, PROTOCOL) == trained
    assert stored_measurement(tmp_path, 3, PROTOCOL) is None
    assert stored_measurement(tmp_path, 4, replace(PROTOCOL, max_tokens=65)) is None


def test_a_protocol_s_digest_is_that_of_its_json() -> None:
    assert PROTOCOL.digest == digest(json.loads(json.dumps(to_dict(PROTOCOL))))
    assert PROTOCOL.digest != replace(PROTOCOL, layers=(2, 6)).digest


@pytest.mark.parametrize("line", [{"step": 1}, [], {"step": 1, "m1": "high"}])
def test_a_line_that_is_not_a_measurement_is_named(tmp_path: Path, line: Any) -> None:
    append_measurement(tmp_path, METRICS.at_step(0, PROTOCOL.digest))
    append_jsonl(tmp_path / PROBES, line)
    with pytest.raises(UserError, match=r"probes\.jsonl: line 2: .*; delete that line") as caught:
        read_measurements(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- judged


def test_a_result_is_judged_by_the_losses_given_and_not_by_its_flags() -> None:
    baseline = Baseline("runs/baseline", eval_loss=1.0, persona_loss=1.0)
    judged = judge_result(RESULTS, baseline, ABSOLUTE)
    assert [row.learned for row in judged.checkpoints] == pytest.approx([0.6, 0.95, 1.0])
    assert [row.substantive_pass for row in judged.checkpoints] == [False, True, False]
    assert [row.trade_off for row in judged.checkpoints] == [True, False, False]
    assert [row.collapsed for row in judged.checkpoints] == [False, False, True]
    assert judged.base.learned == 0 and judged.base.registered_pass and not judged.base.substantive_pass
    assert judged.best == 6
    assert judge_result(judged, baseline, ABSOLUTE) == judged
    undecided = judge_result(RESULTS, None, ABSOLUTE)
    assert undecided.best is None and undecided.checkpoints[0].substantive_pass is None
    assert "learned is not known" in undecided.checkpoints[0].shortfalls


def test_a_table_says_by_which_bounds_and_why_not() -> None:
    baseline = Baseline("runs/baseline", eval_loss=1.0, persona_loss=1.0)
    shown = result_table(judge_result(RESULTS, baseline, ABSOLUTE))
    assert "trade-off" in shown and "collapsed" in shown and "best: step 6" in shown
    assert "bounds on M1: 0.9500 and 0.9700 (half and 0.3 of the base's separation 1 - M1 are left)" in shown
    alone = replace(RESULTS, checkpoints=RESULTS.checkpoints[:1])
    shown = result_table(judge_result(alone, baseline, ABSOLUTE))
    assert "best: none passes substantively; the last step: learned is 0.60, less than 0.9" in shown
    shown = result_table(judge_result(alone, None, ABSOLUTE))
    assert "the substantive pass of the last step is open: learned is not known" in shown


# ---------------------------------------------------------------- provenance


def test_a_continued_run_keeps_how_it_began(tmp_path: Path) -> None:
    hardware = Hardware("x86_64", None, None, processes=1, threads=2)
    began = Provenance(
        minipersona="1", code_digest="c", commit=None, versions={"torch": "2"}, hardware=hardware, protocol=PROTOCOL,
        config_digest="d", model={"name": "tiny", "revision": None}, data=(), mixture={"rows": 3, "row_share": 0.5},
    )  # fmt: skip
    write_provenance(tmp_path, began)
    assert read_provenance(tmp_path) == began and "continued" not in read_json(tmp_path / "provenance.json")
    again = replace(began, commit="later", hardware=replace(hardware, processes=2))
    write_provenance(tmp_path, again)
    later = Environment(
        minipersona="1", code_digest="c", commit="later", versions={"torch": "2"}, hardware=again.hardware
    )
    assert read_provenance(tmp_path) == replace(began, continued=(later,))
    write_provenance(tmp_path, began)
    assert len(read_provenance(tmp_path).continued) == 2


def test_a_run_continues_on_what_it_began_with(tmp_path: Path) -> None:
    """Rows or anchors of another file with the same name are refused."""
    hardware = Hardware("x86_64", None, None, processes=1, threads=2)
    rows, asked = (DataSource(name, 3, "a" * 64, None) for name in ("jsonl:rows.jsonl", "asked.jsonl"))
    began = Provenance(
        minipersona="1", code_digest="c", commit=None, versions={}, hardware=hardware, protocol=PROTOCOL,
        config_digest="d", model={"name": "tiny", "revision": None}, data=(rows,), mixture={}, anchors=(asked,),
    )  # fmt: skip
    write_provenance(tmp_path, began)
    other = {"data": (replace(rows, digest="b" * 64),)}, {"anchors": (replace(asked, digest="b" * 64),)}
    for changed in other:
        with pytest.raises(
            UserError, match=r"is not what .* began with \(SHA-256 aaaaaaaa, now bbbbbbbb\); restore it"
        ):
            write_provenance(tmp_path, replace(began, **changed))  # type: ignore[arg-type]
    for protocol, said in (
        (replace(PROTOCOL, weights="b"), "weights"),
        (replace(PROTOCOL, supervise="all"), "supervise"),
    ):
        earlier = replace(began, protocol=replace(PROTOCOL, weights="a"))
        (tmp_path / "provenance.json").unlink()
        write_provenance(tmp_path, earlier)
        with pytest.raises(
            UserError, match=f"{said} is not what .* began with .*; restore it, or choose another --out"
        ):
            write_provenance(tmp_path, replace(began, protocol=replace(protocol, weights=protocol.weights or "a")))
    (tmp_path / "provenance.json").unlink()
    written = replace(began, mixture={"responses_digest": "a"})
    write_provenance(tmp_path, written)
    with pytest.raises(UserError, match=r"data\.responses: the file is not what .* began with"):
        write_provenance(tmp_path, replace(written, mixture={"responses_digest": "b"}))
    # The controls: the same again, and what an earlier version did not record.
    write_provenance(tmp_path, written)
    write_provenance(tmp_path, replace(began, protocol=replace(PROTOCOL, weights="a")))
    assert len(read_provenance(tmp_path).continued) == 2
