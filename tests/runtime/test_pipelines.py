"""Every pipeline schedule trains like one process, alone and with the other dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from autopar.errors import PlanError
from autopar.measurement import Measurement
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build
from autopar.plan import V_SCHEDULES, parse_slug
from autopar.runtime.job import INSPECTED_STEPS, LEAST_WARMUP, TrainJob
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.parallel.mesh import EMBEDDING_AXIS
from autopar.runtime.parallel.parts import find_parts
from autopar.runtime.run import run_plans
from autopar.runtime.support import unsupported
from autopar.schedule.actions import build_schedule
from autopar.workload import Optimizer, Precision, Workload
from tests.runtime.test_layouts import difference, one_process

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

MODEL = ModelSpec(
    name="deep-gpt", num_layers=8, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256,
    max_seq_len=32, fused_qkv=False,
)  # fmt: skip
BATCH, SEQ, TOLERANCE = 16, 32, 1e-5
STEPS = LEAST_WARMUP + INSPECTED_STEPS + 1
# Adam hardly sees a gradient that is wrong by a factor; plain gradient descent does.
RATE = 0.3
PLANS = {
    2: (
        "pp2.vp2.mb2.sched-zb-v", "pp2.vp2.mb4.sched-dualpipe-v", "pp2.mb2.sched-zb-h2", "pp2.mb2.sched-zb-h1.ac-full",
        "pp2.vp4.mb16", "pp2.mb4.sched-zb-h1.split-0-8",
    ),
    4: (
        "pp4.vp2.mb2.sched-zb-v", "pp4.vp2.mb2.sched-dualpipe-v.split-0-1-1-2-2-1-1-0", "pp4.mb8.split-0-4-4-0",
        "pp4.vp2.mb4",
        "dp2.pp2.vp2.mb2", "dp2.pp2.vp2.z3.mb2", "dp2.pp2.z3.mb2.sched-gpipe.ac-full",
        "dp2.pp2.mb2.sched-zb-h1", "dp2.pp2.z2.mb2.sched-zb-h2", "dp2.pp2.z3.mb2.sched-zb-h1",
        "dp2.pp2.vp2.mb2.sched-zb-v", "dp2.pp2.vp2.z3.mb2.sched-zb-v.ac-full", "dp2.pp2.vp2.mb2.sched-dualpipe-v",
        "dp2.pp2.vp2.z3.mb2.sched-dualpipe-v", "tp2.pp2.vp2.mb4.sp.sched-zb-v", "tp2.pp2.vp2.mb4.sched-dualpipe-v",
    ),
}  # fmt: skip


def run(folder: Path, ranks: int, slugs: tuple[str, ...], model: ModelSpec = MODEL) -> dict[str, Measurement]:
    job = TrainJob(
        model=model,
        workload=Workload(global_batch=BATCH, seq_len=SEQ, precision=Precision.FP32, optimizer=Optimizer.SGD),
        plans=tuple(parse_slug(slug) for slug in slugs), steps=1, learning_rate=RATE, out_dir=str(folder),
    )  # fmt: skip
    return dict(
        zip(slugs, run_plans(job, nodes=[local_node()], ranks_per_node=ranks, stall_timeout_s=120), strict=True)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Measurement]]:
    """Measurements of all plans of a number of ranks, run once."""
    done: dict[int, dict[str, Measurement]] = {}

    def get(ranks: int) -> dict[str, Measurement]:
        if ranks not in done:
            done[ranks] = run(tmp_path_factory.mktemp(f"pipelines{ranks}"), ranks, PLANS[ranks])
        return done[ranks]

    return get


@pytest.fixture(scope="module")
def reference() -> list[float]:
    return one_process(MODEL, optimizer=Optimizer.SGD, rate=RATE, steps=STEPS)


@pytest.mark.parametrize(("ranks", "slug"), [(ranks, slug) for ranks, slugs in PLANS.items() for slug in slugs])
def test_losses_equal_those_of_one_process(
    runs: Callable[[int], dict[str, Measurement]], reference: list[float], ranks: int, slug: str
) -> None:
    assert difference(runs(ranks)[slug].losses, reference) < TOLERANCE


def test_the_comparison_can_fail(reference: list[float]) -> None:
    """Negative controls: gradients twice as large or of one part missing."""
    for change in (lambda gradient: 2 * gradient, lambda gradient: gradient * (gradient.ndim > 1)):
        wrong = one_process(MODEL, optimizer=Optimizer.SGD, rate=RATE, steps=STEPS, change=change)
        assert difference(wrong, reference) > 10 * TOLERANCE


@pytest.mark.parametrize(("ranks", "slug"), [(ranks, slug) for ranks, slugs in PLANS.items() for slug in slugs])
def test_what_runs_is_the_schedule_that_is_priced(
    runs: Callable[[int], dict[str, Measurement]], ranks: int, slug: str
) -> None:
    """Every rank's actions in their order are the very ones that the simulation is given."""
    plan = parse_slug(slug)
    microbatches = BATCH // plan.layout.dp // plan.microbatch_size
    schedule = build_schedule(plan.schedule, plan.layout.pp, microbatches, plan.layout.vp)
    for rank, measured in enumerate(runs(ranks)[slug].ranks):
        actions = [span.name for span in measured.spans if span.phase in ("forward", "backward")]
        assert actions == [str(action) for action in schedule[plan.layout.coordinates(rank)["pp"]]]


TIED = dataclasses.replace(MODEL, name="tied-gpt", tied_embeddings=True)
TIED_PLANS = ("dp2.pp2.mb4", "dp2.pp2.vp2.z3.mb4.sched-zb-v", "tp2.pp2.mb8.sp", "pp4.mb4.sched-zb-h1.ac-selective")


def test_tied_embeddings(tmp_path: Path) -> None:
    """Embedding and head share their weight over a pipeline: gradients of both copies are summed once per step."""
    expected = one_process(TIED, optimizer=Optimizer.SGD, rate=RATE, steps=STEPS)
    rows = (TIED.vocab_size, TIED.hidden_size)
    wrong = one_process(
        TIED, optimizer=Optimizer.SGD, rate=RATE, steps=STEPS, change=lambda grad: grad / (1 + (grad.shape == rows))
    )
    assert difference(wrong, expected) > 10 * TOLERANCE
    weight = 4 * TIED.vocab_size * TIED.hidden_size
    for slug, measured in run(tmp_path, 4, TIED_PLANS, TIED).items():
        assert difference(measured.losses, expected) < TOLERANCE, slug
        plan = parse_slug(slug)
        one_rank = plan.schedule in V_SCHEDULES
        for rank, found in enumerate(measured.ranks):
            ends = plan.layout.coordinates(rank)["pp"] in (0, plan.layout.pp - 1) and not one_rank
            sums = {(c.kind, c.count, c.num_bytes) for c in found.collectives if c.axis == EMBEDDING_AXIS}
            assert sums == ({("all_reduce", 1, weight // plan.layout.tp)} if ends else set()), slug


def test_what_is_refused_cannot_run() -> None:
    """Pipelines that are refused have no schedule, or a stage without anything to do."""
    for slug, microbatches in (("pp4.vp2.mb1.sched-dualpipe-v", 7), ("pp4.vp4.mb1", 4), ("pp4.mb1.split-1-1-1-1", 4)):
        plan = parse_slug(slug)
        assert unsupported(plan, MODEL, microbatches), slug
        with pytest.raises(PlanError):
            find_parts(build(MODEL)).stages(plan)
            build_schedule(plan.schedule, plan.layout.pp, microbatches, plan.layout.vp)
    for slugs in PLANS.values():
        assert not [slug for slug in slugs if unsupported(parse_slug(slug), MODEL, 16)]
