"""Calls and bytes of collectives, added up by kind, axis and group size."""

from __future__ import annotations

from autopar.measurement import CountedCollective

Key = tuple[str, str, int]


class Ledger:
    """Adds up calls and bytes of one rank, on top of what another ledger has; a group of one rank calls nothing."""

    def __init__(self, other: Ledger | None = None) -> None:
        self._calls: dict[Key, int] = dict(other._calls) if other else {}
        self._sizes: dict[Key, int] = dict(other._sizes) if other else {}

    def add(self, kind: str, axis: str, group: int, calls: float, num_bytes: float) -> None:
        """Note so many calls, of so many bytes in all."""
        if group > 1 and calls > 0:
            key = (kind, axis, group)
            self._calls[key] = self._calls.get(key, 0) + round(calls)
            self._sizes[key] = self._sizes.get(key, 0) + round(num_bytes)

    def entries(self) -> tuple[CountedCollective, ...]:
        """What was noted, in a fixed order."""
        return tuple(
            CountedCollective(
                kind=kind, axis=axis, group_size=group, count=self._calls[key], num_bytes=self._sizes[key]
            )
            for key in sorted(self._calls)
            for kind, axis, group in [key]
        )  # fmt: skip
