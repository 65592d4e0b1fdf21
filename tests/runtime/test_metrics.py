"""Learning rates, log lines and metrics files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.runtime.rates import Decay, RateSchedule, rate_at
from autopar.runtime.train.metrics import (
    METRIC_COLUMNS,
    CsvFile,
    Metrics,
    StepRecord,
    ValidationRecord,
    log_line,
    validation_line,
)


def rates(schedule: RateSchedule, steps: int) -> list[float]:
    return [rate_at(step, peak=2.0, steps=steps, schedule=schedule) for step in range(steps)]


def test_learning_rates() -> None:
    assert rates(RateSchedule(), 3) == [2.0, 2.0, 2.0]
    warm = rates(RateSchedule(warmup_steps=4), 6)
    assert warm == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    linear = rates(RateSchedule(decay=Decay.LINEAR, warmup_steps=1, minimum=0.0), 6)
    assert linear == pytest.approx([2.0, 2.0, 1.5, 1.0, 0.5, 0.0])
    cosine = rates(RateSchedule(decay=Decay.COSINE, minimum=0.1), 5)
    assert cosine == pytest.approx([2.0, 0.2 + 0.9 * (1 + math.sqrt(0.5)), 1.1, 0.2 + 0.9 * (1 - math.sqrt(0.5)), 0.2])
    assert rates(RateSchedule(decay=Decay.LINEAR, warmup_steps=3), 3)[-1] == 2.0


def record(step: int, **changes: float | None) -> StepRecord:
    fields: dict[str, float | int | None] = {
        "loss": 5.25, "grad_norm": 0.731, "learning_rate": 3e-4, "seconds": 0.5, "tokens_per_s": 2048.0,
        "mfu": 0.412, "memory_bytes": 3 * 2**29,
    }  # fmt: skip
    return StepRecord(step=step, **{**fields, **changes})  # type: ignore[arg-type]


def test_a_line_that_a_person_can_read() -> None:
    steps = [record(118, seconds=0.4, tokens_per_s=2560.0), record(119, seconds=0.4), record(120)]
    assert log_line(steps, 1000) == (
        "step  120/1000  loss 5.2500  grad norm 0.731  lr 3.00e-04  400 ms  2,560 tokens/s  MFU 51.5%  memory 1.50 GiB"
    )
    bare = record(3, grad_norm=None, mfu=None, memory_bytes=None)
    assert log_line([bare], 9) == "step 3/9  loss 5.2500  lr 3.00e-04  500 ms  2,048 tokens/s"
    assert (
        validation_line(ValidationRecord(step=3, loss=2.0), 9) == "step 3/9  validation loss 2.0000  perplexity 7.389"
    )
    assert ValidationRecord(step=1, loss=1e4).perplexity == math.inf


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_metrics_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, steps_done=0, tensorboard=False)
    metrics.add_steps([record(1), record(2, grad_norm=None), record(3)])
    metrics.add_validation(ValidationRecord(step=3, loss=1.0))
    found = rows(tmp_path / "metrics.csv")
    assert found[0] == {
        "step": "1", "loss": "5.25", "grad_norm": "0.731", "learning_rate": "0.0003", "step_ms": "500.000",
        "tokens_per_s": "2048.0", "mfu": "0.41200", "memory_gib": "1.50000",
    }  # fmt: skip
    assert found[1]["grad_norm"] == ""
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("4,5.0,0.7")  # torn by a kill
    Metrics(tmp_path, steps_done=2, tensorboard=False).add_steps([record(3, loss=7.0)])
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.csv")] == [
        ("1", "5.25"), ("2", "5.25"), ("3", "7"),
    ]  # fmt: skip
    assert rows(tmp_path / "validation.csv") == []
    Metrics(tmp_path, steps_done=0, tensorboard=False)
    assert rows(tmp_path / "metrics.csv") == []


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,mine\n1,2\n")
    with pytest.raises(InputError, match="has other columns"):
        CsvFile(tmp_path / "metrics.csv", METRIC_COLUMNS, 5)


def test_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, steps_done=0, tensorboard=True)
    metrics.add_steps([record(1), record(2, mfu=None)])
    metrics.add_validation(ValidationRecord(step=2, loss=1.5))
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 5.25), (2, 5.25)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(2, 1.5)]
    assert len(events.Scalars("speed/mfu")) == 1
