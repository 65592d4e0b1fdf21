"""What the executor refuses, told before anything starts and without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.errors import InputError, PlanError
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import parse_slug
from autopar.runtime.job import TrainJob, check_job, read_job, write_job
from autopar.runtime.support import check_supported, unsupported, unsupported_workload
from autopar.workload import Precision, Workload

MODEL = load_preset("demo-gpt")
WORKLOAD = Workload(global_batch=16, seq_len=64, precision=Precision.FP32)


@pytest.mark.parametrize(
    ("slug", "microbatches", "message"),
    [
        ("mb1.ac-selective+op_level", 4, "recomputation of op_level alone is not supported"),
        ("dp2.ep2.mb1", 4, "ep=2, but the model has no experts: use ep=1"),
        ("mb1.sp", 4, "use tp>=2 or drop sp"),
        ("tp2.sp.mb1.ac-selective+layernorm", 4, "drop layernorm or sp"),
        ("tp16.mb1", 4, "does not divide the query heads, 8"),
        ("pp16.mb1", 16, "16 stages for 8 blocks"),
        ("pp2.mb1.split-3-4", 4, "adds up to 7 of 8 blocks"),
        ("pp2.vp2.mb1.sched-dualpipe-v", 3, "at least 4 microbatches, not 3: use a smaller microbatch or sched-zb-v"),
    ],
)
def test_refusals_say_what_to_use(slug: str, microbatches: int, message: str) -> None:
    with pytest.raises(PlanError, match="cannot be run here") as caught:
        check_supported(parse_slug(slug), MODEL, microbatches)
    assert message in str(caught.value)


def test_refusals_of_models() -> None:
    fused = dataclasses.replace(MODEL, fused_qkv=True)
    tied = dataclasses.replace(MODEL, tied_embeddings=True)
    assert not unsupported(parse_slug("tp2.mb1"), fused) and not unsupported(parse_slug("pp2.tp2.mb1"), tied)
    assert [r.reason for r in unsupported(parse_slug("dp2.tp2.mb1"), tied)] == ["tied embeddings"]
    for slug in ("dp2.tp2.z1.mb1", "dp2.mb1", "tp2.mb1", "dp2.tp2.pp2.mb1"):
        assert not unsupported(parse_slug(slug), tied), slug
    assert [r.reason for r in unsupported(parse_slug("mb1"), dataclasses.replace(MODEL, qk_norm=True))] == ["model"]
    for precision in (Precision.FP16, Precision.FP8, Precision.NVFP4):
        assert unsupported_workload(dataclasses.replace(WORKLOAD, precision=precision))
    assert not unsupported_workload(dataclasses.replace(WORKLOAD, precision=Precision.BF16))


MIXTURE = dataclasses.replace(MODEL, num_experts=6, top_k=2, expert_ffn_size=100, shared_ffn_size=90)


@pytest.mark.parametrize(
    ("slug", "model", "message"),
    [
        ("dp4.ep4.mb1", MIXTURE, "ep=4 does not divide the experts, 6"),
        ("dp8.etp8.mb1", MIXTURE, "etp=8 does not divide the experts' width, 100"),
        ("tp2.mb1", MIXTURE, "send every token to the experts 2 times: use sp"),
        ("tp4.sp.mb1", MIXTURE, "tp=4 does not divide the shared expert's width, 90"),
        ("dp4.z3.rep2.ep4.mb1", dataclasses.replace(MIXTURE, num_experts=8), "reach over the rep2 replicas"),
    ],
)
def test_refusals_of_experts(slug: str, model: ModelSpec, message: str) -> None:
    details = [found.detail for found in unsupported(parse_slug(slug), model)]
    assert any(message in detail for detail in details), details


def test_experts_that_run_are_not_refused() -> None:
    for slug in ("mb1", "dp2.ep2.mb1", "dp4.ep2.etp2.z3.mb1", "tp2.dp2.sp.ep2.mb1", "dp2.pp2.ep2.mb1"):
        assert unsupported(parse_slug(slug), MIXTURE) == (), slug


@pytest.mark.parametrize(
    "slug",
    [
        "mb1",
        "dp4.mb1",
        "dp4.z3.mb1.ac-full",
        "dp4.z1.mb1",
        "cp2.mb1",
        "tp2.pp2.dp2.z2.mb1.sp",
        "pp2.vp2.dp2.z2.mb1",
        "pp2.vp2.dp2.mb1",
        "pp2.mb1.sched-zb-h1.ac-full",
        "pp2.vp2.dp2.z3.mb1.sched-dualpipe-v",
        "pp10.mb1.split-0-1x8-0",
    ],
)
def test_what_runs_is_not_refused(slug: str) -> None:
    assert unsupported(parse_slug(slug), MODEL, 4) == ()


def job(**changes: object) -> TrainJob:
    fields: dict[str, object] = {
        "model": MODEL, "workload": WORKLOAD, "plans": (parse_slug("dp2.mb4"),), "steps": 3, "out_dir": "out",
    }  # fmt: skip
    return TrainJob(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": ()}, "at least one plan"),
        ({"steps": 0}, "steps>=1"),
        ({"warmup": 1}, "warmup>=2"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"model": dataclasses.replace(MODEL, vocab_size=100)}, "vocab_size is at least 256"),
        ({"workload": dataclasses.replace(WORKLOAD, seq_len=512)}, "longer than the 256 positions"),
        ({"workload": dataclasses.replace(WORKLOAD, precision=Precision.FP16)}, "use bf16 or fp32"),
        ({"plans": (parse_slug("dp2.mb4"), parse_slug("dp2.mb4"))}, "names a plan twice"),
        ({"plans": (parse_slug("dp4.mb4"),)}, "is for 4 ranks, but there are 2"),
        ({"plans": (parse_slug("dp2.mb3"),)}, "does not divide the global batch of 16"),
        ({"plans": (parse_slug("tp2.sp.mb4"),), "workload": dataclasses.replace(WORKLOAD, seq_len=63)}, "63 tokens"),
        ({"plans": (parse_slug("tp2.mb4.ac-selective+op_level"),)}, "cannot be run here"),
    ],
)
def test_impossible_jobs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_job(job(**changes), 2)
    assert message in str(caught.value)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    check_job(job(), 2)
    write_job(tmp_path / "job.json", job())
    assert read_job(tmp_path / "job.json") == job()


def test_asking_and_launching_import_no_torch() -> None:
    modules = "autopar.runtime.support, autopar.runtime.run, autopar.runtime.launch.launcher"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
