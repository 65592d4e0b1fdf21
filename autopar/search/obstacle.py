"""Searches of parts of the space, where it is data that nothing can be used, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Estimate, Setting
from autopar.search.exhaustive import search
from autopar.search.space import Space
from costmodels.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacle:
    """Why nothing of a space can be used.

    Attributes:
        reason: ``memory``, or what rules most plans out before memory is looked at (``key-value heads``, ``batch``).
        need, limit: bytes of the plan that needs the least, and what a device offers; need is None where no plan got
            as far as that.
    """

    reason: str
    need: float | None
    limit: float

    @property
    def words(self) -> str:
        """In a few words."""
        if self.need is None:
            return self.reason
        return f"memory: needs {self.need / GIB:.1f} of {self.limit / GIB:.1f} GiB"


def best_or_obstacle(setting: Setting, space: Space | None = None) -> Estimate | Obstacle:
    """The fastest plan of a space, or why there is none."""
    try:
        return search(setting, top=1, space=space).best[0]
    except NoFeasiblePlan as error:
        return obstacle_of(error, setting)


def obstacle_of(error: NoFeasiblePlan, setting: Setting) -> Obstacle:
    """Why a search found nothing."""
    limit = setting.cluster.device.memory_bytes
    if error.least_bytes is not None:
        return Obstacle(reason="memory", need=error.least_bytes, limit=limit)
    reason = max(error.rejected, key=error.rejected.__getitem__, default="no such layout")
    return Obstacle(reason=reason, need=None, limit=limit)


def best_of(setting: Setting, space: Space | None = None) -> Estimate | None:
    """The fastest plan of a space; None if nothing fits."""
    found = best_or_obstacle(setting, space)
    return found if isinstance(found, Estimate) else None


def with_degrees(space: Space | None, degrees: Mapping[str, tuple[int, ...]]) -> Space:
    """The part of a space with these degrees."""
    space = space or Space()
    return replace(space, degrees={**space.degrees, **degrees})
