"""Errors of measured runs by name: items add up, planted errors are found, and calibration holds for runs left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from typer.testing import CliRunner

from autopar.cli import app
from autopar.errors import InputError
from autopar.estimate import Setting, estimate
from autopar.measurement import Measurement, Span, write_measurement
from autopar.plan import parse_slug
from autopar.validate.attribution import attribute, verdict
from autopar.validate.calibration import calibrate
from autopar.validate.measured_runs import JudgedRun, judge, measurement_files, profile_beside, run_verdict
from costmodels.corrections import corrected, fit_corrections
from costmodels.profiles import Correction, MachineProfile, read_profile

REPORTS = Path(__file__).parents[2] / "reports"
PLANS = ("dp4.z0.mb4", "dp4.z2.mb4", "tp2.dp2.mb8", "tp4.mb16.sp", "pp4.mb2", "pp2.vp2.dp2.mb2", "tp2.pp2.mb4")


@pytest.mark.parametrize("slug", PLANS)
def test_items_add_up_to_both_steps(sample_setting: Setting, measure: Callable[..., Measurement], slug: str) -> None:
    predicted = estimate(sample_setting, parse_slug(slug))
    run = measure(sample_setting, predicted, time=1.2, memory=0.9)
    found = attribute(sample_setting, predicted, run)
    for items in (found.time, found.named):
        assert sum(item.predicted for item in items) == pytest.approx(predicted.step_s)
        assert sum(item.measured for item in items) == pytest.approx(run.median_step_s)
    assert sum(item.difference for item in found.time) / run.median_step_s == pytest.approx(found.error)
    sizes = [abs(item.difference) for item in found.time]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(item.measured for item in found.memory) == pytest.approx(run.peak_bytes)


def longer(run: Measurement, name: str, factor: float) -> Measurement:
    """The run with the spans of one name longer, and everything after them later."""
    ranks = []
    for rank in run.ranks:
        late, spans = 0.0, []
        for span in sorted(rank.spans, key=lambda span: span.start_s):
            more = span.seconds * (factor - 1) if span.name == name else 0.0
            spans.append(dataclasses.replace(span, start_s=span.start_s + late, end_s=span.end_s + late + more))
            late += more
        ranks.append(dataclasses.replace(rank, spans=tuple(spans)))
    grown = max(span.end_s for rank in ranks for span in rank.spans) - max(
        span.end_s for rank in run.ranks for span in rank.spans
    )
    return dataclasses.replace(run, ranks=tuple(ranks), step_s=tuple(step + grown for step in run.step_s))


def test_a_planted_error_is_named(sample_setting: Setting, measure: Callable[..., Measurement]) -> None:
    setting = dataclasses.replace(
        sample_setting, cluster=dataclasses.replace(sample_setting.cluster, link_uses_host=False)
    )
    predicted = estimate(setting, parse_slug("dp4.z0.mb4"))
    run = measure(setting, predicted, noise=0.0)
    assert verdict(attribute(setting, predicted, run)) == "step predicted as measured"
    for name, word in (("all_reduce dp", "all_reduce on dp"), ("0B0", "backward of stage 0")):
        wrong = longer(run, name, 1.5)
        found = attribute(setting, predicted, wrong)
        assert found.error < -0.02
        assert found.time[0].name == word
        assert found.time[0].difference / found.measured_step_s == pytest.approx(found.error, abs=1e-3)
        assert verdict(found) == (
            f"step predicted {-found.error:.0%} too short: {-100 * found.error:.0f} of it {word}"
        )  # fmt: skip


def test_a_reduction_on_the_processors_that_compute_is_one_item_with_the_backward(
    sample_setting: Setting, measure: Callable[..., Measurement]
) -> None:
    predicted = estimate(sample_setting, parse_slug("dp4.z0.mb4"))
    names = {item.name for item in attribute(sample_setting, predicted, measure(sample_setting, predicted)).named}
    assert "backward with all_reduce on dp" in names
    assert not names & {"all_reduce on dp", "backward of stage 0"}


def test_runs_of_other_plans_or_without_spans_are_refused(
    sample_setting: Setting, measure: Callable[..., Measurement]
) -> None:
    predicted = estimate(sample_setting, parse_slug("dp4.z0.mb4"))
    run = measure(sample_setting, predicted)
    with pytest.raises(InputError, match="another plan"):
        attribute(sample_setting, estimate(sample_setting, parse_slug("tp4.mb16")), run)
    bare = dataclasses.replace(run, ranks=tuple(dataclasses.replace(rank, spans=()) for rank in run.ranks))
    with pytest.raises(InputError, match="no spans"):
        attribute(sample_setting, predicted, bare)


@pytest.fixture(scope="module", params=["demo", "runs/emulated"])
def judged(request: pytest.FixtureRequest) -> tuple[MachineProfile, tuple[JudgedRun, ...]]:
    runs, [profile] = judge([REPORTS / request.param / "runs"])
    return read_profile(profile), tuple(run for run in runs if run.measurement.plan.layout.world_size > 1)


def test_calibration_helps_runs_that_it_has_not_seen(judged: tuple[MachineProfile, tuple[JudgedRun, ...]]) -> None:
    profile, runs = judged
    found = calibrate(profile, runs)
    errors = {
        name: mean(abs(getattr(run, name) / run.measured_s - 1) for run in found.runs)
        for name in ("before_s", "after_s", "held_out_s")
    }
    assert errors["after_s"] < errors["held_out_s"] < errors["before_s"]
    assert {c.name for c in found.corrections} >= {"forward", "backward", "optimizer", "all_reduce"}
    assert all(0.5 < c.factor < 2 for c in found.corrections)
    assert found.profile.corrections == found.corrections
    assert all(run.measurement.date in " ".join(found.corrections[0].measurements) for run in runs)
    assert found.profile.compute[0].seconds != profile.compute[0].seconds and not profile.corrections


def test_a_single_run_has_none_to_hold_out(judged: tuple[MachineProfile, tuple[JudgedRun, ...]]) -> None:
    profile, runs = judged
    [run] = calibrate(profile, runs[:1]).runs
    assert run.held_out_s is None
    with pytest.raises(InputError, match="nothing to calibrate"):
        calibrate(profile, ())


def test_factors_are_those_that_made_the_items() -> None:
    """Two parts seen in three items, the second doubled; a third part hardly seen stays as it was."""
    columns = np.array([[10.0, 0.0, 0.0], [0.0, 5.0, 0.0], [8.0, 4.0, 0.001]])
    measured = columns @ np.array([1.0, 2.0, 5.0])
    factors = fit_corrections(columns, measured, np.full(3, 20.0))
    assert factors == pytest.approx([1.0, 2.0, 1.0], abs=0.05)


def test_corrections_scale_points_and_multiply(judged: tuple[MachineProfile, tuple[JudgedRun, ...]]) -> None:
    profile, _ = judged

    def correction(name: str, factor: float) -> Correction:
        return Correction(name=name, factor=factor, measurements=("one",), num_points=1, date="")

    twice = corrected(corrected(profile, [correction("backward", 2.0)]), [correction("backward", 1.5)])
    for before, after in zip(profile.compute, twice.compute, strict=True):
        backward = before.phase == "backward" and before.kind != "optimizer"
        assert after.seconds == pytest.approx(before.seconds * (3.0 if backward else 1.0))
    name = "tensor_parallel.linear.backward"
    assert twice.host_overheads[name] == pytest.approx(3 * profile.host_overheads[name])
    assert [c.factor for c in twice.corrections] == [2.0, 1.5]
    with pytest.raises(InputError, match="unknown part"):
        corrected(profile, [correction("forwards", 2.0)])
    with pytest.raises(InputError, match="twice"):
        corrected(profile, [correction("forward", 2.0)] * 2)


def run_cli(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["validate", *words])
    error = result.exception if result.exception is not None and not isinstance(result.exception, SystemExit) else None
    return result.exit_code, result.stdout, f"{result.stderr}{error or ''}"


def test_validate_says_where_and_writes_traces(tmp_path: Path) -> None:
    one = REPORTS / "demo" / "runs" / "tp2.pp2.vp1.cp1.dp1.z0.mb2.ac-none" / "measurement.json"
    code, text, _ = run_cli(str(one), "-o", str(tmp_path))
    assert code == 0
    assert "of it backward of stage 1" in text and "all_reduce on tp" in text
    trace = json.loads((tmp_path / one.parent.name / "trace.json").read_text())
    processes = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert {"predicted rank 0", "measured rank 0", "measured rank 3"} <= processes
    content = json.loads((tmp_path / "validation.json").read_text())
    [run] = content["runs"]
    assert sum(p - m for p, m in run["time_s"].values()) == pytest.approx(
        run["predicted_step_s"] - run["measured_step_s"]
    )


def test_validate_calibrates_and_overwrites_nothing(tmp_path: Path) -> None:
    runs = [str(path) for path in measurement_files([REPORTS / "runs" / "emulated" / "runs"])[:3]]
    code, text, notes = run_cli(*runs, "--calibrate", "--json")
    assert code == 0 and "nothing was written" in notes
    assert {row["name"] for row in json.loads(text)["corrections"]} >= {"forward", "backward"}
    assert run_cli(*runs, "--calibrate", "-o", str(tmp_path))[0] == 0
    assert read_profile(tmp_path / "profile.json").corrections
    code, _, notes = run_cli(*runs, "--calibrate", "-o", str(tmp_path))
    assert code != 0 and "not overwritten" in notes


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    run = measurement_files([REPORTS / "demo" / "runs"])[0]
    for words, message in (
        ([str(run), "--stack", "autopar-nccl"], "--stack is for published runs"),
        ([str(run), "--profile", "p.json", "--cluster", "cpu:1x4"], "not by both"),
        ([str(tmp_path)], "no measurement.json"),
        (["runs.csv", "--calibrate"], "--calibrate is for measurement.json"),
    ):
        code, _, notes = run_cli(*words)
        assert code != 0 and message in notes
    lonely = tmp_path / "measurement.json"
    lonely.write_text(run.read_text())
    with pytest.raises(InputError, match="name one with --profile"):
        profile_beside(lonely)
    assert profile_beside(run) == REPORTS / "demo" / "profile.json"


def test_a_run_ends_with_a_verdict(tmp_path: Path) -> None:
    run = measurement_files([REPORTS / "demo" / "runs"])[2]
    assert run_verdict(run, {}).startswith("step predicted 14% too short: 10 of it reduce_scatter on dp")
    lonely = tmp_path / "measurement.json"
    lonely.write_text(run.read_text())
    assert run_verdict(lonely, {"step_s": 1.163 * 1.2}) == "step predicted 20% too long\n"
    assert run_verdict(lonely, {}) == ""


def test_named_hardware_instead_of_a_profile(
    tmp_path: Path, sample_setting: Setting, measure: Callable[..., Measurement]
) -> None:
    run = measure(sample_setting, estimate(sample_setting, parse_slug("dp4.z0.mb4")))
    write_measurement(tmp_path / "measurement.json", run)
    [judged_run], profiles = judge([tmp_path / "measurement.json"], cluster="cpu:1x4")
    assert not profiles and judged_run.setting.cluster.name.startswith("cpu")
    assert isinstance(judged_run.measurement.ranks[0].spans[0], Span)
