"""Compiled blocks: the same losses and collectives as without, and refusals told beforehand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from autopar.errors import PlanError
from autopar.measurement import Measurement
from autopar.model.presets import load_preset
from autopar.plan import parse_slug
from autopar.runtime.job import TrainJob, check_job
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.run import run_plans
from autopar.runtime.support import unsupported_compiled
from autopar.workload import Precision, Workload

MODEL = dataclasses.replace(load_preset("demo-gpt"), name="small", num_layers=4, hidden_size=64, ffn_size=256)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("tp2.mb1", "tp=2 communicates inside blocks"),
        ("cp2.tp2.mb1", "tp=2, cp=2 communicates"),
        ("pp2.mb1.sched-zb-h1", "takes backward of a block apart"),
        ("pp2.vp2.mb1.sched-zb-v", "use 1f1b, interleaved or gpipe"),
        ("mb1.ac-selective+layernorm", "recomputing layernorm reaches into compiled blocks"),
    ],
)
def test_refusals_say_what_to_use(slug: str, message: str) -> None:
    plan = parse_slug(slug)
    assert message in "; ".join(reason.detail for reason in unsupported_compiled(plan))
    with pytest.raises(PlanError, match="cannot be compiled"):
        check_job(job_of(Path(), Precision.FP32, slug, compiled=True), plan.layout.world_size)
    check_job(job_of(Path(), Precision.FP32, slug, compiled=False), plan.layout.world_size)


@pytest.mark.parametrize(
    "slug", ["dp4.mb1", "dp2.pp2.z2.mb1", "dp4.z3.rep2.mb1.ac-full", "pp2.vp2.mb1", "mb1.ac-selective"]
)
def test_what_is_between_blocks_is_allowed(slug: str) -> None:
    assert not unsupported_compiled(parse_slug(slug))


def job_of(out: Path, precision: Precision, *slugs: str, compiled: bool) -> TrainJob:
    return TrainJob(
        model=MODEL, workload=Workload(global_batch=8, seq_len=32, precision=precision),
        plans=tuple(parse_slug(slug) for slug in slugs), steps=2, out_dir=str(out), compiled=compiled,
    )  # fmt: skip


def losses(out: Path, precision: Precision, ranks: int, *slugs: str, compiled: bool) -> tuple[Measurement, ...]:
    job = job_of(out, precision, *slugs, compiled=compiled)
    return run_plans(job, nodes=(local_node(),), ranks_per_node=ranks, stall_timeout_s=400)


@needs_compiler
@pytest.mark.dist
@pytest.mark.parametrize(
    ("precision", "ranks", "slugs", "tolerance"),
    [
        (Precision.FP32, 2, ("dp2.mb2", "dp2.z2.mb2", "dp2.z3.mb1.ac-full", "pp2.mb2"), 1e-5),
        (Precision.BF16, 1, ("mb4",), 1e-2),
        (Precision.BF16, 2, ("dp2.mb2", "pp2.mb2"), 1e-2),
    ],
)
def test_compiled_blocks_learn_the_same(
    tmp_path: Path, precision: Precision, ranks: int, slugs: tuple[str, ...], tolerance: float
) -> None:
    plain = losses(tmp_path / "plain", precision, ranks, *slugs, compiled=False)
    compiled = losses(tmp_path / "compiled", precision, ranks, *slugs, compiled=True)
    for wanted, found in zip(plain, compiled, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=tolerance), found.slug
        assert [r.collectives for r in found.ranks] == [r.collectives for r in wanted.ranks], found.slug
