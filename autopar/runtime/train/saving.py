"""Checkpoints of a training run: when they are due, what they hold beside the model, going on from one."""

from __future__ import annotations

from collections.abc import Callable

from autopar.runtime.checkpoint import Checkpoints
from autopar.runtime.identity import check_identity, identity
from autopar.runtime.job import Saving, TrainJob
from autopar.runtime.step.trainer import Trainer


class Saver:
    """Writes checkpoints and reads the newest. Every rank calls its methods at the same steps.

    Attributes:
        folder: where they are.
        skipped: newer checkpoints that could not be used, each with what is wrong with it, once ``resume`` has looked.
        plan: slug of the plan under which the one was written that the run goes on from; empty if it begins anew.
    """

    def __init__(self, job: TrainJob, saving: Saving, tick: Callable[[str], None]) -> None:
        self._job, self._saving, self.folder = job, saving, job.checkpoint_folder
        self._checkpoints: Checkpoints | None = None
        if saving.any:
            self._checkpoints = Checkpoints(
                self.folder, keep=saving.keep, asynchronous=saving.asynchronous, tick=lambda: tick("checkpoint")
            )
        self._last, self.plan = -1, ""
        self.skipped: tuple[str, ...] = ()

    def resume(self, trainer: Trainer) -> int:
        """Bring the trainer to the newest checkpoint, if there is one.

        Returns:
            Global index of the next sample.

        Raises:
            InputError: the checkpoint is of another model, workload or data.
        """
        loaded = self._checkpoints.load_latest(trainer.model, trainer.optimizer) if self._checkpoints else None
        if loaded is None:
            return 0
        self.skipped = loaded.skipped
        check_identity(loaded.state["identity"], self._job, f"{self.folder}, step {loaded.step},")
        trainer.next_step = self._last = loaded.step
        self.plan = loaded.plan
        return int(loaded.state["next_sample"])

    def due(self, steps_done: int, *, late: bool, ending: bool) -> bool:
        """Whether to save now. ``late``: the interval of time is over; ``ending``: no step will follow."""
        every = self._saving.every_steps
        wanted = late or (every > 0 and steps_done % every == 0) or (ending and self._saving.at_end)
        return wanted and steps_done != self._last

    def save(self, trainer: Trainer, next_sample: int) -> None:
        """Write a checkpoint, or begin to."""
        assert self._checkpoints is not None
        state = {"identity": identity(self._job), "next_sample": next_sample}
        self._checkpoints.save(trainer.next_step, trainer.model, trainer.optimizer, state)
        self._last = trainer.next_step

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()
