"""What an estimate says: time by named terms, memory by named items, and what it assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.plan import MEMORY_ITEM, Plan
from costmodels.memory_bands import MemoryBand, item_bands
from costmodels.step_bands import Band, BandRule, load_bands
from costmodels.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Prediction for one plan.

    Attributes:
        stack: software that is assumed, with its variants.
        device: name of the device.
        experts: whether the model has any.
        step_s: seconds of a step.
        breakdown: parts of the step in seconds, by the names of ``step.TERMS``; they add up to step_s.
        memory: bytes at the peak of the fullest pipeline rank, by the names of ``memory.ITEMS``.
        memory_per_rank: peak bytes of every pipeline rank.
        memory_items_per_rank: their items, by the same names.
        memory_limit: bytes that a device offers.
        host_bytes, host_limit: bytes in host memory, of the rank that has most there, and what a device has of it.
        tokens_per_s_per_gpu: throughput.
        model_flops_per_s_per_gpu: useful FLOP/s, see ``flops_convention``.
        mfu: that over the device's dense peak in the workload's precision.
        peak_flops: that peak.
        flops_convention: what counts as a useful FLOP.
        assumptions: where the numbers behind the estimate come from.
    """

    plan: Plan
    stack: str
    device: str
    experts: bool
    step_s: float
    breakdown: Mapping[str, float]
    memory: Mapping[str, float]
    memory_per_rank: tuple[float, ...]
    memory_items_per_rank: tuple[Mapping[str, float], ...]
    memory_limit: float
    host_bytes: float
    host_limit: float
    tokens_per_s_per_gpu: float
    model_flops_per_s_per_gpu: float
    mfu: float
    peak_flops: float
    flops_convention: str
    assumptions: tuple[str, ...]

    @property
    def step_rule(self) -> BandRule:
        """How far published runs of this engine, device and kind of model were from their predictions."""
        return load_bands().rule_of(self.stack, self.device, self.experts)

    @property
    def step_band(self) -> Band:
        """Interval of the step time in seconds, see costmodels.step_bands."""
        return self.step_rule.around(self.step_s)

    @property
    def memory_bytes(self) -> float:
        """Peak bytes of the fullest rank."""
        return max(self.memory_per_rank)

    @property
    def fits(self) -> bool:
        """Whether devices, and their hosts where state is offloaded, have the memory."""
        return self.memory_bytes <= self.memory_limit and self.host_bytes <= self.host_limit

    @property
    def memory_gib(self) -> float:
        """Peak GiB of the fullest rank."""
        return self.memory_bytes / GIB

    @property
    def headline(self) -> dict[str, float]:
        """What plan.json says of an estimate, by name; ``memory/...`` are the items of the fullest rank in bytes."""
        items = {f"{MEMORY_ITEM}{item}": num_bytes for item, num_bytes in self.memory.items()}
        return {"step_s": self.step_s, "memory_gib": self.memory_gib, "mfu": self.mfu, **items}

    @property
    def memory_bands(self) -> dict[str, MemoryBand]:
        """Interval in bytes of each item of the fullest rank and of their sum (``total``), see costmodels."""
        return item_bands(self.memory, self.stack)

    @property
    def memory_bands_per_rank(self) -> tuple[dict[str, MemoryBand], ...]:
        """The same for every pipeline rank."""
        return tuple(item_bands(items, self.stack) for items in self.memory_items_per_rank)

    @property
    def bubble_s(self) -> float:
        """Seconds in which the slowest pipeline rank waits for others."""
        return self.breakdown["pipeline_bubble"]

    @property
    def exposed_communication_s(self) -> float:
        """Seconds of communication that no compute hides."""
        names = ("tensor_parallel", "context_parallel", "pipeline_transfer", "data_parallel")
        return sum(self.breakdown[name] for name in names)
