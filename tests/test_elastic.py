"""Training that loses ranks: struck again and again it ends as if nothing had been; with fewer ranks it goes on."""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autopar.elastic import Ranks, fewer, is_machines, plan_for, train_on_what_is_left
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, PlanFile, parse_slug
from autopar.runtime.job import Logging, RateSchedule, Saving, Training, TrainJob
from autopar.runtime.launch.diagnosis import Fault, RunFault
from autopar.runtime.launch.nodes import Node
from autopar.runtime.launch.progress import RUNNING, read_statuses
from autopar.runtime.outcome import Outcome
from autopar.runtime.run import run_training
from autopar.workload import Precision, Workload
from costmodels.hardware import Cluster, load_cluster

STEPS = 24
TINY = ModelSpec(
    name="tiny-gpt", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256,
    max_seq_len=32, fused_qkv=False,
)  # fmt: skip
WORKLOAD = Workload(global_batch=8, seq_len=32, precision=Precision.FP32)
STACK = "autopar-gloo"


def content(slug: str) -> PlanFile:
    plan = parse_slug(slug)
    return PlanFile(slug=plan.slug, model=TINY, workload=WORKLOAD, plan=plan)


def local_nodes(number: int) -> tuple[Node, ...]:
    return tuple(Node(index=i, address="127.0.0.1") for i in range(number))


def hardware(ranks: Ranks) -> Cluster:
    return load_cluster(f"cpu:{len(ranks.nodes)}x{ranks.ranks_per_node}")


def shape(ranks: Ranks) -> tuple[list[int], int]:
    return [node.index for node in ranks.nodes], ranks.ranks_per_node


def test_what_is_left() -> None:
    one = Ranks(nodes=local_nodes(1), ranks_per_node=4)
    assert [shape(left) for left in fewer(one, 2)] == [([0], 3), ([0], 2), ([0], 1)]
    three = Ranks(nodes=local_nodes(3), ranks_per_node=2)
    assert [shape(left) for left in fewer(three, 3)] == [([0, 2], 2), ([0], 2), ([0], 1)]
    assert next(shape(left) for left in fewer(three, 0)) == ([1, 2], 2)
    assert next(shape(left) for left in fewer(three, None)) == ([0, 1], 2)


def test_faults_of_the_machine_and_of_the_program() -> None:
    assert is_machines(Fault(what="rank 1 was killed", rank=1))
    assert is_machines(Fault(what="rank 1 failed", rank=1, error="RuntimeError: CUDA error: device lost"))
    assert not is_machines(Fault(what="rank 1 failed", rank=1, error="ValueError: bad luck"))


def test_plans_for_fewer_ranks_are_ones_that_run() -> None:
    for ranks in (1, 2, 3):
        plan = plan_for(content("dp4.mb2"), load_cluster(f"cpu:1x{ranks}"), STACK)
        assert plan.layout.world_size == ranks
        assert WORKLOAD.global_batch % (plan.layout.dp * plan.microbatch_size) == 0


def fails(times: int, fault: Fault) -> Any:
    tried: list[tuple[Plan, int]] = []

    def run(plan: Plan, ranks: Ranks) -> list[tuple[Plan, int]]:
        tried.append((plan, ranks.number))
        if len(tried) <= times:
            raise RunFault(fault)
        return tried

    return run


def test_it_goes_on_until_too_few_are_left() -> None:
    killed = Fault(what="rank 2 of 4 was killed", rank=2)
    told: list[dict[str, Any]] = []
    common: Any = {"cluster_of": hardware, "stack": STACK, "on_message": told.append}
    four, plan = Ranks(nodes=local_nodes(2), ranks_per_node=2), content("dp4.mb2")
    tried = train_on_what_is_left(plan, four, least=1, run=fails(2, killed), **common)
    assert [ranks for _, ranks in tried] == [4, 2, 1]
    assert all(plan.layout.world_size == ranks for plan, ranks in tried)
    assert told[0]["what"] == "rank 2 of 4 was killed: going on without node 1" and told[0]["ranks"] == 2
    assert told[1]["what"].endswith("going on without 1 of 2 ranks")
    with pytest.raises(RunFault):
        train_on_what_is_left(plan, four, least=2, run=fails(2, killed), **common)
    with pytest.raises(RunFault):
        wrong = Fault(what="rank 0 failed", rank=0, error="ValueError: bad luck")
        train_on_what_is_left(plan, four, least=1, run=fails(1, wrong), **common)


def train_job(plan: Plan, out: Path) -> TrainJob:
    return TrainJob(
        model=TINY, workload=WORKLOAD, plans=(plan,), steps=STEPS, out_dir=str(out), clip=1.0,
        training=Training(
            rate=RateSchedule(), saving=Saving(every_steps=4), logging=Logging(every=1), self_check=False
        ),
    )  # fmt: skip


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def kill_at(out: Path, rank: int, step: int) -> threading.Thread:
    def wait_and_kill() -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end:
            status = read_statuses(out, 4).get(rank)
            if status is not None and status.state == RUNNING and status.step >= step:
                os.kill(status.pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_four_ranks_become_two(tmp_path: Path) -> None:
    """A rank of the second node is killed for good: the first node goes on under a new plan, as one process would."""
    out, told = tmp_path / "run", list[dict[str, Any]]()

    def run(plan: Plan, ranks: Ranks) -> Outcome:
        return run_training(
            train_job(plan, out), nodes=ranks.nodes, ranks_per_node=ranks.ranks_per_node, stall_timeout_s=60
        )[0]

    striker = kill_at(out, 3, 6)
    ended = train_on_what_is_left(
        content("dp4.z2.mb1"), Ranks(nodes=local_nodes(2), ranks_per_node=2), least=2, cluster_of=hardware, run=run,
        stack=STACK, on_message=told.append,
    )  # fmt: skip
    striker.join()
    assert [(m["event"], m["ranks"]) for m in told] == [("replan", 2)]
    assert told[0]["what"].startswith("rank 3 of 4 was killed by SIGKILL") and ended.plan == told[0]["slug"]
    assert ended.first_step >= 4 and ended.first_step % 4 == 0 and ended.steps_done == STEPS
    alone = tmp_path / "alone"
    run_training(train_job(parse_slug("mb8"), alone), nodes=local_nodes(1), ranks_per_node=1, stall_timeout_s=60)
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)
    assert len(losses(out)) == STEPS


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_struck_runs_end_with_the_same_losses(tmp_path: Path) -> None:
    """Three kills and a hang in one run of three ranks; ``benchmarks/faults.py`` does twenty."""
    faults = load_benchmark("faults")
    plan = parse_slug("dp3.z2.mb2")
    strikes = faults.draw(random.Random(1), 3, 4, 0)
    assert [strike.kind for strike in strikes] == ["SIGKILL", "SIGKILL", "SIGSTOP", "SIGKILL"]
    undisturbed = faults.train(plan, tmp_path / "alone", (), 20.0)
    assert faults.train(plan, tmp_path / "struck", strikes, 20.0) == undisturbed
    assert len(undisturbed) == faults.STEPS
    for strike in strikes:
        what = "is stopped" if strike.kind == "SIGSTOP" else "was killed by SIGKILL"
        assert f"rank {strike.rank} of 3 {what}" in strike.told


def load_benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
