"""Whether a choice survives errors of what it rests on."""

from __future__ import annotations

import dataclasses

import pytest

from autopar.estimate import Setting, estimate
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import Recompute
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import search
from autopar.search.space import Space
from autopar.validate.doubts import MEASURES, Doubt, doubts, spec_value
from autopar.validate.sensitivity import Sensitivity, Trial, sensitivity
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.shipped import replaced
from costmodels.stack import load_stack

SMALL = Space(recompute=(Recompute.NONE, Recompute.FULL), max_vp=2, max_cp=2)


def make(cluster: str = "h100:2x8", precision: Precision = Precision.BF16, stack: str = "megatron-core") -> Setting:
    workload = Workload(global_batch=32, seq_len=4096, precision=precision)
    graph = build_graph(load_preset("llama2-13b"), seq_len=4096, precision=precision)
    return Setting(graph=graph, workload=workload, cluster=load_cluster(cluster), stack=load_stack(stack))


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity(make(), space=SMALL)


def test_doubts_are_the_fitted_numbers_that_enter() -> None:
    names = [doubt.name for doubt in doubts(make())]
    assert {
        "devices.h100.matmul.peak_fraction", "devices.h100.bandwidth_fraction.default", "fabrics.infiniband.slowdown",
        "stacks.megatron-core.host.launch_seconds", "stacks.megatron-core.straggler",
    } <= set(names)  # fmt: skip
    assert any(name.startswith("node link (") for name in names)
    assert not [name for name in names if "a100" in name or "torchtitan" in name or "fp8" in name or "quantize" in name]
    assert len(names) == len(set(names))
    assert not [d.name for d in doubts(make("h100:1x8")) if "fabrics" in d.name or "network" in d.name]
    narrow = [doubt.name for doubt in doubts(make(precision=Precision.FP8))]
    assert {"devices.h100.matmul_of.fp8.peak_fraction", "stacks.megatron-core.kernels.quantize_bytes"} <= set(narrow)


def test_a_doubt_changes_the_number_that_it_names() -> None:
    setting = make("h200:2x8")
    by_name = {doubt.name: doubt for doubt in doubts(setting)}
    peak = by_name["devices.h100.matmul.peak_fraction"]
    changed = peak.changed(1.1)
    level = setting.cluster.device.matmul.peak_fraction
    assert changed.cluster.device.matmul.peak_fraction == pytest.approx(1.1 * level)
    assert changed.cluster.device.memory_bytes == setting.cluster.device.memory_bytes
    assert (changed.stack, changed.cluster.node_link) == (setting.stack, setting.cluster.node_link)
    assert changed.cluster.world_size == 16 and peak.value == spec_value(("devices", "h100", "matmul", "peak_fraction"))
    slow = by_name["fabrics.infiniband.slowdown"].changed(0.9)
    assert slow.cluster.network_link.slowdown == pytest.approx(0.9 * setting.cluster.network_link.slowdown)
    assert slow.cluster.network_link.bandwidth == setting.cluster.network_link.bandwidth


def test_a_cluster_keeps_what_it_says_itself(tmp_path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('device = "h100"\nnum_nodes = 2\nmemory_GiB = 70\nfabric = "ethernet"\nfabric_GBps = 12\n')
    setting = make(str(path))
    for doubt in doubts(setting):
        changed = doubt.changed(1.1).cluster
        assert changed.device.memory_bytes == setting.cluster.device.memory_bytes
        assert changed.network_link.bandwidth == setting.cluster.network_link.bandwidth


def test_numbers_of_the_specifications() -> None:
    assert spec_value(("devices", "h100", "no", "such")) is None
    with replaced({("devices", "h100", "matmul", "peak_fraction"): 0.5}):
        assert spec_value(("devices", "h100", "matmul", "peak_fraction")) == 0.5


def test_both_signs_of_every_number_are_searched_anew(found: Sensitivity) -> None:
    setting = make()
    names = {doubt.name: doubt for doubt in doubts(setting)}
    tried = {trial.doubt.name for trial in found.trials}
    assert sorted(t.factor for t in found.trials) == [0.9] * len(tried) + [1.1] * len(tried)
    # What a dense model on cuDNN attention does not use moves nothing.
    assert tried == {name for name in names if "flash1" not in name and "experts" not in name}
    for trial in found.trials[::5]:
        changed = names[trial.doubt.name].changed(trial.factor)
        assert trial.best is not None
        assert trial.best.step_s == search(changed, top=1, space=SMALL).best[0].step_s
        assert trial.chosen.step_s == estimate(changed, found.chosen.plan).step_s


def test_regret_is_never_negative_and_zero_where_the_plan_stays(found: Sensitivity) -> None:
    for trial in found.trials:
        assert trial.fits and trial.regret is not None and trial.regret >= 0
        assert not trial.same_plan or (trial.regret == 0 and trial.survives)
        assert trial.survives is (distinct_key(trial.best.plan) == distinct_key(trial.chosen.plan))
    assert found.worst_regret == max(trial.regret for trial in found.trials)
    assert all(not trial.survives for trial in found.changes)
    assert found.margin is not None and found.margin >= 0
    assert distinct_key(found.runner_up.plan) != distinct_key(found.chosen.plan)


def test_a_choice_that_hangs_on_one_number_changes() -> None:
    """The node's link is set to where a little less of it decides for another degree of tensor parallelism."""
    setting = make("h100:1x8")

    def at(slow: float) -> Setting:
        link = dataclasses.replace(setting.cluster.node_link, slowdown=slow)
        return dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, node_link=link))

    def key(slow: float) -> tuple[int, ...]:
        return distinct_key(search(at(slow), top=1, space=SMALL).best[0].plan)

    low, high = 0.02, 50.0
    first = key(low)
    assert key(high) != first
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if key(middle) == first else (low, middle)
    answer = sensitivity(at(low), space=SMALL)
    changed = {(t.doubt.name.split(" (")[0], t.factor) for t in answer.changes}
    assert ("node link", 0.9) in changed and ("node link", 1.1) not in changed
    [lost] = [t for t in answer.changes if t.doubt.name.startswith("node link")]
    assert lost.regret is not None and 0 < lost.regret < 0.1 and "all_reduce_perf" in lost.doubt.measure
    # Far from where the choice turns it survives.
    assert not [t for t in sensitivity(at(low / 8), space=SMALL).changes if t.doubt.name.startswith("node link")]


def test_every_kind_of_number_says_what_to_measure() -> None:
    for setting in (make(), make(precision=Precision.FP8), make(stack="torchtitan"), make("a100-80g:2x8")):
        for doubt in doubts(setting):
            assert len(doubt.measure) > 20
            assert doubt.measure != MEASURES[-1][1], doubt.name


def test_a_trial_in_which_nothing_fits_is_lost(found: Sensitivity) -> None:
    full = dataclasses.replace(found.chosen, memory_per_rank=(found.chosen.memory_limit * 2,))
    doubt = Doubt(name="memory.x", value=1.0, why="", changed=lambda factor: make())
    lost = Trial(doubt=doubt, factor=1.1, chosen=full, best=None)
    assert not lost.survives and lost.regret is None and not lost.fits
    whole = dataclasses.replace(found, trials=(*found.trials, lost))
    assert whole.changes[0] is lost
