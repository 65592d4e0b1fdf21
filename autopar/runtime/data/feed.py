"""The next batch, made while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = Callable[[int, int], npt.NDArray[np.int64]]


class Feed:
    """This rank's shares of the global batches, one after another; a thread is always one batch ahead.

    Attributes:
        next_sample: global index of the first sample of the next batch: where training goes on from.
    """

    def __init__(
        self, rows: Rows, *, first_sample: int, global_batch: int, share: int, num_shares: int, device: torch.device
    ) -> None:
        self._rows, self._device = rows, device
        self._global_batch, self._size = global_batch, global_batch // num_shares
        self._offset = share * self._size
        self.next_sample = first_sample
        self._thread = ThreadPoolExecutor(1, "autopar-feed", initializer=_use_device, initargs=(device,))
        self._coming: Future[Tensor] = self._thread.submit(self._make, first_sample)

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def take(self) -> Tensor:
        """The next share, int64 [global batch / num_shares, seq_len + 1], on the device."""
        batch = self._coming.result()
        self.next_sample += self._global_batch
        self._coming = self._thread.submit(self._make, self.next_sample)
        # From pinned memory the copy is queued like a kernel; the allocator keeps the source until it is done.
        return batch.to(self._device, non_blocking=True)

    def _make(self, first_sample: int) -> Tensor:
        batch = torch.from_numpy(self._rows(first_sample + self._offset, self._size))
        return batch.pin_memory() if self._device.type == "cuda" else batch


def _use_device(device: torch.device) -> None:
    # A new thread is on the first device, where pinning would make a context.
    if device.type == "cuda":
        torch.cuda.set_device(device)
