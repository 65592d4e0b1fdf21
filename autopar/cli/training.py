"""``autopar run`` and ``tokenize``: training under a plan, and the text for it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli.cluster import (
    EmulateOption,
    Execution,
    InterfaceOption,
    MasterOption,
    NodeRankOption,
    NodesOption,
    train,
)
from autopar.cli.common import Device, JsonFlag, app, progress, say
from autopar.errors import InputError
from autopar.runtime.rates import Decay, RateSchedule

if TYPE_CHECKING:
    from autopar.measurement import Measurement
    from autopar.plan import PlanFile
    from autopar.runtime.job import Data, Logging
    from autopar.runtime.outcome import Outcome

TEXT, OPTIMIZATION, CHECKPOINTS, OUTPUT = "Text", "Optimization", "Checkpoints", "Log and files"
EXECUTION = "Execution"

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data", rich_help_panel=TEXT, show_default="Python's standard library",
        help="Text file, folder or glob (may be repeated), or one folder written by `autopar tokenize`.",
    ),
]  # fmt: skip
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", rich_help_panel=TEXT, help="tokenizer.json; bytes without one.")
]


@app.command("run")
def run_plan(
    plan_file: Annotated[Path, typer.Argument(help="plan.json, as `autopar plan -o` and `autopar demo` write it.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")] = 100,
    model: Annotated[
        str, typer.Option("--model", help="Module to train: Hugging Face config.json or package.module:function.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of samples.")] = 0,
    data: DataOption = None,
    tokenizer: TokenizerOption = "",
    validation: Annotated[
        float, typer.Option(rich_help_panel=TEXT, help="Share of the text kept for evaluations.")
    ] = 0.05,
    eval_every: Annotated[
        int, typer.Option(min=0, rich_help_panel=TEXT, help="Steps between evaluations; 0 for none.")
    ] = 0,
    eval_batches: Annotated[
        int, typer.Option(min=1, rich_help_panel=TEXT, help="Global batches of an evaluation.")
    ] = 8,
    learning_rate: Annotated[
        float, typer.Option("--lr", min=0, rich_help_panel=OPTIMIZATION, help="Highest learning rate.")
    ] = 3e-4,
    schedule: Annotated[
        Decay, typer.Option(rich_help_panel=OPTIMIZATION, help="Learning rate after the warm-up.")
    ] = Decay.COSINE,
    warmup_steps: Annotated[
        int, typer.Option(min=0, rich_help_panel=OPTIMIZATION, help="Steps of linear warm-up.")
    ] = 0,
    min_lr: Annotated[
        float, typer.Option(min=0, max=1, rich_help_panel=OPTIMIZATION, help="Last learning rate, as a share of --lr.")
    ] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=OPTIMIZATION, help="Of AdamW.")] = 0.1,
    beta2: Annotated[float, typer.Option(min=0, rich_help_panel=OPTIMIZATION, help="Of AdamW.")] = 0.95,
    clip: Annotated[
        float, typer.Option(min=0, rich_help_panel=OPTIMIZATION, help="Greatest gradient norm; 0 for no limit.")
    ] = 1.0,
    save_every: Annotated[
        int, typer.Option(min=0, rich_help_panel=CHECKPOINTS, help="Steps between checkpoints; 0 for none by steps.")
    ] = 0,
    save_minutes: Annotated[
        float, typer.Option(min=0, rich_help_panel=CHECKPOINTS, help="Minutes between checkpoints; 0 for none by time.")
    ] = 30,
    save_end: Annotated[
        bool, typer.Option(rich_help_panel=CHECKPOINTS, help="One at the end, and when told to stop (SIGTERM).")
    ] = True,
    keep: Annotated[int, typer.Option(min=1, rich_help_panel=CHECKPOINTS, help="Checkpoints that stay.")] = 2,
    async_save: Annotated[
        bool, typer.Option("--async-save", rich_help_panel=CHECKPOINTS, help="Write while training goes on.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(rich_help_panel=CHECKPOINTS, help="Go on from the newest checkpoint in --out.")
    ] = True,
    out: Annotated[
        Path, typer.Option("-o", "--out", rich_help_panel=OUTPUT, help="Folder for metrics, checkpoints and logs.")
    ] = Path("runs"),
    log_every: Annotated[int, typer.Option(min=1, rich_help_panel=OUTPUT, help="Steps between log lines.")] = 10,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", rich_help_panel=OUTPUT, help="Write event files as well.")
    ] = False,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=OUTPUT, help="Of one device, for MFU; by default that of the prediction."),
    ] = None,
    as_json: JsonFlag = False,
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", rich_help_panel=EXECUTION, help="Compile the model's blocks (torch.compile).")
    ] = False,
    self_check: Annotated[
        bool, typer.Option(rich_help_panel=EXECUTION, help="Hold the plan to one process before the first step.")
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(min=1, rich_help_panel=EXECUTION, help="Seconds without progress after which all ranks end."),
    ] = 180,
    max_restarts: Annotated[
        int, typer.Option(min=0, rich_help_panel=EXECUTION, help="Times to go on from the last checkpoint by itself.")
    ] = 3,
    elastic: Annotated[
        int, typer.Option(min=0, rich_help_panel=EXECUTION, help="Then plan anew, for at least so many ranks; 0 never.")
    ] = 0,
    cluster: Annotated[
        str, typer.Option("--cluster", rich_help_panel=EXECUTION, help="With --elastic: hardware, as for plan.")
    ] = "",
    nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    master: MasterOption = "",
    interface: InterfaceOption = "",
    emulate: EmulateOption = None,
) -> None:
    """Train under a plan, from text to checkpoints; measure its first steps against the prediction.

    On a cluster: the same command on every node with --nodes, --node-rank and --master, or under torchrun or srun; all
    nodes share --out.
    """
    from autopar.demo import resolve_device
    from autopar.plan import read_plan_file
    from autopar.runtime import job as jobs
    from autopar.runtime.launch.places import Role, find_place

    place = find_place(os.environ, nodes=nodes, node_rank=node_rank, master=master)
    how = Execution(
        place=place, timeout_s=timeout, max_restarts=max_restarts, interface=interface, emulate=emulate,
        elastic=elastic, cluster=cluster,
    )  # fmt: skip
    content = read_plan_file(plan_file)
    logging = _logging(content, peak_tflops, log_every, tensorboard)
    job = jobs.TrainJob(
        model=content.model, workload=content.workload, plans=(content.plan,), steps=steps, out_dir=str(out),
        seed=seed, learning_rate=learning_rate, weight_decay=weight_decay, betas=(0.9, beta2), clip=clip,
        device=resolve_device(device), compiled=compiled, source=model, predicted_memory=content.predicted_memory,
        data=_tokens(data or [], tokenizer, out, validation, whole=place.role is Role.LAUNCHER),
        training=jobs.Training(
            rate=RateSchedule(decay=schedule, warmup_steps=warmup_steps, minimum=min_lr),
            evaluation=jobs.Evaluation(every=eval_every, batches=eval_batches),
            saving=jobs.Saving(
                every_steps=save_every, every_minutes=save_minutes, at_end=save_end, keep=keep,
                asynchronous=async_save, resume=resume,
            ),
            logging=logging,
            self_check=self_check,
        ),
    )  # fmt: skip
    if logging.peak_flops and place.leads:
        say(f"MFU: {logging.flops_convention}, over {logging.peak_flops / 1e12:.4g} TFLOP/s of a device")
    with progress() as on_message:
        found = train(job, content, how, on_message)
    if found is None:
        return
    outcome, measured = found
    if as_json:
        print(json.dumps(_json(outcome, measured, content)))
    else:
        print(_summary(outcome, measured, content))
        if measured is not None:
            from autopar.validate.measured_runs import run_verdict

            print(run_verdict(job.measurement_file(content.plan), content.predicted), end="")
    say(f"wrote {out / 'metrics.csv'}" + (f" and {job.measurement_file(content.plan)}" if measured else ""))


def _tokens(data: list[str], tokenizer: str, out: Path, validation: float, *, whole: bool) -> Data:
    """``whole``: this process is alone in preparing the run, so that it may write tokens."""
    from autopar.runtime.data.tokenize import find_tokens
    from autopar.runtime.data.tokens import HEADER
    from autopar.runtime.job import Data

    if not whole and any(not (Path(name) / HEADER).is_file() for name in data):
        raise InputError("where every node or rank is started by itself, --data is a folder made by `autopar tokenize`")

    folder = find_tokens(data, tokenizer, out / "tokens") if data else None
    return Data(tokens=str(folder.resolve()) if folder else "", validation=validation)


def _logging(content: PlanFile, peak_tflops: float | None, every: int, tensorboard: bool) -> Logging:
    """What the log needs for MFU: FLOP of the model, and the peak that the prediction counted with."""
    from autopar.estimate import FLOPS_CONVENTION, useful_flops
    from autopar.model.build import build_graph
    from autopar.runtime.job import Logging

    workload, predicted = content.workload, content.predicted
    graph = build_graph(content.model, seq_len=workload.seq_len, precision=workload.precision)
    flops = useful_flops(graph) * workload.global_batch
    peak = (peak_tflops or 0.0) * 1e12
    if peak_tflops is None and predicted.get("mfu") and predicted.get("step_s"):
        peak = flops / predicted["step_s"] / predicted["mfu"] / content.plan.layout.world_size
    return Logging(
        every=every, tensorboard=tensorboard, flops_per_step=flops, peak_flops=peak, flops_convention=FLOPS_CONVENTION
    )


def _json(outcome: Outcome, measured: Measurement | None, content: PlanFile) -> dict[str, Any]:
    found: dict[str, Any] = {"schema_version": 2, "slug": outcome.plan, "predicted": dict(content.predicted)}
    found |= dataclasses.asdict(outcome)
    if measured is not None:
        found["measured"] = {
            "step_s": measured.median_step_s,
            "peak_bytes": measured.peak_bytes,
            "losses": list(measured.losses),
            "grad_norms": list(measured.grad_norms),
        }
    return found


def _summary(outcome: Outcome, measured: Measurement | None, content: PlanFile) -> str:
    from costmodels.units import format_bytes, format_seconds

    parts = [f"{outcome.plan}: {'stopped after' if outcome.stopped else 'done:'} step {outcome.steps_done}"]
    if outcome.loss is not None:
        parts.append(f"loss {outcome.loss:.4f}")
    if outcome.validation_loss is not None:
        parts.append(f"validation loss {outcome.validation_loss:.4f}")
    if measured is not None:
        predicted = content.predicted.get("step_s")
        expected = f", predicted {format_seconds(predicted)}" if predicted else ""
        parts.append(f"{format_seconds(measured.median_step_s)} per step{expected}")
        parts.append(f"peak of a rank {format_bytes(measured.peak_bytes)}")
    return "; ".join(parts)


@app.command()
def tokenize(
    files: Annotated[list[str], typer.Argument(help="Text files, folders or globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the tokens; `autopar run --data` takes it.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="tokenizer.json; bytes without one.")] = "",
    vocab: Annotated[
        int | None, typer.Option("--vocab", min=1, help="Learn a byte-level BPE of so many tokens from these files.")
    ] = None,
) -> None:
    """Turn text into tokens once, for many runs: one flat file that every rank maps into its memory."""
    from autopar.runtime.data.tokenize import tokenize_files

    header = tokenize_files(files, tokenizer, vocab, out)
    print(
        f"{out}: {header.num_tokens:,} tokens ({header.dtype}) of {len(header.files)} files, all below "
        f"{header.vocab_size}, by {header.tokenizer}"
    )
