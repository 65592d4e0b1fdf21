"""Published runs end to end: rows fail alone, JSON has the agreed shape, figures of merit have closed forms."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autopar.cli import run
from autopar.errors import EXIT_OK, EXIT_USAGE
from autopar.fit.problem import Predictions
from autopar.runs import interpret, read_runs
from autopar.validate import bands as bands_of
from autopar.validate.bands import band_of, coverage, fit_bands, quantiles, widening
from autopar.validate.calibrate import calibrate, calibrated_error
from autopar.validate.choices import memory_pairs, sweeps
from autopar.validate.rival import constant_efficiency, ideal_seconds
from autopar.validate.runs import validate_runs
from autopar.validate.study import study
from costmodels.step_bands import BandRule, Bands, load_bands

HEADER = (
    "id,source,model_name,n_layers,hidden,n_heads,ffn_hidden,vocab,seq_len,gpu,n_gpus,gpus_per_node,global_batch,"
    "micro_batch,tp,pp,dp,cp,recompute,dtype,framework,year,iter_time_s,mem_gb_per_gpu"
)
GPT = "GPT,24,2048,16,8192,51200,2048,A100-80GB,8,8,64"
ROWS = (
    f"alpha-001,A,{GPT},2,8,1,1,1,full,fp16,Megatron-LM,2021,10.0,40",
    f"alpha-002,A,{GPT},2,4,2,1,1,full,fp16,Megatron-LM,2021,9.0,",
    f"alpha-003,A,{GPT},2,2,1,4,1,none,fp16,Megatron-LM,2021,,",
    "beta-001,B,Mystery-SSM mamba,24,2048,16,8192,51200,2048,no such device,8,8,64,2,8,1,1,1,full,fp16,x,2021,3.0,7",
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")
    return path


def test_json_has_the_agreed_shape(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", str(runs), "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"schema_version", "rows", "summary"} and found["schema_version"] == 1
    rows = {row["id"]: row for row in found["rows"]}
    assert list(rows) == ["alpha-001", "alpha-002", "alpha-003", "beta-001"]
    wanted = {
        "id", "status", "reason", "measured_s", "predicted_s", "measured_memory_gib", "predicted_memory_gib"
    }  # fmt: skip
    assert all(wanted <= set(row) for row in found["rows"])
    assert rows["alpha-001"]["status"] == "ok" and rows["alpha-001"]["predicted_s"] > 0
    assert rows["alpha-001"]["band_low_s"] < rows["alpha-001"]["predicted_s"] < rows["alpha-001"]["band_high_s"]
    assert rows["alpha-003"]["measured_s"] is None and rows["alpha-003"]["predicted_s"] > 0
    bad = rows["beta-001"]
    assert bad["status"] == "unsupported" and bad["reason"] and bad["predicted_s"] is None
    assert bad["measured_s"] == 3.0 and bad["measured_memory_gib"] == 7.0
    alpha, beta = found["summary"]
    errors = [rows[i]["predicted_s"] / rows[i]["measured_s"] - 1 for i in ("alpha-001", "alpha-002")]
    assert alpha["source"] == "alpha" and alpha["rows"] == 3
    assert alpha["time_mape"] == pytest.approx(100 * np.mean(np.abs(errors)))
    assert alpha["time_bias"] == pytest.approx(100 * np.mean(errors))
    assert alpha["kendall_tau"] in (-1.0, 1.0)
    memory = rows["alpha-001"]["predicted_memory_gib"] / 40 - 1
    assert alpha["memory_mape"] == pytest.approx(100 * abs(memory))
    assert beta["rows"] == 0 and beta["time_mape"] is None and beta["kendall_tau"] is None


def test_tables_files_and_assumptions(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", str(runs), "--assumptions", "-o", str(tmp_path / "out")]) == EXIT_OK
    text = capsys.readouterr().out
    assert "alpha-001" in text and "not predicted" in text and "What the files leave open" in text
    assert max(map(len, text.splitlines())) <= 120
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "unsupported"]
    parts = sum(float(value) for name, value in rows[0].items() if name.endswith("_s") and name[:-2] in _terms(rows[0]))
    assert parts == pytest.approx(float(rows[0]["predicted_s"]), rel=1e-4)
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["schema_version"] == 1


def _terms(row: dict[str, str]) -> set[str]:
    return {name[:-2] for name in row if name.endswith("_s")} - {"measured", "predicted", "band_low", "band_high"}


def test_wrong_usage_is_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", str(tmp_path / "none.csv")]) == EXIT_USAGE
    assert "none.csv" in capsys.readouterr().err
    assert run(["validate", str(runs), "--stack", "megatron-cor"]) == EXIT_USAGE
    assert "megatron-core" in capsys.readouterr().err


def test_stack_overrides_and_files_join(runs: Path) -> None:
    other = validate_runs([runs, runs], stack="torchtitan")
    assert len(other.rows) == 4
    assert {row.stack for row in other.rows if row.supported} == {"torchtitan"}


def test_quantiles_hold_four_of_five() -> None:
    low, high = quantiles(np.linspace(-0.5, 0.5, 99))
    assert (low, high) == pytest.approx((-0.5 + 9 / 98, 0.5 - 9 / 98))
    assert quantiles(np.asarray([0.1, 0.2])) == (0.0, 0.2)
    rng = np.random.default_rng(0)
    cases = [_case(i % 40) for i in range(400)]
    share = coverage(cases, rng.normal(0, 0.1, 400), [i % 40 for i in range(400)])
    assert share == pytest.approx(0.8, abs=0.05)


def test_bands_widen_until_they_hold_models_that_err_alike() -> None:
    rng = np.random.default_rng(1)
    models = [i // 20 for i in range(160)]
    cases, effects = [_case(model) for model in models], rng.normal(0, 0.1, 8)
    residuals = np.asarray([effects[model] for model in models]) + rng.normal(0, 0.005, 160)
    factor = widening(cases, residuals, models)
    assert coverage(cases, residuals, models) < 0.8 <= coverage(cases, residuals, models, widen=factor)
    assert coverage(cases, residuals, models, widen=factor - 0.05) < 0.8
    narrow, wide = (fit_bands(cases, residuals, residuals, widen=w).band[0] for w in (1.0, factor))
    assert np.log(wide.high) == pytest.approx(factor * np.log(narrow.high))


def _case(model: int, stack: str = "s", device: str = "d", experts: int = 0) -> Any:
    return SimpleNamespace(
        stack=stack, cluster=SimpleNamespace(device=SimpleNamespace(name=device)),
        spec=SimpleNamespace(num_experts=experts), id=str(model),
    )  # fmt: skip


def test_bands_widen_with_ignorance_and_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cases = [_case(i) for i in range(50)]
    bands = fit_bands(cases, rng.normal(0, 0.02, 50), rng.normal(0, 0.1, 50))
    path = tmp_path / "bands.toml"
    path.write_text(bands_of.bands_toml(bands))
    read = load_bands(path)
    assert len(read.band) == len(bands.band)
    known, other, unknown = (
        band_of(read, case) for case in (_case(0, "s+v"), _case(0, device="e"), _case(0, "t", experts=8))
    )
    assert known.high - known.low < other.high - other.low < unknown.high - unknown.low
    assert known.low < 1 < known.high
    assert band_of(Bands(band=()), _case(0)).rows == 0
    rule = BandRule(low=0.5, high=2.0, rows=1, origin="x")
    assert (rule.around(3.0).low, rule.around(3.0).high) == (1.5, 6.0)


def test_one_measured_run_calibrates_its_cell_and_no_other() -> None:
    step = np.asarray([1.0, 2.0, 4.0, 1.0])
    once = np.asarray([0.1, 0.1, 0.3, 0.0])
    predictions = Predictions(
        step_s=step, memory_bytes=step, terms={"forward": step - once, "optimizer": once}, items={}
    )  # fmt: skip
    measured = (step - once) * np.asarray([1.3, 1.3, 1.3, 0.7]) + once
    keys = ["a", "a", "a", "b"]
    found = calibrate(predictions, measured, keys, [1])
    assert found[:3] == pytest.approx(measured[:3])
    assert found[3] == 1.0
    assert calibrated_error(predictions, measured, keys) == pytest.approx((0.0, 6))


def test_choices_and_pairs(runs: Path) -> None:
    first, second, third = (interpret(row) for row in read_runs(runs)[:3])
    cases: list[Any] = [first, second, third]
    [sweep] = sweeps(cases, np.asarray([3.0, 2.0, 1.0]), np.asarray([1.0, 2.0, 1.5]))
    assert sweep.regret == pytest.approx(0.5) and sweep.tau == pytest.approx(-1 / 3)
    found = memory_pairs(cases, np.asarray([10.0, 20.0, np.nan]), np.asarray([10.0, 18.0, 5.0]))
    assert [pair.error for pair in found] == pytest.approx([0.25])


def test_the_rival_knows_flops_bubble_and_recomputation(runs: Path) -> None:
    problem = validate_runs([runs]).problem
    ideal = ideal_seconds(problem)
    assert ideal[1] / ideal[0] == pytest.approx(1 + 1 / 32)
    assert ideal[0] / ideal[2] == pytest.approx(4 / 3)
    found = constant_efficiency(ideal, 2.5 * ideal, ["a", "a", "b"])
    assert found == pytest.approx(2.5 * ideal)


def test_a_study_and_its_report(runs: Path, tmp_path: Path) -> None:
    from autopar.fit import Constant
    from autopar.report.validation import write_validation_report

    level = Constant(
        name="devices.a100-80g.matmul.peak_fraction", start=0.8, low=0.4, high=1.0, prior_sigma=0.1, why="level"
    )
    validation = validate_runs([runs])
    found = study(validation, constants=[level])
    assert found.time["alpha"].model_out is not None and found.time["alpha"].rival is not None
    assert found.constants[0].rows == 2
    files = write_validation_report(found, tmp_path / "report")
    assert all(file.stat().st_size for file in files)
    text = (tmp_path / "report" / "README.md").read_text()
    assert "matmul.peak_fraction" in text and "alpha" in text
    for link in ("plots/goals.png", "plots/time-overview.png"):
        assert link in text and (tmp_path / "report" / link).exists()
    nothing = study(dataclasses.replace(validation), constants=[])
    assert nothing.time["alpha"].model_out is None and nothing.bands is None
