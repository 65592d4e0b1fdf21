"""What binds: shares that add up, and improvements whose signs and sizes are what the resource says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.estimate import Setting, estimate
from autopar.plan import parse_slug, violations
from autopar.search.exhaustive import search
from autopar.search.explain import MORE, explain, seconds_by_term, shares_of
from autopar.search.resources import RATES, Resource, improved

SLUGS = (
    "dp16.z0.mb1", "dp16.z1.mb1", "tp4.dp4.z1.mb1.sp", "tp8.cp2.mb1.sp.ac-selective", "pp4.vp2.dp4.z1.mb1",
    "tp2.pp4.dp2.z1.mb2.ac-full", "tp16.mb4.sp", "cp4.dp4.z1.mb1", "pp8.dp2.z0.mb1",
)  # fmt: skip


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("cluster", ["a100-80g:2x8", "h100:4x4"])
def test_no_improvement_makes_the_same_plan_slower(setting_of: Callable[..., Setting], slug: str, cluster: str) -> None:
    setting, plan = setting_of("gpt3-6.7b", cluster, 64, 2048), parse_slug(slug)
    if violations(plan, setting.graph, setting.workload, 16):
        pytest.skip("not a plan of this model")
    now = estimate(setting, plan).step_s
    for resource in Resource:
        for factor in (1.001, 1.1, 3.0):
            better = estimate(improved(setting, resource, factor), plan).step_s
            assert now / factor * (1 - 1e-9) <= better <= now * (1 + 1e-12), resource


@pytest.mark.parametrize("slug", SLUGS)
def test_shares_add_up_and_none_is_negative(setting_of: Callable[..., Setting], slug: str) -> None:
    setting, plan = setting_of("gpt3-6.7b", "a100-80g:2x8", 64, 2048), parse_slug(slug)
    if violations(plan, setting.graph, setting.workload, 16):
        pytest.skip("not a plan of this model")
    by_term = seconds_by_term(setting, plan)
    price = estimate(setting, plan)
    assert sum(sum(row.values()) for row in by_term.values()) == pytest.approx(price.step_s, rel=1e-4)
    shares = shares_of(by_term)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and min(shares.values()) > -1e-6
    assert ("pipeline_bubble" in shares) is (plan.layout.pp > 1)
    # Elasticities predict small improvements.
    for resource in RATES:
        saved = 1 - estimate(improved(setting, resource, 1.0005), plan).step_s / price.step_s
        total = sum(row.get(resource.value, 0.0) for row in by_term.values()) / price.step_s
        assert saved == pytest.approx(total * 0.0005, rel=0.02, abs=1e-8)


def test_everything_better_together_is_the_sum_of_its_parts(setting_of: Callable[..., Setting]) -> None:
    setting, plan = setting_of("gpt3-6.7b", "a100-80g:2x8", 64, 2048), parse_slug("tp2.pp4.dp2.z1.mb2.ac-full")
    better = setting
    for resource in RATES:
        better = improved(better, resource, 2.0)
    assert estimate(better, plan).step_s == pytest.approx(estimate(setting, plan).step_s / 2, rel=1e-6)


def test_a_compute_bound_plan_gains_almost_all_from_compute(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("gpt3-6.7b", "a100-80g:1x8", 512, 2048)
    fast = improved(improved(setting, Resource.NODE_LINK, 100), Resource.MEMORY_BANDWIDTH, 100)
    answer = explain(fast, parse_slug("tp8.mb4.sp"), replan=False)
    first = answer.improvements[0]
    assert answer.binding == "compute" == first.resource.value and answer.shares["compute"] > 0.9
    assert 0.9 * MORE < first.gain <= MORE
    rest = {i.resource: i.gain for i in answer.improvements[1:]}
    assert max(rest.values()) < 0.01 and rest[Resource.MEMORY_CAPACITY] == 0.0


def test_a_slow_network_binds(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("gpt3-6.7b", "a100-80g:2x8", 16, 2048)
    slow = improved(setting, Resource.NETWORK_LINK, 1 / 200)
    answer = explain(slow, parse_slug("dp16.z1.mb1"), replan=False)
    assert answer.binding == "network link" == answer.improvements[0].resource.value
    assert answer.improvements[0].gain > 0.08


def test_launches_bind_a_small_model(setting_of: Callable[..., Setting]) -> None:
    setting = setting_of("gpt2-small", "h100:1x8", 64, 128)
    host = dataclasses.replace(setting.stack.host, launch_seconds=2e-3)
    slow = dataclasses.replace(setting, stack=dataclasses.replace(setting.stack, host=host))
    assert explain(slow, parse_slug("dp8.z1.mb1"), replan=False).binding == "launches"


@pytest.mark.parametrize("seed", [0, 1])
def test_replanning_is_never_worse_than_the_same_plan(setting_of: Callable[..., Setting], seed: int) -> None:
    setting = [setting_of("llama2-7b", "a100-80g:1x8", 16, 4096), setting_of("llama2-13b", "a100-40g:2x8", 32, 4096)][
        seed
    ]
    best = search(setting, top=1).best[0]
    answer = explain(setting, best.plan)
    assert {i.resource for i in answer.improvements} == set(Resource)
    for found in answer.improvements:
        assert found.replanned is not None and found.replanned_gain is not None
        assert found.replanned_gain >= found.gain >= 0


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(Resource)), st.floats(1.01, 2.0))
def test_an_improvement_changes_one_resource_alone(resource: Resource, factor: float) -> None:
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    setting = Setting(graph=None, workload=None, cluster=load_cluster("h100:2x8"), stack=load_stack("torchtitan"))  # type: ignore[arg-type]
    changed = improved(setting, resource, factor)
    back = improved(changed, resource, 1 / factor)
    assert changed.cluster != setting.cluster or changed.stack != setting.stack
    assert back.cluster.device.memory_bandwidth == pytest.approx(setting.cluster.device.memory_bandwidth)
    assert back.cluster.node_link.latency == pytest.approx(setting.cluster.node_link.latency)
    assert (changed.cluster.node_link == setting.cluster.node_link) is (resource is not Resource.NODE_LINK)
    assert (changed.stack == setting.stack) is (resource is not Resource.LAUNCHES)


def test_every_level_of_the_network_is_improved(tmp_path) -> None:
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    path = tmp_path / "cluster.toml"
    path.write_text('device = "h100"\nnum_nodes = 16\n[[level]]\nname = "spine"\nnodes = 4\noversubscription = 2.0\n')
    setting = Setting(graph=None, workload=None, cluster=load_cluster(str(path)), stack=load_stack("megatron-core"))  # type: ignore[arg-type]
    assert setting.cluster.levels
    changed = improved(setting, Resource.NETWORK_LINK, 1.1).cluster
    for before, after in zip(setting.cluster.links[1:], changed.links[1:], strict=True):
        assert after.bandwidth == pytest.approx(1.1 * before.bandwidth)
    assert changed.links[0] == setting.cluster.links[0]
