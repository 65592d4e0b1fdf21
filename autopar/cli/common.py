"""What commands share: the application, options, and how results and notices are printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar import __version__
from autopar.workload import Optimizer, Precision

if TYPE_CHECKING:
    from autopar.estimate import Estimate, Setting
    from costmodels.memory_bands import MemoryBand

app = typer.Typer(
    name="autopar",
    help="Plan, price, run and check hybrid parallel training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="Preset (llama3-70b), Hugging Face config.json or its folder, or model.toml.")
]
ClusterOption = Annotated[
    str, typer.Option("--cluster", help="DEVICE:NODESxDEVICES (h100:8x8) or cluster.toml.", show_default=False)
]
Batch = Annotated[int, typer.Option("--global-batch", min=1, help="Sequences per optimizer step.", show_default=False)]
SeqLen = Annotated[int, typer.Option("--seq-len", min=1, help="Tokens per sequence.", show_default=False)]
PrecisionOption = Annotated[Precision, typer.Option(help="Type of weights and activations.")]
OptimizerOption = Annotated[Optimizer, typer.Option(help="Update rule.")]
StackOption = Annotated[str, typer.Option("--stack", help="Training software that the estimate assumes.")]
Offload = Annotated[bool, typer.Option(help="Consider optimizer state in host memory.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="Folder for files.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto takes CUDA where it is.")]


def _version(value: bool) -> None:
    if value:
        print(f"autopar {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def setting_of(
    model: str, cluster: str, batch: int, seq_len: int, precision: Precision, optimizer: Optimizer, stack: str
) -> tuple[Any, Setting]:
    from autopar.estimate import Setting
    from autopar.model.build import build_graph
    from autopar.model.load import load_model
    from autopar.workload import Workload
    from costmodels.islands import load_uniform
    from costmodels.stack import load_stack

    spec = load_model(model)
    workload = Workload(global_batch=batch, seq_len=seq_len, precision=precision, optimizer=optimizer)
    hardware = load_uniform(cluster)
    hardware.device.peak(precision.value)
    graph = build_graph(spec, seq_len=seq_len, precision=precision)
    return spec, Setting(graph=graph, workload=workload, cluster=hardware, stack=load_stack(stack))


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """One plan as printed by ``--json``: seconds, GiB and plain ratios."""
    from costmodels.units import GIB, TFLOPS

    plan, layout = estimate.plan, estimate.plan.layout
    return {
        "slug": plan.slug,
        "step_s": estimate.step_s,
        "step_band_s": [estimate.step_band.low, estimate.step_band.high],
        "memory_gib": estimate.memory_gib,
        "mfu": estimate.mfu,
        "tokens_per_s_per_gpu": estimate.tokens_per_s_per_gpu,
        "model_tflops_per_gpu": estimate.model_flops_per_s_per_gpu / TFLOPS,
        "peak_tflops": estimate.peak_flops / TFLOPS,
        "flops_convention": estimate.flops_convention,
        "tp": layout.tp, "pp": layout.pp, "vp": layout.vp, "cp": layout.cp, "dp": layout.dp,
        "dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "zero": plan.zero_stage,
        "microbatch": plan.microbatch_size, "recompute": plan.recompute.value, "schedule": plan.schedule.value,
        "sequence_parallel": plan.sequence_parallel,
        "bubble_s": estimate.bubble_s,
        "exposed_communication_s": estimate.exposed_communication_s,
        "breakdown_s": dict(estimate.breakdown),
        "memory_items_gib": {name: size / GIB for name, size in estimate.memory.items()},
        "memory_band_gib": _bands_gib(estimate.memory_bands),
        "memory_per_rank_gib": [size / GIB for size in estimate.memory_per_rank],
        "memory_items_per_rank_gib": [
            {name: size / GIB for name, size in items.items()} for items in estimate.memory_items_per_rank
        ],
        "memory_band_per_rank_gib": [_bands_gib(bands) for bands in estimate.memory_bands_per_rank],
    }  # fmt: skip


def _bands_gib(bands: Mapping[str, MemoryBand]) -> dict[str, list[float]]:
    from costmodels.units import GIB

    return {name: [band.low / GIB, band.high / GIB] for name, band in bands.items()}


MAX_WIDTH = 120


def terminal_width() -> int:
    """Columns of the terminal; 120 where there is none, so that files and pipes get whole tables."""
    return min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)


def show(*parts: Any) -> None:
    """Print tables and lines on standard output."""
    from rich.console import Console

    console = Console(width=terminal_width(), highlight=False)
    for part in parts:
        console.print(part)


@contextmanager
def progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress line on standard error while someone is looking; otherwise a line for each part that begins."""
    from autopar.report.progress import ProgressLine

    with ProgressLine() as line:
        yield line.update


def say(text: str) -> None:
    """Progress and notices go to standard error, so that standard output stays a result."""
    print(text, file=sys.stderr)
