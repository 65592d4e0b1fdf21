"""Saving and loading a model, its optimizer, random states and the caller's state, by all ranks together."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from autopar.errors import InputError, RunError
from autopar.runtime.checkpoint import folder as folders
from autopar.runtime.checkpoint.contents import model_contents
from autopar.runtime.checkpoint.folder import Tick
from autopar.runtime.checkpoint.manifest import (
    Damaged,
    Manifest,
    Scalar,
    StoredFile,
    StoredTensor,
    read_manifest,
    write_manifest,
)
from autopar.runtime.checkpoint.ranks import Ranks, all_ranks
from autopar.runtime.checkpoint.reading import Reader
from autopar.runtime.checkpoint.restoring import restore
from autopar.runtime.checkpoint.snapshot import Snapshot, take_snapshot
from autopar.runtime.checkpoint.writing import merged, write_part
from autopar.runtime.parallel.parallel_model import ParallelModel

Numbers = Mapping[str, Mapping[str, Scalar]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a checkpoint says beside the model.

    Attributes:
        step: steps that were made before it.
        state: as it was given to ``save``.
        plan: slug of the plan that wrote it.
        skipped: newer checkpoints that could not be used, each with what is wrong with it.
    """

    step: int
    state: Mapping[str, Any]
    plan: str
    skipped: tuple[str, ...] = ()


class Checkpoints:
    """Checkpoints of one training run in one folder, which all nodes share.

    Every method is called by every rank at the same time. A checkpoint holds weights, persistent buffers, what the
    optimizer keeps per parameter, torch's random states and the caller's state; the optimizer's settings, such as its
    learning rate, are the caller's. It is read under any plan, on any number of ranks; types are kept, values are equal
    to the bit. Equal copies are each written once, by all the ranks that have them.

    Random states: under the layout that wrote them every rank goes on with its own. Under another one a rank goes on
    with that of the first rank which had the same share of the batch; if there are more shares than there were, the
    further ones are seeded anew from the step and their number.

    Args:
        folder: gets a directory per checkpoint.
        keep: how many whole ones are kept; older ones are removed once a new one is whole.
        asynchronous: ``save`` returns when the values are copied to host memory, and a thread writes them.
        tick: called as long work goes on, so that a watcher sees progress; from a thread if asynchronous.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, asynchronous: bool = False, tick: Tick | None = None
    ) -> None:
        if keep < 1:
            raise InputError(f"keep={keep}: at least one checkpoint is kept")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self._tick = tick
        self._ranks: Ranks | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, step: int, model: ParallelModel, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint. One that is still being written is waited for, and its error raised.

        Args:
            step: steps made so far.
            model: between two steps.
            optimizer: of its parameters; None to save none.
            state: anything that JSON can hold, such as the place in the data; rank 0's is kept.

        Raises:
            InputError: the state is not JSON, or the optimizer keeps what cannot be divided anew.
            RunError: a rank could not write, or is gone; earlier checkpoints are as they were.
        """
        self.wait()
        ranks = self._all_ranks()
        snapshot = take_snapshot(ranks, step, model, optimizer, state, copy=self.asynchronous)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._write_later, args=(snapshot, ranks), daemon=True)
            self._thread.start()
        else:
            self._write(snapshot, ranks)

    def wait(self) -> None:
        """Wait until nothing is being written any more. Raises RunError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load_latest(self, model: ParallelModel, optimizer: torch.optim.Optimizer | None) -> Loaded | None:
        """Read the newest whole checkpoint into the model and the optimizer, on every rank what it holds.

        A checkpoint that is torn or was altered is warned of by name, and the one before it is used.

        Args:
            model: under any plan, of the same parameters and types.
            optimizer: of its parameters, of the class that was saved; None to leave its state aside.

        Returns:
            What else it holds; None if the folder has no checkpoint at all.

        Raises:
            InputError: no checkpoint is whole, or it is one of another model or optimizer.
        """
        self.wait()
        ranks = self._all_ranks()
        steps = ranks.together(lambda: self._found() if ranks.rank == 0 else ())[0]
        skipped: list[str] = []
        for step in reversed(steps):
            path = folders.step_path(self.folder, step)
            try:
                manifest = self._read(path, model, optimizer, ranks)
            except Damaged as damaged:
                skipped.append(f"{path.name} is not used: {damaged}")
                if ranks.rank == 0:
                    warnings.warn(f"{self.folder}: {skipped[-1]}", stacklevel=2)
                continue
            return Loaded(step=manifest.step, state=manifest.state, plan=manifest.plan, skipped=tuple(skipped))
        if skipped:
            raise InputError(f"{self.folder} has no whole checkpoint: {'; '.join(skipped)}; start in another folder")
        return None

    def _all_ranks(self) -> Ranks:
        if self._ranks is None:
            self._ranks = all_ranks()
        return self._ranks

    def _found(self) -> tuple[int, ...]:
        folders.remove_unfinished(self.folder)
        return folders.saved_steps(self.folder)

    def _read(
        self, path: Path, model: ParallelModel, optimizer: torch.optim.Optimizer | None, ranks: Ranks
    ) -> Manifest:
        """Check a checkpoint, the ranks dividing its files, and read it. Raises Damaged on all ranks or none."""
        manifest = ranks.each(lambda: read_manifest(path))
        mine = range(ranks.rank, len(manifest.files), ranks.size)
        ranks.each(lambda: folders.check_files(path, manifest, mine, tick=self._tick))
        names = ranks.gather({content.name for content in model_contents(model)})
        reader = Reader(path, manifest, self._tick)
        ranks.each(lambda: restore(reader, manifest, model, optimizer, set().union(*names), ranks.rank))
        return manifest

    def _write_later(self, snapshot: Snapshot, ranks: Ranks) -> None:
        try:
            self._write(snapshot, ranks)
        except Exception as error:
            self._error = error

    def _write(self, snapshot: Snapshot, ranks: Ranks) -> None:
        """Write files, then the manifest, then give the directory its name. Until then nothing has happened."""
        step = snapshot.step
        path = folders.unfinished_path(self.folder, step)
        try:
            ranks.each(lambda: folders.begin(self.folder, step) if ranks.rank == 0 else None)
            files = ranks.together(lambda: self._write_part(path, snapshot, ranks))
            parts = ranks.collect((snapshot.part.tensors, snapshot.scalars))
            ranks.each(lambda: None if parts is None else self._complete(snapshot, files, parts))
            if ranks.rank == 0:
                self._remove_old(step)
        except (RunError, Damaged) as error:
            if ranks.rank == 0:
                with suppress(OSError):
                    shutil.rmtree(path, ignore_errors=True)
            raise RunError(f"the checkpoint of step {step} was not written: {error}; {self._others(step)}") from error

    def _write_part(self, path: Path, snapshot: Snapshot, ranks: Ranks) -> StoredFile:
        if not path.is_dir():
            raise RunError(f"rank 0 made {path.name}, but it is not there: all nodes must share {self.folder}")
        return write_part(path, ranks.rank, snapshot.part.values, self._tick)

    def _complete(
        self, snapshot: Snapshot, files: list[StoredFile], parts: list[tuple[tuple[StoredTensor, ...], Numbers]]
    ) -> None:
        scalars = {name: numbers for _, scalars in parts for name, numbers in scalars.items()}
        manifest = Manifest(
            step=snapshot.step, plan=snapshot.plan, model=snapshot.model, optimizer=snapshot.optimizer,
            date=datetime.now(UTC).isoformat(timespec="seconds"), files=tuple(files),
            tensors=merged([tensors for tensors, _ in parts]), scalars=scalars, state=snapshot.state,
        )  # fmt: skip
        path = folders.unfinished_path(self.folder, snapshot.step)
        for written in write_manifest(path, manifest):
            folders.flush_file(written)
        folders.check_files(path, manifest, range(len(files)), contents=False)
        folders.finish(self.folder, snapshot.step)

    def _remove_old(self, step: int) -> None:
        try:
            folders.remove_old(self.folder, step, self.keep)
        except OSError as error:
            warnings.warn(f"{self.folder}: old checkpoints could not be removed: {error}", stacklevel=2)

    def _others(self, step: int) -> str:
        others = [other for other in folders.saved_steps(self.folder) if other != step]
        names = ", ".join(str(other) for other in others)
        return f"{self.folder} still holds " + (f"those of steps {names}" if names else "none")
