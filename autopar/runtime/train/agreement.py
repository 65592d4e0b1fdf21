"""What ranks agree on while they train, over the hosts and so without waiting for devices."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

EAGER_STEPS = 32
POLL_S = 1.0


class Hosts:
    """All ranks' processors, for small numbers that must not queue behind the step's work on the devices."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def gather(self, values: Sequence[float]) -> torch.Tensor:
        """As many values of every rank: float64 [ranks, values], the same on all of them."""
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine, group=self._group)
        return torch.stack(everyone)

    def any(self, values: Sequence[bool]) -> list[bool]:
        """Which of the values are true on some rank."""
        return [bool(x) for x in self.gather([float(v) for v in values]).amax(dim=0)]


@dataclass(kw_only=True, slots=True)
class Stop:
    """Whether this rank was told to stop."""

    asked: bool = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Take SIGTERM, which a cluster's scheduler sends before it takes the machines away, as a wish to stop soon."""
    stop = Stop()

    def note(number: int, frame: object) -> None:
        stop.asked = True

    usual = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, usual)


class Poll:
    """Every second or so, the ranks ask one another whether one of them was told to stop, and what the clock says.

    In the first steps, where runs are stopped most often, they ask after each of them.
    The steps at which they ask follow from the step times that all of them know, so all ask at the same ones.
    """

    def __init__(self, hosts: Hosts, stop: Stop, save_every_s: float) -> None:
        self._hosts, self._stop, self._save_every_s = hosts, stop, save_every_s
        self._every, self._saved = 1, time.monotonic()

    def learn(self, step_s: float) -> None:
        """Take a step time that is the same on all ranks."""
        self._every = max(1, int(POLL_S / max(step_s, 1e-6)))

    def ask(self, step: int) -> tuple[bool, bool]:
        """After a step: whether to stop, and whether it is time for a checkpoint; the same on all ranks."""
        if step >= EAGER_STEPS and step % self._every:
            return False, False
        late = self._save_every_s > 0 and time.monotonic() - self._saved > self._save_every_s
        stop, save = self._hosts.any([self._stop.asked, late])
        if save:
            self._saved = time.monotonic()
        return stop, save
