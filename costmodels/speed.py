"""What a profile would hold had the machine been faster or slower while it was measured.

The speed of shared machines changes from minute to minute. A profile and a run time the same piece of work, the
yardstick; where a run's takes longer, all that its processors compute is expected to.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from costmodels.errors import InputError
from costmodels.profiles import ComputePoint, MachineProfile


def slowness(profile: MachineProfile, yardstick: Sequence[float]) -> float | None:
    """How many times longer a run's yardsticks (seconds, the median counts) took than the profile's; None where one of
    them was not measured."""
    if not yardstick or not profile.yardstick_s:
        return None
    return statistics.median(yardstick) / profile.yardstick_s


def slowed(profile: MachineProfile, factor: float) -> MachineProfile:
    """The profile of a machine whose processors take ``factor`` times as long; fits are left out.

    Collectives stay: on links with a rate of their own, and on one machine too, where they follow the memory and the
    kernel rather than arithmetic (a run at 0.76 of the profile's yardstick had forward passes at 0.80 and gathers at
    1.6 of their predictions).

    Raises:
        InputError: a factor that is not above 0.
    """
    if not factor > 0:
        raise InputError(f"a machine's time is scaled by {factor}; it must be above 0")
    return dataclasses.replace(
        profile,
        compute=scaled_points(profile.compute, factor),
        host_overheads={name: seconds * factor for name, seconds in profile.host_overheads.items()},
        peaks={name: peak / factor for name, peak in profile.peaks.items()},
        yardstick_s=profile.yardstick_s * factor,
        fits=(),
    )


def scaled_points(points: Sequence[ComputePoint], factor: float) -> tuple[ComputePoint, ...]:
    """Points with their seconds scaled."""
    return tuple(dataclasses.replace(point, seconds=point.seconds * factor) for point in points)
