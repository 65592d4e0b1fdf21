"""Results that are thrown away in forward and made again in backward, for those who need them there.

``torch.utils.checkpoint`` frees what lies inside a function, but not its result, which the next operation keeps. A norm
before a product has little else. Here whoever would keep the result keeps a note of how to make it: backward then runs
the function once more, from its kept arguments, and serves from that both its own backward and the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.private import storage_of

Forward = Callable[..., Tensor]


class _Run:
    """One call of a function whose result is thrown away."""

    def __init__(self, forward: Forward, arguments: Sequence[Any]) -> None:
        self._forward, self._arguments = forward, arguments
        self._gradients = [isinstance(argument, _Result) or argument.requires_grad for argument in arguments]
        self._num_inside = self._pending = 0
        self._again: tuple[list[Tensor], Tensor] | None = None

    def pack(self, tensor: Tensor) -> _Inside:
        """Keep, of what its own backward needs, the place among all of that."""
        self._num_inside += 1
        return self.noted(_Inside(run=self, index=self._num_inside - 1))

    def noted(self, note: Any) -> Any:
        """A note that will be asked for once in backward."""
        self._pending += 1
        return note

    def served(self) -> tuple[list[Tensor], Tensor]:
        """What lies inside, and the result. Made when first asked for, and let go with the last note."""
        found = self._again or self._make()
        self._pending -= 1
        self._again = found if self._pending > 0 else None
        return found

    def _make(self) -> tuple[list[Tensor], Tensor]:
        inside: list[Tensor] = []

        def collect(tensor: Tensor) -> None:
            inside.append(tensor.detach())

        arguments = [
            unpack(argument).detach().requires_grad_(needs)
            for argument, needs in zip(self._arguments, self._gradients, strict=True)
        ]
        with torch.enable_grad(), saved_tensors_hooks(collect, _never):
            result = self._forward(*arguments)
        return inside, result.detach()


def _never(kept: Any) -> Tensor:
    raise AssertionError("nobody goes back through what is made again")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inside:
    """A tensor that the function's backward needs."""

    run: _Run
    index: int

    def tensor(self) -> Tensor:
        return self.run.served()[0][self.index]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """A view of the function's result, ``like`` a DTensor or not."""

    run: _Run
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    placed: Callable[[Tensor], Tensor]

    def tensor(self) -> Tensor:
        return self.placed(self.run.served()[1].as_strided(self.size, self.stride, self.offset))


def unpack(kept: Any) -> Tensor:
    """The tensor that a note stands for; tensors as they are."""
    tensor: Tensor = kept if isinstance(kept, Tensor) else kept.tensor()
    return tensor


@dataclass(kw_only=True, slots=True)
class Remaker:
    """Results that are thrown away during one pass through a block."""

    _runs: dict[Hashable, _Run] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Any:
        """A note instead of a result that is thrown away; other tensors as they are."""
        local = local_tensor(tensor)
        run = self._runs.get(storage_of(local))
        if run is None:
            return tensor
        return run.noted(
            _Result(
                run=run,
                size=tuple(local.shape),
                stride=local.stride(),
                offset=int(local.storage_offset()),
                placed=_like(tensor),
            )
        )

    def call(self, forward: Forward, *arguments: Tensor) -> Tensor:
        """Call a function whose result is to be thrown away."""
        run = _Run(forward, [self.pack(argument) for argument in arguments])
        with saved_tensors_hooks(run.pack, unpack):
            result = forward(*arguments)
        self._runs[storage_of(local_tensor(result))] = run
        return result

    def call_recomputed(self, forward: Forward, preserve_rng_state: bool, *arguments: Tensor) -> Tensor:
        """Call a function that is recomputed, of whose arguments some may be thrown away."""
        given, kept = list(arguments), [self.pack(argument) for argument in arguments]

        def run() -> Tensor:
            values = given or [unpack(argument).detach().requires_grad_() for argument in kept]
            inputs = list(values)
            given.clear()
            return forward(*inputs)

        result: Tensor = checkpoint(run, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        return result


def _like(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    if not isinstance(tensor, DTensor):
        return _as_it_is
    return partial(
        DTensor.from_local, device_mesh=tensor.device_mesh, placements=tensor.placements, run_check=False,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Remaking:
    """Lets a block throw away results of some of its modules.

    Args:
        block: whose pass begins and ends with its forward.
        thrown: modules whose result is made again.
        recomputed: modules that are recomputed, with whether their random state has to be restored for that.
    """

    def __init__(
        self, block: nn.Module, thrown: Sequence[nn.Module], recomputed: Sequence[tuple[nn.Module, bool]]
    ) -> None:
        self._current = Remaker()
        block.forward = partial(self._pass, block.forward)  # type: ignore[method-assign]
        for module in thrown:
            module.forward = partial(self._thrown, module.forward)  # type: ignore[method-assign]
        for module, random in recomputed:
            module.forward = partial(self._recomputed, module.forward, random)  # type: ignore[method-assign]

    @contextmanager
    def _begun(self) -> Iterator[Remaker]:
        self._current = Remaker()
        yield self._current
        self._current = Remaker()

    def _pass(self, forward: Forward, *arguments: Tensor) -> Tensor:
        with self._begun() as remaker, saved_tensors_hooks(remaker.pack, unpack):
            return forward(*arguments)

    def _thrown(self, forward: Forward, *arguments: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return self._current.call(forward, *arguments)

    def _recomputed(self, forward: Forward, random: bool, *arguments: Tensor) -> Tensor:
        return self._current.call_recomputed(forward, random, *arguments)
