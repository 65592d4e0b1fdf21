"""Terminal tables: what is in them, and what a narrow terminal keeps."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console, RenderableType

from autopar.estimate import Estimate, Setting, estimate
from autopar.measurement import Measurement
from autopar.plan import Recompute, ScheduleName, parse_slug
from autopar.report.columns import Column, fitting, html_table, markdown_table
from autopar.report.tables import (
    breakdown_columns,
    memory_columns,
    plan_detail,
    plans_table,
    profile_table,
    search_line,
    validation_table,
)
from autopar.search.exhaustive import SearchResult
from autopar.validate import compare
from costmodels.profiles import MachineProfile


def drawn(table: RenderableType, width: int) -> list[str]:
    """Lines of a table on a terminal of this width."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_plans_fit_and_keep_their_numbers_whole(sample_search: SearchResult, width: int) -> None:
    lines = drawn(plans_table(sample_search.best, width=width, device="rank"), width)
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if "step " in line).split()
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d+ +\d+", line)]
    assert len(rows) == len(sample_search.best)
    # One row per plan and one cell per column: nothing was wrapped or cut (the step's header is two words).
    assert {len(row) for row in rows} == {len(header) - 1}
    for row, found in zip(rows, sample_search.best, strict=True):
        assert row[header.index("MFU") - 1] == f"{100 * found.mfu:.1f}%"
        assert row[header.index("GiB") - 1] == f"{found.memory_gib:.2f}"
    text = "\n".join(lines)
    for found in sample_search.best:
        assert found.plan.slug in text
    assert "no recomputation" in " ".join(text.split()) and "TFLOP/s per rank" in " ".join(text.split())


def test_wide_tables_show_every_column(sample_search: SearchResult) -> None:
    header = next(line for line in drawn(plans_table(sample_search.best, width=120), 120) if "step " in line).split()
    assert header == [
        "#", "tp", "pp", "vp", "cp", "dp", "sharding", "mb", "recompute", "step", header[10], "tok/s/GPU", "TF/s/GPU",
        "MFU", "GiB", "bubble", "comm",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_large_numbers_fit_too(sample_search: SearchResult, width: int) -> None:
    best = sample_search.best[0]
    layout = dataclasses.replace(best.plan.layout, tp=8, pp=16, vp=12, cp=16, dp_replicate=8, dp_shard=64)
    plan = dataclasses.replace(
        best.plan, layout=layout, zero_stage=3, microbatch_size=64, schedule=ScheduleName.INTERLEAVED,
        recompute=Recompute.SELECTIVE, sequence_parallel=True,
    )  # fmt: skip
    large = dataclasses.replace(
        best, plan=plan, step_s=123.4, tokens_per_s_per_gpu=12345.6, model_flops_per_s_per_gpu=1.234e15,
        memory_per_rank=(178.9 * 2**30,),
    )  # fmt: skip
    lines = drawn(plans_table([large], width=width), width)
    assert max(map(len, lines)) <= width
    numbers = next(line for line in lines if line.strip().startswith("1  ")).split()
    for cell in ("16", "512", "ZeRO-3", "123", "178.90"):
        assert cell in numbers


@pytest.mark.parametrize("slug", ["pp4.mb2", "dp4.z3.mb4", "tp2.pp2.mb4.ac-full"])
def test_detail_adds_up(sample_setting: Setting, slug: str) -> None:
    found = estimate(sample_setting, parse_slug(slug))
    for columns in (breakdown_columns(found), memory_columns(found)):
        for column in columns[1:3]:
            *parts, total = (float(cell) for cell in column.cells)
            assert sum(parts) == pytest.approx(total, abs=1e-9)
        assert columns[2].cells[-1] == "100.0"
    amounts, lows, highs = (columns[i].cells for i in (1, 3, 4))
    for low, amount, high in zip(lows, amounts, highs, strict=True):
        assert float(low) <= float(amount) <= float(high)
    lines = drawn(plan_detail(found, width=80), 80)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert found.plan.slug in text
    for assumption in found.assumptions:
        assert assumption in text
    assert len([line for line in lines if re.match(r"^ +\d+( +[\d.]+){3} +[\d.]+%", line)]) == len(
        found.memory_per_rank
    )


@pytest.mark.parametrize("width", [80, 120])
def test_validation_table(sample_estimates: list[Estimate], sample_measurements: list[Measurement], width: int) -> None:
    found = compare(sample_estimates, sample_measurements)
    lines = drawn(validation_table(found, width=width), width)
    assert max(map(len, lines)) <= width
    for comparison in found.comparisons:
        line = next(line for line in lines if line.startswith(comparison.slug + " "))
        assert f"{100 * comparison.error:+.1f}%".replace("-", "−").replace("+0.0", "0.0") in line
    assert f"Kendall tau {found.kendall_tau:.2f}" in " ".join(" ".join(lines).split())


def test_profile_and_search_lines(sample_profile: MachineProfile, sample_search: SearchResult) -> None:
    text = " ".join(" ".join(drawn(profile_table(sample_profile, width=80), 80)).split())
    assert "4 ranks on 2 cores" in text and "matmul" in text and "15.2%" in text
    line = search_line(sample_search)
    assert f"{sample_search.considered:,} plans considered, {sample_search.priced:,} priced one by one" in line
    assert f"{sample_search.feasible:,} of these fit" in line
    for number in sample_search.rejected.values():
        assert f" {number:,} " in line


def test_least_important_columns_go_first() -> None:
    columns = [
        Column(header="name", cells=("abc",), text=True),
        Column(header="first", cells=("1",), drop=1),
        Column(header="second", cells=("2",), drop=2),
        Column(header="third", cells=("3",), drop=2),
    ]
    assert [c.header for c in fitting(columns, 100)] == ["name", "first", "second", "third"]
    assert [c.header for c in fitting(columns, 19)] == ["name", "first", "second"]
    assert [c.header for c in fitting(columns, 18)] == ["name", "first"]
    assert [c.header for c in fitting(columns, 3)] == ["name"]


def test_html_and_markdown_escape_what_they_show() -> None:
    columns = [Column(header="a<b", cells=("<script>", "x|y"), text=True), Column(header="n", cells=("1", "2"))]
    html = html_table(columns, strong=(1,))
    assert "<script>" not in html and "&lt;script&gt;" in html and html.count("<tr class=chosen>") == 1
    assert markdown_table(columns).splitlines() == [
        "| a<b | n |",
        "| --- | ---: |",
        "| <script> | 1 |",
        "| x\\|y | 2 |",
    ]
