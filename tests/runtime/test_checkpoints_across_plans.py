"""Checkpoints go from plan to plan and come back, bit by bit, and training goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import RunError
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

TWO = ("dp2.mb2", "dp2.mb2+zero", "dp2.z1.mb4", "tp2.sp.mb4", "pp2.vp2.mb2", "cp2.z3.mb4")
FOUR = (
    "dp4.mb1", "dp4.z3.rep2.mb1", "dp2.tp2.mb2", "dp2.tp2.z3.sp.mb2", "tp2.pp2.mb2", "dp2.pp2.vp2.z2.mb1.sched-zb-v",
)  # fmt: skip
EXPERTS = ("experts@dp4.ep2.z3.mb1", "experts@dp2.tp2.sp.ep2.mb2", "experts@dp2.pp2.ep2.z2.mb1")
TIED = ("tied@dp2.tp2.z1.mb2", "tied@tp2.pp2.vp2.mb2.sched-zb-v")
TOLERANCE = 1e-5
Action = tuple[str, ...]


def circle(plans: tuple[str, ...], rng: random.Random) -> list[tuple[str, str]]:
    """Pairs in which every plan writes once and reads what another one wrote once."""
    order = rng.sample(plans, len(plans))
    return list(zip(order, (*order[1:], order[0]), strict=True))


def carried(pairs: list[tuple[str, str]]) -> list[Action]:
    """Save under A, load under B, save, load under A; the way back of every other pair."""
    there: list[Action] = [("carry", source, slug) for source, slug in pairs]
    return there + [("back", f"{source}--{slug}", source) for source, slug in pairs[::2]]


@pytest.fixture(scope="module")
def act(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, list[Action]], list[dict[str, Any]]]:
    """Run actions of the worker in order, on a number of ranks, all in one folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})

    def run(ranks: int, actions: list[Action]) -> list[dict[str, Any]]:
        job = folder / f"job{ranks}.json"
        job.write_text(json.dumps({"folder": str(folder), "actions": actions}))
        messages: list[dict[str, Any]] = []
        try:
            launch(
                "worker_checkpoints", job, nodes=[node], ranks_per_node=ranks, out_dir=folder / f"logs{ranks}",
                stall_timeout_s=120, on_message=messages.append,
            )  # fmt: skip
        except RunError as error:
            messages.append({"error": str(error)})
        return messages

    return run


def test_any_plan_reads_what_any_other_wrote(act: Callable[[int, list[Action]], list[dict[str, Any]]]) -> None:
    """On 2 ranks, then on 4 what 2 wrote as well, then on one what 2 and 4 wrote; every loss as in one process."""
    rng = random.Random(7)
    two: list[Action] = [("write", slug) for slug in TWO] + carried(circle(TWO, rng))
    two += [("async", "dp2.z3.mb4"), ("failing", "dp2.z3.mb4"), ("torn", "dp2.z3.mb4"), ("dies", "dp2.z3.mb4")]
    *messages, end = act(2, two)
    assert "rank 1 of 2 exited with code 9" in end["error"], end
    failing, torn = messages[-2]["messages"], messages[-1]["messages"]
    for message in failing[:2]:
        assert "the checkpoint of step 2 was not written: rank 1: File too large" in message
        assert "still holds those of steps 1" in message
    assert "must be JSON" in failing[2] and "but the model has it as F32 [48, 36]" in failing[3]
    assert "was trained with AdamW, but this run uses SGD" in failing[4]
    assert len(torn) == 1 and "rank-00001.safetensors was altered" in torn[0]

    four: list[Action] = [("survives", "dp4.z3.rep2.mb1"), *(("write", slug) for slug in FOUR + EXPERTS + TIED)]
    four += carried(circle(FOUR, rng)) + carried(circle(EXPERTS, rng)) + carried(circle(TIED, rng))
    four += [("carry", *pair) for pair in zip(rng.sample(TWO, 3), rng.sample(FOUR, 3), strict=True)]
    survived, *more = act(4, four)
    # The rank that was left may still have cleaned up before it was ended.
    assert "step-00000002" in survived["left"] and "step-00000003" not in survived["left"], survived
    messages += more

    one: list[Action] = [
        ("write", "mb4"),
        ("write", "experts@mb4"),
        ("write", "tied@mb4"),
        ("carry", EXPERTS[1], "experts@mb8"),
    ]
    one += [("carry", source, "mb8.ac-full") for source in (*rng.sample(TWO, 2), *rng.sample(FOUR, 2))]
    messages += act(1, one)
    assert all("error" not in message for message in messages), messages
    losses = {message["plan"]: message["losses"] for message in messages if "losses" in message}
    assert len(losses) == sum(action[0] in ("write", "carry", "back", "async") for action in two + four + one)
    for plan, found in losses.items():
        if not plan.startswith("async"):
            model = plan.partition("@")[0] + "@" if "@" in plan else ""
            reference = losses[f"{model}mb4"]
            assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) < TOLERANCE, plan
