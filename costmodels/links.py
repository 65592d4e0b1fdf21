"""Links between devices, and the networks that ship with the program (``specs/fabrics/*.toml``).

Symbols: N ranks, l of them on each of k nodes, M bytes of the whole tensor, B bytes/s per rank and direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from costmodels.errors import InputError
from costmodels.shipped import load_shipped, shipped_names
from costmodels.units import GB


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What connects ranks. The law of a collective over one link, in ``collectives.link_seconds``:

    t = base_latency + rounds latency + slowdown serial (1 + sqrt(ramp_bytes/M)) / (B efficiency).

    Attributes:
        bandwidth: B of the datasheet.
        latency: seconds per message, one after another.
        efficiency: share of B that large messages reach while nothing else runs (nccl-tests and the like).
        base_latency: seconds per collective, however many messages it takes.
        ramp_bytes: M at which a collective reaches half of the speed of large messages.
        slowdown: of collectives beside a training step's other work, against the same collective alone.
        efficiency_of: efficiency for a number of ranks (``"2"``), where links between ranks are not all alike.
        in_network: efficiency of all-reduces that the switch computes (NVLS, SHARP), of B; 0 = it computes none.
        in_network_ramp: ramp_bytes of these.
        tree: of a network, efficiency of all-reduces by a tree over nodes; 0 = rings only.
        all_to_all: efficiency of all_to_all; None means ``efficiency``.
        pipelined: of a network, collectives across nodes move bytes inside the nodes at the same time; otherwise one
            after the other.
        origins: where numbers come from, by field.
    """

    name: str
    bandwidth: float
    latency: float
    efficiency: float = 1.0
    base_latency: float = 0.0
    ramp_bytes: float = 0.0
    slowdown: float = 1.0
    efficiency_of: Mapping[str, float] = field(default_factory=dict)
    in_network: float = 0.0
    in_network_ramp: float = 0.0
    tree: float = 0.0
    all_to_all: float | None = None
    pipelined: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("efficiency", "slowdown"):
            if not getattr(self, name) > 0:
                raise InputError(f"link {self.name}: {name} is {getattr(self, name)}; it must be above 0")
        if not all(ranks.isdigit() for ranks in self.efficiency_of):
            raise InputError(f"link {self.name}: efficiency_of takes numbers of ranks, not {list(self.efficiency_of)}")

    @property
    def speed(self) -> float:
        """Bytes/s that large messages reach in training."""
        return self.bandwidth * self.efficiency / self.slowdown


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkLevel:
    """A level of the network above the nodes: pods under a spine, buildings under a core.

    Attributes:
        size: devices of each of the groups that this level joins.
        link: between these groups, per device while all devices of a group use it at once.
    """

    size: int
    link: Link


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCurve:
    """Measured seconds of a collective among ``group_size`` ranks, over payload sizes in ascending order.

    ``num_bytes`` is the whole tensor, as in autopar's counts.
    """

    kind: str
    group_size: int
    num_bytes: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSpec:
    """A Link as files write it; ``bandwidth_GBps`` is left out where a fabric is given its bandwidth."""

    name: str
    description: str = ""
    latency_us: float
    bandwidth_GBps: float = 0.0
    efficiency: float = 1.0
    base_latency_us: float = 0.0
    ramp_MB: float = 0.0
    slowdown: float = 1.0
    efficiency_of: Mapping[str, float] = field(default_factory=dict)
    in_network: float = 0.0
    in_network_ramp_MB: float = 0.0
    tree: float = 0.0
    all_to_all: float | None = None
    pipelined: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    def link(self, bandwidth: float | None = None) -> Link:
        """The link, at a bandwidth in bytes/s if one is given."""
        return Link(
            name=self.name,
            bandwidth=self.bandwidth_GBps * GB if bandwidth is None else bandwidth,
            latency=self.latency_us * 1e-6,
            efficiency=self.efficiency,
            base_latency=self.base_latency_us * 1e-6,
            ramp_bytes=self.ramp_MB * 1e6,
            slowdown=self.slowdown,
            efficiency_of=self.efficiency_of,
            in_network=self.in_network,
            in_network_ramp=self.in_network_ramp_MB * 1e6,
            tree=self.tree,
            all_to_all=self.all_to_all,
            pipelined=self.pipelined,
            origins=self.origins,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSpec:
    """A [[level]] of cluster.toml: groups of ``nodes`` nodes, joined by a link.

    Without a [level.link] of its own the level is the link below it, ``oversubscription`` times slower: a group's
    devices have that many times the bandwidth of its way up.
    """

    name: str
    nodes: int
    oversubscription: float = 1.0
    link: LinkSpec | None = None

    def level(self, below: Link, below_size: int, devices_per_node: int) -> NetworkLevel:
        """The level on top of a link that reaches ``below_size`` devices.

        Raises:
            InputError: groups that are not whole groups of the level below, or an oversubscription below 1.
        """
        size = self.nodes * devices_per_node
        if size <= below_size or size % below_size:
            raise InputError(
                f"level {self.name}: nodes is {self.nodes}, {size} devices; it must be a multiple, 2 or more, of the "
                f"{below_size} devices that the level below joins"
            )
        if self.oversubscription < 1:
            raise InputError(f"level {self.name}: oversubscription is {self.oversubscription}; it is 1 or more")
        link = below if self.link is None else self.link.link()
        narrow = replace(link, name=self.name, bandwidth=link.bandwidth / self.oversubscription)
        return NetworkLevel(size=size, link=narrow)


def fabric_names() -> tuple[str, ...]:
    """Networks that ship with the program."""
    return shipped_names("fabrics")


def load_fabric(name: str, bandwidth: float) -> Link:
    """A shipped network at a bandwidth in bytes/s per rank and direction.

    Raises:
        InputError: unknown name (with the nearest), or a negative bandwidth.
    """
    if bandwidth < 0:
        raise InputError(f"fabric {name}: a bandwidth of {bandwidth} bytes/s; it must be above 0")
    return load_shipped(LinkSpec, "fabrics", name).link(bandwidth)
