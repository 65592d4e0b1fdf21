"""The main job, end to end and small: real processes, real text, everything that is predicted held to a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from autopar.demo import DemoOptions, choose, demo, given, plan_layouts, resolve_device, site
from autopar.errors import InputError, PlanError
from autopar.estimate import Setting
from autopar.gpu import SETTINGS, GpuSetting, measure_settings, settings_of
from autopar.measurement import read_measurement
from autopar.model.build import build_graph
from autopar.model.presets import load_preset, preset_names
from autopar.plan import read_plan_file
from autopar.report import write_report
from autopar.workload import Precision, Workload
from costmodels.calibration import read_profile
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack


def question(ranks: int = 4) -> Setting:
    return Setting(
        graph=build_graph(load_preset("demo-gpt"), seq_len=128, precision=Precision.FP32),
        workload=Workload(global_batch=16, seq_len=128, precision=Precision.FP32),
        cluster=load_cluster(f"cpu:1x{ranks}"),
        stack=load_stack("autopar-gloo"),
    )


def ranked(ranks: int = 4):
    return plan_layouts(question(ranks), load_preset("demo-gpt")).best


def test_few_layouts_cover_all_dimensions() -> None:
    candidates = ranked()
    chosen = choose(candidates, 6)
    assert candidates[0] in chosen
    used = {(e.plan.layout.tp > 1, e.plan.layout.pp > 1, e.plan.layout.dp > 1) for e in chosen}
    assert len(used) == 6  # each axis alone, and each pair of axes
    assert len({e.plan.slug for e in choose(candidates, 12)}) == 12
    assert [e.step_s for e in chosen] == sorted(e.step_s for e in chosen)


def test_a_single_rank_has_layouts_too() -> None:
    chosen = choose(ranked(1), 4)
    assert len({(e.plan.microbatch_size, e.plan.recompute) for e in chosen}) == 4


def test_pipelines_have_at_least_four_microbatches() -> None:
    workload = Workload(global_batch=16, seq_len=128, precision=Precision.FP32)
    pipelines = [e.plan for e in ranked() if e.plan.layout.pp > 1]
    assert pipelines and all(plan.num_microbatches(workload) >= 4 for plan in pipelines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emulate": "4xfast"}, "fast"),
        ({"emulate": "4x200mbit", "device": "cuda"}, "--emulate runs on CPUs"),
    ],
)
def test_contradicting_options(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message), site(DemoOptions(out=tmp_path, **options)):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="'gpu' is not auto, cpu or cuda"):
        resolve_device("gpu")


def test_the_command_repeats_the_run() -> None:
    assert DemoOptions(out=Path("reports/demo")).command == "autopar demo -o reports/demo"
    options = DemoOptions(out=Path("out"), emulate="4x200mbit", ranks=8, num_layouts=6, steps=5, quick=True)
    assert options.command == "autopar demo --emulate 4x200mbit --ranks 8 --layouts 6 --steps 5 --quick -o out"
    named = DemoOptions(out=Path("out"), plans=("dp4.mb2", "pp4.mb1"))
    assert named.command == "autopar demo --plan dp4.mb2 --plan pp4.mb1 -o out"


def test_plans_may_be_named() -> None:
    setting, spec = question(), load_preset("demo-gpt")
    found = given(setting, spec, ("dp4.mb4", "pp4.mb2"))
    assert [e.step_s for e in found] == sorted(e.step_s for e in found) and len(found) == 2
    with pytest.raises(PlanError, match="is 2, but there are 4 ranks"):
        given(setting, spec, ("dp2.mb4",))


@pytest.mark.dist
def test_the_demo_predicts_runs_and_reports(tmp_path: Path) -> None:
    options = DemoOptions(out=tmp_path, quick=True, steps=3, rounds=2, num_layouts=4)
    lines: list[str] = []
    messages: list[dict[str, object]] = []
    report = demo(options, lines.append, messages.append)
    assert any("equal to the graph from the numbers" in line for line in lines)
    assert messages
    for comparison in report.validation.comparisons:
        assert comparison.collectives is not None and comparison.collectives.agree, comparison.collectives
        assert abs(comparison.memory_error) < 0.12, (comparison.slug, comparison.memory_error)
    assert report.validation.memory_error_median < 0.05
    assert report.reference is not None
    for measured in report.measurements:
        assert measured.losses == pytest.approx(report.reference.losses, abs=1e-5)
        assert measured.losses[-1] < measured.losses[0] - 0.5
    names = {path.relative_to(tmp_path).as_posix() for path in write_report(report, tmp_path)}
    assert {"index.html", "trace.json", "table.csv", "summary.json", "README.md"} <= names
    page = (tmp_path / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    trace = json.loads((tmp_path / "trace.json").read_text())
    processes = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert any("predicted" in name for name in processes) and any("measured" in name for name in processes)
    assert read_plan_file(tmp_path / "plan.json").slug == report.recommended.plan.slug
    assert read_profile(tmp_path / "profile.json").ranks == 4
    again = demo(dataclasses.replace(options, reuse=True), lines.append, messages.append)
    assert again.validation == report.validation and again.result.considered == report.result.considered
    slug = report.recommended.plan.slug
    assert read_measurement(tmp_path / "runs" / slug / "measurement.json").plan == report.recommended.plan


def test_gpu_settings_are_sound() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) >= 12
    for setting in SETTINGS:
        assert setting.model in preset_names()
        assert setting.global_batch % setting.microbatch == 0
    assert settings_of("all") == SETTINGS
    with pytest.raises(InputError, match="unknown part 'smal'; did you mean 'small'"):
        settings_of("smal")


@pytest.mark.dist
def test_gpu_settings_run_on_a_cpu_as_well(tmp_path: Path) -> None:
    tiny = GpuSetting(part="small", model="demo-gpt", seq_len=64, global_batch=4, microbatch=2)
    results = measure_settings([tiny], tmp_path, "cpu", lambda line: None, lambda message: None)
    [result] = results.results
    assert result.measured_step_s > 0 and result.predicted_bytes == pytest.approx(result.measured_bytes, rel=0.1)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["device"] and content["versions"] and content["results"][0]["name"] == tiny.name
    assert [len(column.cells) for column in results.columns()] == [1] * 8
