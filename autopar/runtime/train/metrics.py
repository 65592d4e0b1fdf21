"""What training tells of its steps: a line for people, rows of metrics.csv, TensorBoard. Needs no torch.

Steps are numbered by how many are done: the first is 1, and a checkpoint of step 100 has 100 of them behind it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from costmodels.units import GIB, format_bytes

METRICS, VALIDATION = "metrics.csv", "validation.csv"
METRIC_COLUMNS = (
    "step", "loss", "grad_norm", "learning_rate", "step_ms", "tokens_per_s", "mfu", "memory_gib",
)  # fmt: skip
VALIDATION_COLUMNS = ("step", "loss", "perplexity")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step.

    Attributes:
        step: steps done, with this one.
        loss: mean of the global batch.
        grad_norm: of the whole gradient, before it was clipped; None if unknown.
        learning_rate: that it was made with.
        seconds: of the slowest rank.
        tokens_per_s: of all ranks.
        mfu: useful FLOP/s over the peak of all devices; None without a peak.
        memory_bytes: peak of the fullest rank so far; None if unknown.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    seconds: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRecord:
    """Mean loss over the validation samples after a step."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def log_line(records: Sequence[StepRecord], steps: int) -> str:
    """The last of some steps as a line; its time is the median of them all."""
    last, seconds = records[-1], sorted(record.seconds for record in records)[len(records) // 2]
    rate = last.tokens_per_s * last.seconds / seconds
    parts = [f"step {last.step:>{len(str(steps))}}/{steps}", f"loss {last.loss:.4f}"]
    if last.grad_norm is not None:
        parts.append(f"grad norm {last.grad_norm:.3g}")
    parts += [f"lr {last.learning_rate:.2e}", f"{seconds * 1e3:.4g} ms", f"{rate:,.0f} tokens/s"]
    if last.mfu is not None:
        parts.append(f"MFU {last.mfu * last.seconds / seconds:.1%}")
    if last.memory_bytes is not None:
        parts.append(f"memory {format_bytes(last.memory_bytes)}")
    return "  ".join(parts)


def validation_line(record: ValidationRecord, steps: int) -> str:
    """An evaluation as a line."""
    return f"step {record.step}/{steps}  validation loss {record.loss:.4f}  perplexity {record.perplexity:.4g}"


class CsvFile:
    """A CSV file whose first column is the step. Rows of steps after ``steps_done``, of an earlier try, are dropped.

    Raises:
        InputError: the file is there with other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], steps_done: int) -> None:
        self._path, self._columns = path, columns
        kept: list[dict[str, str]] = []
        if steps_done and path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                if tuple(reader.fieldnames or ()) != tuple(columns):
                    raise InputError(f"{path} has other columns than {', '.join(columns)}: move it away")
                # The last row may be torn.
                kept = [row for row in reader if row[columns[-1]] is not None and int(row["step"]) <= steps_done]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(kept)

    def append(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add rows; None is an empty cell."""
        with self._path.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)


class Metrics:
    """All files of a run's metrics. For one rank only."""

    def __init__(self, folder: Path, *, steps_done: int, tensorboard: bool) -> None:
        self._steps = CsvFile(folder / METRICS, METRIC_COLUMNS, steps_done)
        self._validation = CsvFile(folder / VALIDATION, VALIDATION_COLUMNS, steps_done)
        self._board = open_tensorboard(folder / "tensorboard", steps_done) if tensorboard else None

    def add_steps(self, records: Sequence[StepRecord]) -> None:
        """Write steps down."""
        self._steps.append(
            (
                r.step, f"{r.loss:.8g}", _cell(r.grad_norm, ".8g"), f"{r.learning_rate:.8g}", f"{r.seconds * 1e3:.3f}",
                f"{r.tokens_per_s:.1f}", _cell(r.mfu, ".5f"),
                _cell(None if r.memory_bytes is None else r.memory_bytes / GIB, ".5f"),
            )
            for r in records
        )  # fmt: skip
        if self._board is not None:
            for r in records:
                values = {
                    "train/loss": r.loss, "train/grad_norm": r.grad_norm, "train/learning_rate": r.learning_rate,
                    "speed/step_ms": r.seconds * 1e3, "speed/tokens_per_s": r.tokens_per_s, "speed/mfu": r.mfu,
                    "memory/peak_gib": None if r.memory_bytes is None else r.memory_bytes / GIB,
                }  # fmt: skip
                for name, value in values.items():
                    if value is not None:
                        self._board.add_scalar(name, value, r.step)

    def add_validation(self, record: ValidationRecord) -> None:
        """Write an evaluation down."""
        self._validation.append([(record.step, f"{record.loss:.8g}", f"{record.perplexity:.8g}")])
        if self._board is not None:
            self._board.add_scalar("validation/loss", record.loss, record.step)
            self._board.add_scalar("validation/perplexity", record.perplexity, record.step)

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._board is not None:
            self._board.close()


def open_tensorboard(folder: Path, steps_done: int) -> Any:
    """A writer of event files, by the package tensorboard; what an earlier try wrote after ``steps_done`` is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
