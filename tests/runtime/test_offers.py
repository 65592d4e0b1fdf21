"""What the stacks of the executor offer a planner is what the executor runs, over a grid of plans."""

from __future__ import annotations

import itertools

import pytest

from autopar.layout import ORDERS
from autopar.model.presets import load_preset
from autopar.plan import RECOMPUTE_MODULES, Plan, PlanError, ScheduleName, parse_slug
from autopar.runtime.support import unsupported
from costmodels.stack import load_stack

SPEC = load_preset("demo-gpt")
MICROBATCHES = 16
STACKS = ("autopar-gloo", "autopar-nccl")


def runs(plan: Plan) -> bool:
    return not unsupported(plan, SPEC, MICROBATCHES)


@pytest.mark.parametrize("stack", STACKS)
def test_schedules(stack: str) -> None:
    """Alone, replicated, and sharded every way."""
    offered = load_stack(stack).offers.schedules
    for schedule, data in itertools.product(ScheduleName, ("", ".dp2", ".dp2.z1", ".dp2.z2", ".dp2.z3")):
        virtual = ".vp2" if schedule in ("interleaved", "zb-v", "dualpipe-v") else ""
        named = "" if schedule in ("1f1b", "interleaved") else f".sched-{schedule}"
        assert runs(parse_slug(f"pp2{virtual}{data}.mb1{named}")) == (schedule.value in offered), (schedule, data)


@pytest.mark.parametrize("stack", STACKS)
def test_zero_stages(stack: str) -> None:
    shardable = load_stack(stack).data.shardable
    for zero, rest in itertools.product((0, 1, 2, 3), ("", ".tp2", ".tp2.sp", ".pp2", ".cp2")):
        assert runs(parse_slug(f"dp2.z{zero}.mb1{rest}")) == (zero in shardable)


@pytest.mark.parametrize("stack", STACKS)
def test_recomputation(stack: str) -> None:
    offers = load_stack(stack).offers
    for module, rest in itertools.product(RECOMPUTE_MODULES, ("", ".tp2", ".dp2.z3", ".cp2")):
        plan = parse_slug(f"mb1.ac-selective+{module}{rest}")
        assert runs(plan) == (module in offers.selective), plan.slug
    for rest in ("", ".pp2", ".tp2.sp", ".dp2.z3"):
        assert runs(parse_slug(f"mb1.ac-full2{rest}")) == offers.partial_recompute
        assert runs(parse_slug(f"mb1.ac-full{rest}"))


@pytest.mark.parametrize("stack", STACKS)
def test_uneven_ends(stack: str) -> None:
    offers = load_stack(stack).offers
    blocks = SPEC.num_layers
    for split in (f"split-{blocks - 1}-1", f"split-0-{blocks}", f"split-{blocks}-0"):
        assert runs(parse_slug(f"pp2.mb1.{split}")) == offers.uneven_ends


@pytest.mark.parametrize("stack", STACKS)
def test_axes_and_their_orders(stack: str) -> None:
    offers = load_stack(stack).offers
    for axis in ("tp", "cp", "pp"):
        assert runs(parse_slug(f"{axis}2.mb1")) == (axis in offers.axes)
    for order in ORDERS:
        try:
            plan = parse_slug(f"tp2.cp2.pp2.dp2.z3.mb1.order-{order}")
        except PlanError:
            continue
        assert runs(plan) == (order in offers.orders), order


def test_the_two_stacks_offer_the_same() -> None:
    first, second = (load_stack(stack) for stack in STACKS)
    assert first.offers == second.offers and first.data.shardable == second.data.shardable
