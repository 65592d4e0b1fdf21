"""What a training run tells: files, lines and messages, all from rank 0. Needs no torch but for TensorBoard."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from autopar.runtime.job import Training, TrainJob
from autopar.runtime.launch.progress import send_message
from autopar.runtime.outcome import Outcome
from autopar.runtime.train.metrics import Metrics, StepRecord, ValidationRecord, log_line, validation_line

TOLD_S = 0.2
KEPT_SECONDS = 10_000


class Reporter:
    """Every rank has one and calls it with the same numbers; only that of rank 0 says anything.

    Messages: ``step`` (``step``, ``steps``), at most five a second; ``log`` with a ``line`` to be shown.
    """

    def __init__(self, job: TrainJob, training: Training, steps_done: int) -> None:
        self._job, self._slug, self._speaks = job, job.plans[0].slug, os.environ.get("RANK", "0") == "0"
        self._metrics = (
            Metrics(Path(job.out_dir), steps_done=steps_done, tensorboard=training.logging.tensorboard)
            if self._speaks
            else None
        )
        self._every, self._first_step = training.logging.every, steps_done
        self._untold: list[StepRecord] = []
        self._told = 0.0
        self._last: StepRecord | None = None
        self._validation: ValidationRecord | None = None
        self._seconds: deque[float] = deque(maxlen=KEPT_SECONDS)

    def begin(self, step: int) -> None:
        """A step begins (numbered from 0)."""
        now = time.monotonic()
        if self._speaks and (now - self._told > TOLD_S or step + 1 == self._job.steps):
            self._told = now
            send_message({"event": "step", "slug": self._slug, "step": step, "steps": self._job.steps})

    def add_steps(self, records: Sequence[StepRecord]) -> None:
        """Tell of steps: in the files at once, in a line when it is time for one."""
        self._untold.extend(records)
        self._seconds.extend(record.seconds for record in records)
        if self._metrics is not None:
            self._metrics.add_steps(records)
        last = self._last = records[-1]
        if last.step % self._every == 0 or last.step in (self._first_step + 1, self._job.steps):
            self.say(log_line(self._untold, self._job.steps))
            self._untold.clear()

    def add_validation(self, record: ValidationRecord) -> None:
        """Tell of an evaluation."""
        self._validation = record
        if self._metrics is not None:
            self._metrics.add_validation(record)
            self.say(validation_line(record, self._job.steps))

    def say(self, line: str) -> None:
        """Show a line: on the rank's output, and to the launcher."""
        if self._speaks:
            print(line, flush=True)
            send_message({"event": "log", "slug": self._slug, "line": line})

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()

    def outcome(self, *, first_step: int, steps_done: int, stopped: bool) -> Outcome:
        """How the run ended."""
        seconds = sorted(self._seconds)
        return Outcome(
            plan=self._slug,
            first_step=first_step,
            steps_done=steps_done,
            steps=self._job.steps,
            stopped=stopped,
            loss=self._last.loss if self._last else None,
            validation_loss=self._validation.loss if self._validation else None,
            step_s=seconds[len(seconds) // 2] if seconds else None,
            tokens=steps_done * self._job.workload.tokens,
        )
