"""Numbers of a setting that were fitted and may be wrong, and how to measure each.

The constants of ``specs/fitted.toml`` as far as they enter a setting, and the levels that tables of products,
attention and collectives gave, which no step time was fitted on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.estimate import Setting
from autopar.fit.components import patched_cluster, read_components
from autopar.fit.constants import Constant, read_constants, spec_values
from costmodels.hardware import Link
from costmodels.shipped import SpecPath, read_shipped

ON_ONE_DEVICE = "on one device: `autopar gpu` or `autopar profile`"
MEASURES = (
    (r"experts\.", "the all-to-all of one layer's tokens among the ep ranks (alltoall_perf of nccl-tests)"),
    (r"attention", f"fused attention at this sequence length and number of heads {ON_ONE_DEVICE}"),
    (r"matmul|products", f"large matrix products, for minutes, as power limits clocks, {ON_ONE_DEVICE}"),
    (r"quantize_bytes", "a layer in the narrow precision against the wide one on one device: `autopar gpu`"),
    (r"bandwidth_fraction|traffic|stream_rate", f"norms and activations at this width {ON_ONE_DEVICE}"),
    (r"^node link", "all_reduce_perf (nccl-tests) among the tp ranks of a node at the size of a layer's activations"),
    (r"^network link|^fabrics\.", "all_reduce_perf (nccl-tests) over several nodes, alone and beside a running step"),
    (r"memory\.", "the allocator's peak in a step of both plans: `autopar run`, torch.cuda.max_memory_allocated"),
    (r"straggler", "the same plan on one node and on many: how its step grows with the nodes"),
    (r"host\.|overheads\.", "gaps between kernels in the trace of a step with the smallest microbatch"),
    (r"tensor\.", "a layer's tensor parallel collectives in a trace: how much of them is exposed"),
    (r"data\.", "a step with and without the reduction of gradients: how much of it is exposed"),
    (r".", "one step of both plans: `autopar run`"),
)
"""What to measure, by a pattern of the number's name; the first that matches counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """One number that may be wrong.

    Attributes:
        name: of the constant, or of a level in words.
        value: as it is; None for a level that stands for several numbers.
        why: what it stands for.
        changed: the setting with the number times a factor.
    """

    name: str
    value: float | None
    why: str
    changed: Callable[[float], Setting]

    @property
    def measure(self) -> str:
        """What to measure to know it better."""
        return next(words for pattern, words in MEASURES if re.search(pattern, self.name))


def doubts(setting: Setting) -> tuple[Doubt, ...]:
    """Fitted numbers that enter this setting, constants first, then levels that no constant stands for."""
    found = tuple(_fitted(setting))
    return (*found, *_levels(setting, [doubt.name for doubt in found]))


def _fitted(setting: Setting) -> Iterator[Doubt]:
    device, stack = setting.cluster.device.name, setting.stack.name
    base = read_components([device], [stack], {})
    for constant in read_constants():
        value = spec_value(constant.paths[0])
        if value is None:
            continue

        def changed(factor: float, constant: Constant = constant, value: float = value) -> Setting:
            places = spec_values((constant,), {constant.name: value * factor})
            trial = read_components([device], [stack], places)
            cluster = patched_cluster(setting.cluster, base, trial)
            return dataclasses.replace(setting, cluster=cluster, stack=trial.stacks[stack])

        if enters(setting, changed(1.5)):
            yield Doubt(name=constant.name, value=value, why=constant.why, changed=changed)


def spec_value(path: SpecPath) -> float | None:
    """The number at a path of the specifications; None where there is none."""
    place: Any = read_shipped(path[0], path[1])
    for key in path[2:]:
        if not isinstance(place, Mapping) or key not in place:
            return None
        place = place[key]
    return float(place)


def enters(setting: Setting, changed: Setting) -> bool:
    """Whether two settings differ in anything that prices plans: a network only where there are several nodes."""
    one, other = setting.cluster, changed.cluster
    alone = one.world_size <= one.domain
    machine = (one.device, *(one.links[:1] if alone else one.links))
    changed_machine = (other.device, *(other.links[:1] if alone else other.links))
    precision = setting.workload.precision
    narrow = precision is not precision.base

    def relevant(part: Any) -> Any:
        return part if narrow else _without_narrow(part)

    return bool(relevant((setting.stack, *machine)) != relevant((changed.stack, *changed_machine)))


def _without_narrow(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stack, device and links without what only narrow precisions use."""
    stack, device, *links = parts
    kernels = dataclasses.replace(stack.kernels, quantize_bytes=0.0)
    return (dataclasses.replace(stack, kernels=kernels), dataclasses.replace(device, matmul_of={}), *links)


def _levels(setting: Setting, fitted: list[str]) -> Iterator[Doubt]:
    cluster, stack = setting.cluster, setting.stack

    def products(factor: float) -> Setting:
        kernels = dataclasses.replace(stack.kernels, matmul_rate=stack.kernels.matmul_rate * factor)
        return dataclasses.replace(setting, stack=dataclasses.replace(stack, kernels=kernels))

    def attention(factor: float) -> Setting:
        kernels = dataclasses.replace(stack.kernels, attention_rate=stack.kernels.attention_rate * factor)
        return dataclasses.replace(setting, stack=dataclasses.replace(stack, kernels=kernels))

    def node(factor: float) -> Setting:
        return dataclasses.replace(
            setting, cluster=dataclasses.replace(cluster, node_link=_level(cluster.node_link, factor))
        )

    def network(factor: float) -> Setting:
        levels = tuple(dataclasses.replace(level, link=_level(level.link, factor)) for level in cluster.levels)
        slower = dataclasses.replace(cluster, network_link=_level(cluster.network_link, factor), levels=levels)
        return dataclasses.replace(setting, cluster=slower)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in fitted)

    if not has(r"matmul"):
        yield Doubt(name="products", value=None, why="level of matrix products, from tables of them", changed=products)
    if setting.graph.attention is not None and not has(r"attention"):
        yield Doubt(name="attention", value=None, why="level of fused attention, from tables of it", changed=attention)
    if cluster.devices_per_node > 1:
        yield Doubt(
            name=f"node link ({cluster.node_link.name})", value=None,
            why="speed of collectives in a node, from tables of them", changed=node,
        )  # fmt: skip
    if cluster.world_size > cluster.domain and not has(r"^fabrics\."):
        yield Doubt(
            name=f"network link ({cluster.network_link.name})", value=None,
            why="speed of collectives between nodes, from tables of them", changed=network,
        )  # fmt: skip


def _level(link: Link, factor: float) -> Link:
    return dataclasses.replace(link, slowdown=link.slowdown / factor)
