"""Degrees of parallelism of a run: columns, completed by words and by what multiplies out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopar.runs.engines import Engine
from autopar.runs.reading import CannotRead, Read, find_int, has
from autopar.runs.rows import RunRow

FULLY_SHARDED = r"fsdp|full[_ ]shard|shard_grad_op|zero-?[23]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Degrees that multiply out: tp * cp * pp * dp = num_devices, and ep * etp divides tp * cp * dp.

    ``counted`` is False where the number of devices itself was assumed.
    """

    tp: int
    cp: int
    pp: int
    vp: int
    dp: int
    ep: int
    etp: int
    counted: bool = True

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.tp * self.cp * self.pp * self.dp


def read_degrees(row: RunRow, engine: Engine) -> Read[Degrees]:
    """Degrees of a run. Raises CannotRead where the layout is not stated or contradicts the number of devices."""
    words = row.words("model_name", "notes")
    tp = row.tp or find_int(words, r"(?<![a-z])tp ?=? ?(\d+)")
    pp = row.pp or find_int(words, r"(?<![a-z])pp ?=? ?(\d+)")
    cp = row.cp or find_int(words, r"(?<![a-z])cp ?=? ?(\d+)") or 1
    dp, count = row.dp, row.n_gpus
    if tp is None and pp is None and dp is None and _fully_sharded(row, engine):
        tp = pp = 1
    tp, pp, dp = _complete(tp, pp, dp, cp, count)
    assumed: tuple[str, ...] = ()
    counted = count is not None or row.dp is not None
    if count is None:
        dp, assumed = _assume_replicas(row, tp, pp, cp, dp)
    elif dp is None or tp * pp * cp * dp != count:
        dp, assumed = _repair_replicas(tp, pp, cp, dp, count)
    vp = (row.vp or find_int(words, r"\bvpp? ?(\d+) run") or 1) if pp > 1 else 1
    ep, etp, more = _experts(row, words, tp * cp * dp)
    return Degrees(tp=tp, cp=cp, pp=pp, vp=vp, dp=dp, ep=ep, etp=etp, counted=counted), (*assumed, *more)


def _fully_sharded(row: RunRow, engine: Engine) -> bool:
    return engine.zero_stage >= 2 or has(row.words("zero_or_fsdp"), FULLY_SHARDED)


def _complete(
    tp: int | None, pp: int | None, dp: int | None, cp: int, count: int | None
) -> tuple[int, int, int | None]:
    """Fill one missing degree from the others. Raises CannotRead where two are missing."""
    if count == 1:
        return tp or 1, pp or 1, dp or 1
    if tp is None and pp is None:
        raise CannotRead("the layout is not stated (tp, pp)")
    if dp is not None and count is not None and (tp is None or pp is None):
        stated = (tp or 1) * (pp or 1) * dp * cp
        if count % stated == 0:
            missing = count // stated
            return tp or missing, pp or missing, dp
    if tp is None or pp is None:
        raise CannotRead(f"the layout is not stated ({'tp' if tp is None else 'pp'})")
    return tp, pp, dp


def _assume_replicas(row: RunRow, tp: int, pp: int, cp: int, dp: int | None) -> Read[int]:
    if dp is not None:
        return dp, ()
    per_node = row.gpus_per_node or 8
    least = max(1, (row.ep or 1) // (tp * cp), -(-per_node // (tp * pp * cp)))
    return least, (f"number of devices not stated: {tp * pp * cp * least} assumed (dp={least})",)


def _repair_replicas(tp: int, pp: int, cp: int, dp: int | None, count: int) -> Read[int]:
    if count % (tp * pp * cp) == 0:
        found = count // (tp * pp * cp)
        return found, () if dp is None else (f"stated dp={dp} does not multiply out: dp={found}",)
    raise CannotRead(f"tp={tp} * pp={pp} * cp={cp} does not divide {count} devices")


def _experts(row: RunRow, words: str, stage: int) -> tuple[int, int, tuple[str, ...]]:
    """(ep, etp, assumptions). Megatron-Core's command line divides experts over tp ranks unless told otherwise."""
    assumed: list[str] = []
    ep = row.ep or find_int(words, r"(?<![a-z])ep ?=? ?(\d+)") or 1
    if row.n_experts is not None and row.n_experts % ep:
        assumed.append(f"ep={ep} does not divide {row.n_experts} experts: ep={math.gcd(ep, row.n_experts)}")
        ep = math.gcd(ep, row.n_experts)
    etp = find_int(words, r"etp ?=? ?(\d+)")
    flags = has(words, r"flags:")
    if etp is None:
        etp = (row.tp or 1) if flags else 1
        if etp > 1 and stage % (ep * etp):
            etp = 1
    if stage % (ep * etp) and stage % ep == 0:
        assumed.append(f"etp={etp} does not fit {stage} ranks of a stage: etp=1")
        etp = 1
    if stage % (ep * etp):
        fitting = math.gcd(ep, stage)
        assumed.append(f"ep={ep} does not divide the {stage} ranks of a stage: ep={fitting}")
        ep, etp = fitting, 1
    return ep, etp, tuple(assumed)


def with_virtual_stages(degrees: Degrees, vp: int) -> Degrees:
    """The same degrees with another number of virtual stages."""
    return replace(degrees, vp=vp if degrees.pp > 1 else 1)
