"""Layer-wise plans: every layer its own tensor parallel degree, sharding and recomputation on the same ranks.

Minimise over strategies s_l of the layers l and the number m of microbatches (Miao et al. 2022, Galvatron; Zheng et al.
2022, Alpa's intra-operator pass)

    sum_l time[l, s_l] + sum_l m reshard(s_l, s_l+1)   subject to   sum_l memory[l, s_l] <= limit,

which ``layerwise.solve`` does exactly (times and memories are ``_tables``, transitions ``reshard_seconds``).
A strategy is (tp, ZeRO stage, recompute) on N ranks, N / tp of which are data parallel; all layers take part in the
same microbatches, of which each data parallel rank of a layer computes its share, so that every share must be whole.

The prices of layers are those that ``estimate`` adds up. What the sum leaves out: launches that wait for a whole pass
(each layer waits by itself), stragglers, the host's time per step, and working memory, of which the largest layer's is
set aside. Data parallel communication hides behind the backward of its own layer only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate.arrays import Ints
from autopar.estimate.pieces import Floats, Prices, Section, price, sections
from autopar.estimate.setting import Setting
from autopar.plan import Recompute
from autopar.search.layerwise import solve
from autopar.search.space import divisors
from autopar.shard import Degrees
from costmodels.collectives import collective_seconds
from costmodels.compute import stream_seconds
from costmodels.memory import sharded
from costmodels.overlap import exposed_seconds
from costmodels.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStrategy:
    """How one layer is computed: tp ranks, all others data parallel; ZeRO stage; whether it is computed again."""

    tp: int
    zero_stage: int
    recompute: Recompute

    @property
    def name(self) -> str:
        """Short."""
        return f"tp{self.tp}.z{self.zero_stage}.ac-{self.recompute}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """The best strategy of every layer.

    Attributes:
        layers: one strategy a layer: what comes before the blocks (if anything), the blocks, what comes after them.
        num_microbatches: m.
        sequence_parallel: of all layers alike.
        step_s: sum of the layers' times and of resharding between them.
        reshard_s: of which the latter.
        memory_bytes: with what is set aside.
        uniform: the best strategy that all layers share, under the same model; None if none fits.
        uniform_s: its step time; infinite if none fits.
    """

    layers: tuple[LayerStrategy, ...]
    num_microbatches: int
    sequence_parallel: bool
    step_s: float
    reshard_s: float
    memory_bytes: float
    uniform: LayerStrategy | None
    uniform_s: float

    @property
    def gain(self) -> float:
        """Share of the uniform step time that layers of their own save."""
        return 1 - self.step_s / self.uniform_s if np.isfinite(self.uniform_s) else 1.0


def layer_plan(setting: Setting) -> LayerPlan:
    """The best layer-wise plan of a model without a pipeline on all ranks of the cluster.

    Raises:
        NoFeasiblePlan: no strategies fit in memory, or the batch does not divide.
    """
    best: LayerPlan | None = None
    uniform, uniform_s = None, np.inf
    for sequence, m, strategies in _questions(setting):
        time, memory, reserve = _tables(setting, strategies, m, sequence)
        limit = setting.cluster.device.memory_bytes - reserve
        transition = m * _transitions(setting, strategies, m, sequence)
        alike = np.where(memory.sum(axis=0) <= limit, time.sum(axis=0), np.inf)
        if alike.min() < uniform_s:
            uniform, uniform_s = strategies[int(alike.argmin())], float(alike.min())
        try:
            found = solve(time, memory, transition, limit)
        except NoFeasiblePlan:
            continue
        if best is None or found.cost < best.step_s:
            choice = np.asarray(found.choice)
            used = float(memory[np.arange(len(choice)), choice].sum()) + reserve
            best = LayerPlan(
                layers=tuple(strategies[index] for index in choice.tolist()), num_microbatches=m,
                sequence_parallel=sequence, step_s=float(found.cost),
                reshard_s=float(transition[choice[:-1], choice[1:]].sum()), memory_bytes=used,
                uniform=None, uniform_s=np.inf,
            )  # fmt: skip
    if best is None:
        limit = setting.cluster.device.memory_bytes / GIB
        raise NoFeasiblePlan(
            f"no layer-wise plan of {setting.cluster.world_size} ranks fits in {limit:.1f} GiB per device with a "
            f"batch of {setting.workload.global_batch}: use more devices or a pipeline"
        )
    return LayerPlan(
        **{name: getattr(best, name) for name in LayerPlan.__dataclass_fields__ if not name.startswith("uniform")},
        uniform=uniform, uniform_s=uniform_s,
    )  # fmt: skip


def _questions(setting: Setting) -> Iterator[tuple[bool, int, list[LayerStrategy]]]:
    """Sequence parallelism and number of microbatches, with the strategies that both allow."""
    world, batch, attention = setting.cluster.world_size, setting.workload.global_batch, setting.graph.attention
    heads = (attention.num_heads, attention.num_kv_heads) if attention else ()
    degrees = [tp for tp in divisors(world) if all(number % tp == 0 for number in heads)]
    for sequence, m in product((False, True), divisors(batch)):
        fits = [tp for tp in degrees if batch % (m * world // tp) == 0]
        if sequence:
            fits = [tp for tp in fits if setting.workload.seq_len % tp == 0]
        strategies = [
            LayerStrategy(tp=tp, zero_stage=zero, recompute=recompute)
            for tp in fits
            for zero in setting.stack.data.shardable
            if zero == 0 or tp < world
            for recompute in (Recompute.NONE, Recompute.FULL)
        ]
        if strategies:
            yield sequence, m, strategies


def _layers(setting: Setting) -> tuple[tuple[Section, ...], Ints]:
    """Sections of the model and, for every layer in order, the index of its own."""
    parts = sections(setting.graph)
    where = {block: index for index, part in enumerate(parts) for block in part.blocks}
    return parts, np.asarray([where[block] for block in sorted(where)], dtype=np.int64)


def _degrees(setting: Setting, strategies: list[LayerStrategy], m: int, sequence: bool) -> Degrees:
    tp = np.asarray([strategy.tp for strategy in strategies], dtype=np.int64)
    share = setting.workload.global_batch * tp // (m * setting.cluster.world_size)
    ones = np.ones_like(tp)
    return Degrees(tp=tp, cp=ones, sp=(tp > 1) & sequence, microbatch=share, ep=ones, etp=ones, cp_stride=tp)


def _tables(setting: Setting, strategies: list[LayerStrategy], m: int, sequence: bool) -> tuple[Floats, Floats, float]:
    """Seconds of a step and bytes, [layers, strategies], and bytes to set aside for all of them."""
    parts, of_layer = _layers(setting)
    degrees = _degrees(setting, strategies, m, sequence)
    prices = price(setting, degrees, parts, by_module=False)
    column = (slice(None), None)
    zero = np.asarray([strategy.zero_stage for strategy in strategies])[column]
    is_block = np.asarray([part.is_block(setting.graph) for part in parts])
    full = np.asarray([strategy.recompute is Recompute.FULL for strategy in strategies])[column] & is_block
    shards = (setting.cluster.world_size // degrees.tp)[column]
    forward = prices.forward + prices.tensor_forward
    backward = prices.backward + prices.tensor_backward
    again = np.where(full, prices.again_full + prices.again_tensor, 0.0)
    data = _data_parallel(setting, prices, zero, shards, degrees.tp[column], backward + again, m)
    state, gradient = setting.state_bytes, setting.gradient_bytes
    moved = (2 * state + gradient + setting.weight_bytes) * setting.stack.kernels.traffic.get("optimizer", 1.0)
    update = stream_seconds(
        setting.cluster.device, sharded(prices.parameters * moved, zero, 1, shards), "optimizer", ops=0.0
    )
    time = m * (forward + backward + again) + data + update
    static = (
        sharded(prices.parameters * setting.weight_bytes, zero, 3, shards)
        + sharded(prices.parameters * gradient, zero, 2, shards)
        + sharded(prices.parameters * state, zero, 1, shards)
    )
    memory = (1 + setting.stack.memory.fragmentation) * (static + np.where(full, prices.kept_full, prices.kept))
    habits = setting.stack.memory
    aside = float(prices.working_adding.max()) + habits.workspace_bytes + habits.reserve_bytes
    return time.T[of_layer], memory.T[of_layer], aside


def _data_parallel(
    setting: Setting, prices: Prices, zero: Ints, ranks: Ints, stride: Ints, window: Floats, m: int
) -> Floats:
    """Exposed seconds of reducing gradients and gathering weights, behind the layer's own last backward."""
    cluster, data, algorithms = setting.cluster, setting.stack.data, setting.stack.algorithms
    gradients = prices.parameters * setting.reduce_bytes
    weights = prices.parameters * setting.gather_bytes
    buckets = np.maximum(np.ceil(gradients / data.bucket_bytes), 1.0)
    reduced = buckets * collective_seconds(cluster, "all_reduce", ranks, stride, gradients / buckets, algorithms)
    scattered = collective_seconds(cluster, "reduce_scatter", ranks, stride, gradients, algorithms)
    gathered = collective_seconds(cluster, "all_gather", ranks, stride, weights, algorithms)
    gathers = np.where(zero == 3, 2 * m, 1)
    communication = np.where(zero == 0, reduced, scattered + gathers * gathered)
    behind = np.where(zero == 3, m, 1) * window
    hidden = exposed_seconds(communication, behind, hidden=data.shard_hidden, leak=data.shard_leak)
    plain = exposed_seconds(reduced, window, hidden=float(data.bucketed_overlap), leak=data.replicated_leak)
    return np.where(ranks > 1, np.where(zero == 0, plain, hidden), 0.0)


def _transitions(setting: Setting, strategies: list[LayerStrategy], m: int, sequence: bool) -> Floats:
    """Seconds of resharding a microbatch between neighbours, [strategies, strategies]."""
    tp = np.asarray([strategy.tp for strategy in strategies])
    whole = setting.graph.boundary_bytes * setting.workload.global_batch / m / setting.graph.batch_size
    return reshard_seconds(setting, tp[:, None], tp[None, :], whole, sequence)


def reshard_seconds(setting: Setting, before: Ints, after: Ints, num_bytes: float, sequence: bool) -> Floats:
    """Handing an activation of ``num_bytes`` (all sequences of a microbatch) from a layer to one with another tp.

    Of N ranks with tp = t, N / t hold different sequences. Where t grows k times, groups of k ranks gather their
    sequences in forward, and each takes its part of the gradient in backward; where it shrinks, the other way round:
    one all_gather of t_max / N of the bytes either way. Under sequence parallelism every rank holds 1/N of the tokens
    before and after, and the k ranks exchange them in both directions: two all_to_alls.
    """
    world, large, small = setting.cluster.world_size, np.maximum(before, after), np.minimum(before, after)
    group = np.maximum(large // small, 1)
    algorithms, cluster = setting.stack.algorithms, setting.cluster
    if sequence:
        each = num_bytes / world * np.ones_like(group, dtype=float)
        seconds = 2 * collective_seconds(cluster, "all_to_all", group, small, each, algorithms)
    else:
        seconds = collective_seconds(cluster, "all_gather", group, small, num_bytes * large / world, algorithms)
    # Degrees of which neither divides the other meet by way of all ranks.
    crossed = large % small != 0
    anyway = collective_seconds(
        cluster, "all_gather", world, 1, num_bytes * np.ones_like(group, dtype=float), algorithms
    )
    return np.where(before == after, 0.0, np.where(crossed, anyway, seconds))
