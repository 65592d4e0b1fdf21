"""The best plans that really differ."""

from __future__ import annotations

from autopar.estimate import Estimate, Setting
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import SearchResult, search
from autopar.search.space import Space


def top_answers(
    setting: Setting, *, top: int = 10, all_variants: bool = False, space: Space | None = None
) -> SearchResult:
    """The ``top`` fastest plans, of each answer (see ``distinct``) only the best; with ``all_variants`` raw ranks.

    Fewer where the space has no more answers. Raises NoFeasiblePlan.
    """
    return search(setting, top=top, space=space, distinct=not all_variants)


def distinct(ranked: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
    """Of ranked estimates the best of each answer, in order."""
    first: dict[tuple[int, ...], Estimate] = {}
    for candidate in ranked:
        first.setdefault(distinct_key(candidate.plan), candidate)
    return tuple(first.values())
