"""Layouts too large to run here: one rank of 64, without the others, calls the collectives that the plan expects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopar.estimate import Setting
from autopar.estimate.traffic import expected_collectives
from autopar.measurement import CountedCollective
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.plan import PlanFile, parse_slug, write_plan_file
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.records import from_plain, to_plain
from costmodels.stack import load_stack

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]

RANKS, SEQ, MICROBATCHES = 64, 64, 4
GPT = ModelSpec(
    name="tiny-gpt", num_layers=4, hidden_size=64, num_heads=8, num_kv_heads=8, ffn_size=256, vocab_size=256,
    max_seq_len=SEQ, fused_qkv=False,
)  # fmt: skip
MIXTURE = ModelSpec(
    name="tiny-mixture", num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=4, ffn_size=192, vocab_size=256,
    max_seq_len=SEQ, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
    num_experts=8, top_k=2, expert_ffn_size=64,
)  # fmt: skip
# Gradients are clipped where a number follows.
DENSE = (
    ("dp64.mb1", None), ("dp64.z1.mb1", 1.0), ("dp64.z3.rep8.mb1", None), ("tp8.dp8.z3.mb1", None),
    ("tp2.dp32.z2.mb1.ac-full1.sp", 0.0), ("cp4.dp16.z3.rep4.mb1.ac-full", None), ("tp4.cp2.dp8.mb1.sp", None),
    ("tp4.pp2.dp8.z3.mb1.ac-selective", None), ("tp2.cp2.dp16.z3.mb1.order-tp-dp-cp-pp", None),
    ("cp2.tp2.sp.pp2.dp8.mb2", None), ("tp4.cp2.dp4.pp2.z3.mb1.sp.ac-full", None),
    ("pp2.vp2.dp32.z1.mb1", None), ("pp4.dp16.z3.mb1.sched-zb-h1", None), ("pp2.vp2.dp32.z3.mb1.sched-zb-v", None),
)  # fmt: skip
MIXTURES = (
    ("ep8.dp64.z3.mb1", None), ("tp2.sp.ep4.dp32.mb1", 1.0), ("tp2.sp.ep2.etp2.dp32.z1.mb1", None),
    ("cp2.ep4.pp2.dp16.z3.mb1.ac-full", None),
)  # fmt: skip
CASES = [(GPT, *case) for case in DENSE] + [(MIXTURE, *case) for case in MIXTURES]
WORKER = Path(__file__).with_name("worker_dry_run.py")


def workload(slug: str) -> Workload:
    plan = parse_slug(slug)
    batch = plan.layout.dp * plan.microbatch_size * MICROBATCHES
    return Workload(global_batch=batch, seq_len=SEQ, precision=Precision.FP32)


def run_dry(folder: Path, rank: int, cases: list[tuple[ModelSpec, str, float | None]]) -> dict[str, Any]:
    """What one rank would call under every plan, in a process of its own."""
    job, out = folder / f"job{rank}.json", folder / f"out{rank}.json"
    rows = [
        {"name": slug, "slug": slug, "model": to_plain(spec), "workload": to_plain(workload(slug)), "clip": clip}
        for spec, slug, clip in cases
    ]
    job.write_text(json.dumps({"rank": rank, "cases": rows, "out": str(out)}))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", str(WORKER), str(job)], env=environment, check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What a rank would call, by slug, run once."""
    folder, done = tmp_path_factory.mktemp("dry"), {}

    def get(rank: int) -> dict[str, Any]:
        if rank not in done:
            # The last rank has other stages, experts and shards; two plans of it are enough.
            cases = CASES if rank == 0 else [case for case in CASES if case[1] in LAST_RANK]
            done[rank] = run_dry(folder, rank, cases)
        return done[rank]

    return get


LAST_RANK = ("tp4.cp2.dp4.pp2.z3.mb1.sp.ac-full", "tp2.sp.ep2.etp2.dp32.z1.mb1", "cp2.tp2.sp.pp2.dp8.mb2")


def totals(entries: tuple[CountedCollective, ...]) -> dict[tuple[str, str, int], tuple[int, int]]:
    return {(c.kind, c.axis, c.group_size): (c.count, c.num_bytes) for c in entries}


def expected(spec: ModelSpec, slug: str, rank: int, clip: float | None) -> dict[tuple[str, str, int], tuple[int, int]]:
    question = Setting(
        graph=build_graph(spec, seq_len=SEQ, precision=Precision.FP32), workload=workload(slug),
        cluster=load_cluster(f"cpu:1x{RANKS}"), stack=load_stack("autopar-gloo"),
    )  # fmt: skip
    return totals(expected_collectives(question, parse_slug(slug), norm=clip is not None)[rank])


@pytest.mark.parametrize(
    ("rank", "spec", "slug", "clip"),
    [(0, *case) for case in CASES] + [(RANKS - 1, *case) for case in CASES if case[1] in LAST_RANK],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", str(value)),
)
def test_a_rank_of_64_calls_what_the_plan_expects(
    counted: Callable[[int], dict[str, Any]], rank: int, spec: ModelSpec, slug: str, clip: float | None
) -> None:
    found = counted(rank)[slug]
    assert not isinstance(found, str), found
    entries = tuple(from_plain(CountedCollective, entry, slug) for entry in found)
    assert entries
    assert totals(entries) == expected(spec, slug, rank, clip)


def test_the_comparison_can_fail(counted: Callable[[int], dict[str, Any]]) -> None:
    """Negative control: a plan that differs in one decision alone calls something else."""
    assert expected(GPT, "dp64.z1.mb1", 0, None) != expected(GPT, "dp64.z1.mb1", 0, 1.0)
    assert expected(GPT, "tp4.cp2.dp4.pp2.z3.mb1.sp", 0, None) != expected(GPT, DENSE[10][0], 0, None)


def test_shapes_alone_do_for_a_model_that_is_too_large(tmp_path: Path) -> None:
    """Two blocks of a model of 8 billion weights, of which a rank would hold 1/64."""
    wide = ModelSpec(
        name="wide", num_layers=2, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336, vocab_size=128256,
        max_seq_len=SEQ, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
    )  # fmt: skip
    slug = "tp8.dp8.z3.mb1"
    [found] = run_dry(tmp_path, 0, [(wide, slug, None)]).values()
    assert not isinstance(found, str), found
    entries = tuple(from_plain(CountedCollective, entry, slug) for entry in found)
    assert totals(entries) == expected(wide, slug, 0, None)


def test_check_tells_what_a_rank_calls_and_refuses_what_does_not_run(tmp_path: Path) -> None:
    def check(slug: str, *words: str) -> subprocess.CompletedProcess[str]:
        plan = parse_slug(slug)
        content = PlanFile(slug=plan.slug, model=GPT, workload=workload(slug), plan=plan)
        write_plan_file(tmp_path / "plan.json", content)
        command = [sys.executable, "-W", "ignore", "-m", "autopar", "check", str(tmp_path / "plan.json"), *words]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    found = check("tp2.pp2.dp4.z3.mb1.sp", "--rank", "15", "--json")
    assert json.loads(found.stdout)["agree"], found.stderr
    refused = check("dp4.mb1.ac-selective+op_level")
    assert refused.returncode == 2 and "op_level" in refused.stderr
