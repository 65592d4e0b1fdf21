"""Checkpoints of a training run: when they are due, what they hold beside weights and moments, going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autopar.runtime.identity import check_identity, identity
from autopar.runtime.job import CHECKPOINTS, Saving, TrainJob
from autopar.runtime.trainer import Trainer


class Saver:
    """Writes checkpoints and reads the newest.

    The random state needs no place in them: what a step draws is a function of seed and step (``Trainer.step``).

    Attributes:
        folder: where they are.
    """

    def __init__(self, job: TrainJob, saving: Saving) -> None:
        self._job, self._saving = job, saving
        self.folder = Path(job.out_dir) / CHECKPOINTS
        self._checkpoints: Any = None
        if saving.any:
            from autopar.runtime.checkpoint import Checkpoints

            self._checkpoints = Checkpoints(self.folder, keep=saving.keep, asynchronous=saving.asynchronous)
        self._last = -1

    def resume(self, trainer: Trainer) -> int:
        """Bring the trainer to the newest checkpoint if there is one. Collective.

        Returns:
            Global index of the next sample.

        Raises:
            InputError: the checkpoint is of another model, workload or data.
        """
        if not self._saving.resume or self._checkpoints is None:
            return 0
        loaded = self._checkpoints.load_latest(trainer.model, trainer.optimizer)
        if loaded is None:
            return 0
        check_identity(loaded.state["identity"], self._job, f"{self.folder}, step {loaded.step},")
        trainer.next_step = self._last = loaded.step
        return int(loaded.state["next_sample"])

    def due(self, steps_done: int, *, late: bool, ending: bool) -> bool:
        """Whether to save now. ``late``: the interval of time is over; ``ending``: no step will follow."""
        every = self._saving.every_steps
        wanted = late or (every > 0 and steps_done % every == 0) or (ending and self._saving.at_end)
        return wanted and steps_done != self._last

    def save(self, trainer: Trainer, next_sample: int) -> None:
        """Write a checkpoint, or begin to. Collective."""
        state = {"identity": identity(self._job), "next_sample": next_sample, "plan": trainer.plan.slug}
        self._checkpoints.save(trainer.next_step, trainer.model, trainer.optimizer, state)
        self._last = trainer.next_step

    def finish(self) -> None:
        """Wait until everything is on the disk. Collective."""
        if self._checkpoints is not None:
            self._checkpoints.wait()
