"""The ranks that write and read a checkpoint together: what one of them cannot do, none of them has done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from autopar.errors import InputError, RunError
from autopar.runtime.checkpoint.manifest import Damaged

T = TypeVar("T")
NAMED_RANKS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This rank among all.

    Attributes:
        rank: this one.
        size: how many there are.
        group: of all of them, on CPU memory and for checkpoints alone, so that a thread may use it; None for one rank.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in order. Raises RunError if one of them is gone."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        with self._all_present():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def collect(self, value: T) -> list[T] | None:
        """On rank 0, what every rank gives, in order. Raises RunError if one of them is gone."""
        if self.group is None:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._all_present():
            dist.gather_object(value, found, group=self.group, group_dst=0)
        return found

    def together(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result of an action, or one and the same error on all ranks.

        Raises:
            Damaged, InputError: that is what every rank says which has an error.
            RunError: something else failed; the message names the ranks.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        outcomes = self.gather((result, None if error is None else _told(error), _kind(error)))
        errors = [(rank, said, kind) for rank, (_, said, kind) in enumerate(outcomes) if said is not None]
        if not errors:
            return [result for result, _, _ in outcomes]  # type: ignore[misc]
        kinds = {kind for _, _, kind in errors}
        if kinds == {Damaged}:
            raise Damaged("; ".join(dict.fromkeys(said for _, said, _ in errors))) from error
        if kinds == {InputError}:
            raise InputError(errors[0][1]) from error
        more = f"; and {len(errors) - NAMED_RANKS} more ranks" if len(errors) > NAMED_RANKS else ""
        raise RunError("; ".join(f"rank {rank}: {said}" for rank, said, _ in errors[:NAMED_RANKS]) + more) from error

    def each(self, action: Callable[[], T]) -> T:
        """This rank's result of an action that succeeds on all ranks; else as ``together``, which sends results."""
        kept: list[T] = []
        self.together(lambda: kept.append(action()))
        return kept[0]

    @contextmanager
    def _all_present(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RunError(f"another rank is gone: {str(error).splitlines()[0]}") from error


def all_ranks() -> Ranks:
    """All ranks there are; every one of them calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks(rank=0, size=1, group=None)
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), group=dist.new_group(backend="gloo"))


def _kind(error: Exception | None) -> type[Exception]:
    return next((kind for kind in (Damaged, InputError) if isinstance(error, kind)), Exception)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
