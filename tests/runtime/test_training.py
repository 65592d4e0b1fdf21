"""Real training under a plan: equal to a plain loop, told in files and lines, stopped and gone on with."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.cli import run as cli
from autopar.errors import EXIT_OK, EXIT_USAGE, InputError
from autopar.measurement import Measurement, read_measurement
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import PlanFile, parse_slug, write_plan_file
from autopar.runtime.data.corpus import training_samples
from autopar.runtime.identity import differences, identity
from autopar.runtime.job import Data, Evaluation, Logging, RateSchedule, Saving, Training, TrainJob, check_job
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.launch.progress import read_statuses
from autopar.runtime.outcome import Outcome, read_outcome
from autopar.runtime.rates import Decay, rate_at
from autopar.runtime.run import put_aside, run_training
from autopar.workload import Precision, Workload

GPT = ModelSpec(
    name="tiny-gpt", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=256,
    max_seq_len=32, fused_qkv=False,
)  # fmt: skip
WORKLOAD = Workload(global_batch=8, seq_len=32, precision=Precision.FP32)
RATE = RateSchedule(decay=Decay.COSINE, warmup_steps=3)
STEPS, PEAK_RATE, CLIP, DECAY, SHARE, BATCHES = 14, 1e-2, 0.5, 0.1, 0.02, 2
TOLERANCE = 1e-5
FLOPS, PEAK_FLOPS = 1e9, 1e10


def job(folder: Path, slug: str, **changes: Any) -> TrainJob:
    training = Training(
        rate=RATE,
        evaluation=Evaluation(every=6, batches=BATCHES),
        saving=Saving(every_steps=5),
        logging=Logging(every=4, flops_per_step=FLOPS, peak_flops=PEAK_FLOPS),
    )
    fields: dict[str, Any] = {
        "model": GPT, "workload": WORKLOAD, "plans": (parse_slug(slug),), "steps": STEPS, "out_dir": str(folder),
        "learning_rate": PEAK_RATE, "weight_decay": DECAY, "clip": CLIP, "data": Data(validation=SHARE),
        "training": training,
    }  # fmt: skip
    return TrainJob(**{**fields, **changes})


def rows(folder: Path, name: str = "metrics.csv") -> list[dict[str, float]]:
    with (folder / name).open(newline="") as stream:
        return [{key: float(cell or "nan") for key, cell in row.items()} for row in csv.DictReader(stream)]


def plain_loop() -> tuple[list[float], list[float], dict[int, float]]:
    """Losses, gradient norms and validation losses of an ordinary loop in one process."""
    module = build(GPT)
    samples, held_out = training_samples(
        "", WORKLOAD.seq_len, validation=SHARE, validation_sequences=BATCHES * WORKLOAD.global_batch, seed=0
    )
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim == 1]
    update = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], lr=PEAK_RATE
    )
    losses, norms, validations = [], [], {}

    def loss_of(rows: Any) -> torch.Tensor:
        tokens = torch.from_numpy(rows)
        return language_model_loss(module(tokens[:, :-1]), tokens[:, 1:])

    for step in range(STEPS):
        for group in update.param_groups:
            group["lr"] = rate_at(step, peak=PEAK_RATE, steps=STEPS, schedule=RATE)
        loss = loss_of(samples.rows(step * WORKLOAD.global_batch, WORKLOAD.global_batch))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP).item())
        update.step()
        update.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 6 == 0 or step + 1 == STEPS:
            with torch.no_grad():
                validations[step + 1] = loss_of(held_out.rows(0, BATCHES * WORKLOAD.global_batch)).item()
    return losses, norms, validations


def train(job: TrainJob, on_message: Any = None) -> tuple[Outcome, Measurement | None]:
    ranks = job.plans[0].layout.world_size
    return run_training(job, nodes=[local_node()], ranks_per_node=ranks, stall_timeout_s=120, on_message=on_message)


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float], dict[int, float]]:
    return plain_loop()


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_training_equals_a_plain_loop_and_tells_of_it(
    tmp_path: Path, reference: tuple[list[float], list[float], dict[int, float]]
) -> None:
    messages: list[dict[str, Any]] = []
    outcome, measured = train(job(tmp_path, "dp2.z2.mb2"), messages.append)
    losses, norms, validations = reference
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in found] == pytest.approx(losses, abs=TOLERANCE)
    assert [row["grad_norm"] for row in found] == pytest.approx(norms, abs=100 * TOLERANCE)
    assert max(norms) > CLIP and losses[-1] < losses[0] - 1
    rates = [rate_at(step, peak=PEAK_RATE, steps=STEPS, schedule=RATE) for step in range(STEPS)]
    assert [row["learning_rate"] for row in found] == pytest.approx(rates, rel=1e-6)
    for row in found:
        assert row["mfu"] == pytest.approx(FLOPS / (row["step_ms"] / 1e3) / (2 * PEAK_FLOPS), rel=1e-2, abs=1e-5)
        assert row["tokens_per_s"] == pytest.approx(WORKLOAD.tokens / (row["step_ms"] / 1e3), rel=1e-2)
    told = rows(tmp_path, "validation.csv")
    assert {int(row["step"]): row["loss"] for row in told} == pytest.approx(validations, abs=TOLERANCE)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-5) for row in told)
    assert outcome.loss == pytest.approx(losses[-1], abs=TOLERANCE) and not outcome.stopped
    assert (outcome.first_step, outcome.steps_done, outcome.tokens) == (0, STEPS, STEPS * WORKLOAD.tokens)
    lines = [str(m["line"]) for m in messages if m["event"] == "log"]
    numbers = [line.split("/")[0].split()[-1] for line in lines if "tokens/s" in line]
    assert numbers == ["1", "4", "8", "12", "14"]
    assert any("validation loss" in line for line in lines) and all(
        line in (tmp_path / "rank0.out").read_text() for line in lines
    )
    assert measured is not None and len(measured.step_s) == STEPS - 5
    assert measured.losses == pytest.approx(losses, abs=TOLERANCE) and len(measured.grad_norms) == STEPS
    assert {c.kind for c in measured.ranks[0].collectives} >= {"all_gather", "reduce_scatter"}
    assert found[-1]["memory_gib"] * 2**30 == pytest.approx(measured.peak_bytes, rel=1e-2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000014"]


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_stopped_and_gone_on_with_under_another_plan(
    tmp_path: Path, reference: tuple[list[float], list[float], dict[int, float]]
) -> None:
    """SIGTERM to one rank ends all of them well; another plan goes on where they were."""

    def stop_it(message: dict[str, Any]) -> None:
        if "step  1/" in message.get("line", ""):
            os.kill(read_statuses(tmp_path, 2)[1].pid, signal.SIGTERM)

    first, _ = train(job(tmp_path, "pp2.mb2"), stop_it)
    assert first.stopped and 1 <= first.steps_done < STEPS
    assert read_outcome(tmp_path) == first
    second, _ = train(job(tmp_path, "dp2.mb1"))
    assert (second.first_step, second.steps_done, second.stopped) == (first.steps_done, STEPS, False)
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(reference[0], abs=TOLERANCE)
    assert {int(r["step"]): r["loss"] for r in rows(tmp_path, "validation.csv")} == pytest.approx(
        reference[2], abs=TOLERANCE
    )
    with pytest.raises(InputError, match=r"step 14, is of another training: model\.ffn_size is 64 there, 128 here"):
        train(job(tmp_path, "dp2.mb1", model=dataclasses.replace(GPT, ffn_size=128)))
    put_aside(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints.1").is_dir() and not (tmp_path / "checkpoints").exists()


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("a line of text that a model can learn by heart\n" * 400)
    plan = parse_slug("mb4")
    predicted = {"step_s": 0.1, "mfu": 0.5, "memory_gib": 1.0}
    content = PlanFile(slug=plan.slug, model=GPT, workload=WORKLOAD, plan=plan, predicted=predicted)
    write_plan_file(tmp_path / "plan.json", content)
    command = ["run", str(tmp_path / "plan.json"), "--data", str(text), "-o", str(out), "--device", "cpu"]
    options = ["--steps", "8", "--lr", "0.01", "--eval-every", "4", "--eval-batches", "1", "--validation", "0.1"]
    assert cli([*command, *options, "--json"]) == EXIT_OK
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["steps_done"] == 8 and found["loss"] < found["measured"]["losses"][0] - 0.5
    assert found["validation_loss"] < 5 and "MFU: 3 x forward" in printed.err and "step 1/8" in printed.err
    assert read_measurement(out / plan.slug / "measurement.json").model == GPT
    assert cli([*command, *options, "--seed", "1"]) == EXIT_USAGE
    assert "seed is 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": (parse_slug("dp2.mb1"), parse_slug("dp2.mb2"))}, "under one plan, not 2"),
        ({"steps": 2}, "warm-up of 3 steps does not fit"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"data": Data(validation=1.0)}, "between 0 and 1, not 1.0"),
        ({"data": Data(tokens="nowhere")}, "no such file"),
        ({"training": Training(saving=Saving(keep=0))}, "keeps none"),
        ({"training": Training(logging=Logging(every=0))}, "not 0"),
        ({"training": Training(evaluation=Evaluation(every=1, batches=0))}, "at least one batch"),
        ({"training": Training(rate=RateSchedule(minimum=2.0))}, "share of the highest"),
    ],
)
def test_impossible_trainings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_job(job(tmp_path, "dp2.mb1", **changes), 2)
    assert message in str(caught.value)


def test_what_makes_a_training_another_one(tmp_path: Path) -> None:
    one = identity(job(tmp_path, "dp2.mb1"))
    assert differences(one, identity(job(tmp_path, "pp2.mb2", steps=99, learning_rate=1.0))) == []
    assert differences(one, identity(job(tmp_path, "dp2.mb1", seed=3))) == ["seed is 0 there, 3 here"]
    other = dataclasses.replace(WORKLOAD, global_batch=16)
    assert differences(one, identity(job(tmp_path, "dp2.mb1", workload=other))) == [
        "workload.global_batch is 8 there, 16 here"
    ]
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b is 1 there, None here", "a.c is None there, 2 here"]


def test_tokenize_command(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello world\n" * 100)
    script = "import sys; from autopar.cli import run; run(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", script, "tokenize", str(tmp_path), "-o", str(tmp_path / "tokens")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1,200 tokens (uint8) of 1 files" in done.stdout
