"""The command line: reads arguments, calls the library, prints. Wrong input is one line on standard error.

Exit codes: 0 fine, 1 a run failed, 2 wrong usage, 3 no feasible plan.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar import __version__
from autopar.errors import EXIT_NO_PLAN, EXIT_OK, EXIT_RUN_FAILED, EXIT_USAGE, InputError, NoFeasiblePlan, RunError
from autopar.workload import Optimizer, Precision

if TYPE_CHECKING:
    from autopar.estimate import Estimate, Setting

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
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="Folder for files.")]


def _version(value: bool) -> None:
    if value:
        print(f"autopar {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _setting(
    model: str, cluster: str, batch: int, seq_len: int, precision: Precision, optimizer: Optimizer, stack: str
) -> tuple[Any, Setting]:
    from autopar.estimate import Setting
    from autopar.model.build import build_graph
    from autopar.model.load import load_model
    from autopar.workload import Workload
    from costmodels.hardware import load_cluster
    from costmodels.stack import load_stack

    spec = load_model(model)
    workload = Workload(global_batch=batch, seq_len=seq_len, precision=precision, optimizer=optimizer)
    hardware = load_cluster(cluster)
    hardware.device.peak(precision.value)
    graph = build_graph(spec, seq_len=seq_len, precision=precision)
    return spec, Setting(graph=graph, workload=workload, cluster=hardware, stack=load_stack(stack))


def _as_json(estimate: Estimate) -> dict[str, Any]:
    """One plan as printed by ``--json``: seconds, GiB and plain ratios."""
    from costmodels.units import GIB, TFLOPS

    plan, layout = estimate.plan, estimate.plan.layout
    return {
        "slug": plan.slug,
        "step_s": estimate.step_s,
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
        "memory_per_rank_gib": [size / GIB for size in estimate.memory_per_rank],
    }  # fmt: skip


@app.command()
def plan(
    model: Model,
    cluster: ClusterOption,
    global_batch: Batch,
    seq_len: SeqLen,
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    top: Annotated[int, typer.Option(min=1, help="Plans to show.")] = 10,
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Rank the parallel plans of a model on a cluster, from data sheets alone."""
    from autopar.plan import PlanFile, write_plan_file
    from autopar.search.exhaustive import search
    from autopar.search.reason import reason

    spec, setting = _setting(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    result = search(setting, top=top)
    best = result.best[0]
    if as_json:
        plans = [{"rank": i + 1, **_as_json(e), "reason": reason(e, best)} for i, e in enumerate(result.best)]
        found = {
            "considered": result.considered,
            "feasible": result.feasible,
            "rejected": dict(result.rejected),
            "seconds": result.seconds,
        }
        print(json.dumps({"schema_version": 1, "plans": plans, "search": found, "assumptions": best.assumptions}))
    else:
        from autopar.report.tables import plans_table, search_line

        _show(plans_table(result.best, width=_width(), title=f"{spec.name} on {cluster}"), search_line(result))
    if out is not None:
        content = PlanFile(
            slug=best.plan.slug,
            model=spec,
            workload=setting.workload,
            plan=best.plan,
            predicted={"step_s": best.step_s, "memory_gib": best.memory_gib, "mfu": best.mfu},
        )
        write_plan_file(out / "plan.json", content)
        _say(f"wrote {out / 'plan.json'}")


@app.command()
def estimate(
    model: Model,
    slug: Annotated[str, typer.Argument(help="Plan, such as tp8.pp4.vp2.cp1.dp2.z1.mb1.ac-none.sp")],
    cluster: ClusterOption,
    global_batch: Batch,
    seq_len: SeqLen,
    precision: PrecisionOption = Precision.BF16,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    stack: StackOption = "megatron-core",
    as_json: JsonFlag = False,
    out: OutOption = None,
) -> None:
    """Price one plan: step time by terms, memory by items, and what the numbers rest on."""
    from autopar.estimate import estimate as price
    from autopar.plan import parse_slug

    _, setting = _setting(model, cluster, global_batch, seq_len, precision, optimizer, stack)
    result = price(setting, parse_slug(slug))
    document = {"schema_version": 1, **_as_json(result), "assumptions": list(result.assumptions)}
    if as_json:
        print(json.dumps(document))
    else:
        from autopar.report.tables import plan_detail

        _show(plan_detail(result, width=_width()))
    if out is not None:
        from costmodels.records import write_json

        write_json(out / "estimate.json", document)
        _say(f"wrote {out / 'estimate.json'}")


Device = Annotated[str, typer.Option(help="cpu or cuda; auto takes CUDA where it is.")]


@app.command()
def profile(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("profile.json"),
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; 4 on CPUs, every device on CUDA.")] = None,
    device: Device = "auto",
    precision: Annotated[Precision | None, typer.Option(help="fp32 on CPUs, bf16 on CUDA.")] = None,
    quick: Annotated[bool, typer.Option(help="Coarser, in a third of the time.")] = False,
) -> None:
    """Measure this machine: operations and collectives over shapes and sizes; fit them; keep points and fits."""
    from autopar.demo import default_ranks, resolve_device
    from autopar.report.tables import profile_table
    from autopar.runtime.nodes import local_node
    from autopar.runtime.profile import profile_machine

    device = resolve_device(device)
    kind = precision or (Precision.FP32 if device == "cpu" else Precision.BF16)
    with _progress() as on_message:
        measured = profile_machine(
            ranks=ranks or default_ranks(device), nodes=(local_node(),), device=device, precision=kind.value, out=out,
            quick=quick, on_message=on_message,
        )  # fmt: skip
    _show(profile_table(measured, width=_width()))
    _say(f"wrote {out}")


@app.command("run")
def run_plan(
    plan_file: Annotated[Path, typer.Argument(help="plan.json, as `autopar plan -o` and `autopar demo` write it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for measurements and logs.")] = Path("runs"),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 12,
    device: Device = "auto",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without progress after which all ranks end.")] = 180,
    as_json: JsonFlag = False,
) -> None:
    """Run a plan for real on this machine and measure step time, memory and collectives."""
    from autopar.demo import resolve_device
    from autopar.plan import read_plan_file
    from autopar.runtime.job import TrainJob
    from autopar.runtime.nodes import local_node
    from autopar.runtime.run import run_plans

    content = read_plan_file(plan_file)
    job = TrainJob(
        model=content.model, workload=content.workload, plans=(content.plan,), steps=steps, out_dir=str(out),
        device=resolve_device(device),
    )  # fmt: skip
    with _progress() as on_message:
        [measured] = run_plans(
            job, nodes=(local_node(),), ranks_per_node=content.plan.layout.world_size, stall_timeout_s=timeout,
            on_message=on_message,
        )  # fmt: skip
    found = {
        "slug": measured.slug,
        "step_s": measured.median_step_s,
        "peak_bytes": measured.peak_bytes,
        "losses": list(measured.losses),
        "predicted": dict(content.predicted),
    }
    if as_json:
        print(json.dumps({"schema_version": 1, **found}))
    else:
        from costmodels.units import format_bytes, format_seconds

        predicted = content.predicted.get("step_s")
        expected = f", predicted {format_seconds(predicted)}" if predicted else ""
        print(
            f"{measured.slug}: {format_seconds(measured.median_step_s)} per step{expected}; peak of a rank "
            f"{format_bytes(measured.peak_bytes)}; loss {measured.losses[0]:.4f} to {measured.losses[-1]:.4f}"
        )
    _say(f"wrote {job.measurement_file(content.plan)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report.")] = Path("reports/demo"),
    emulate: Annotated[
        str | None, typer.Option(help="NODESxRATE: run on an emulated cluster, such as 4x200mbit (needs root).")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; 4 on CPUs, every device on CUDA.")] = None,
    device: Device = "auto",
    layouts: Annotated[int, typer.Option(min=2, help="Layouts to run beside a single process.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 10,
    quick: Annotated[bool, typer.Option(help="A coarse profile.")] = False,
    reuse: Annotated[bool, typer.Option(help="Predict anew for the profile and runs in --out; run nothing.")] = False,
) -> None:
    """Do it all: profile this machine, capture a model, plan, run plans, hold prediction to measurement."""
    from autopar.demo import DemoOptions, resolve_device
    from autopar.demo import demo as run_demo
    from autopar.report import write_report
    from autopar.report.tables import plans_table, profile_table, validation_table, verdict

    options = DemoOptions(
        out=out, ranks=ranks, emulate=emulate, device="cpu" if emulate else resolve_device(device),
        num_layouts=layouts, steps=steps, quick=quick, reuse=reuse,
    )  # fmt: skip
    with _progress() as on_message:
        report = run_demo(options, _say, on_message)
    files = write_report(report, out)
    if report.profile is not None:
        _show(profile_table(report.profile, width=_width()))
    _show(plans_table(report.result.best[:10], width=_width(), device=report.device_word, title=report.title))
    _show(validation_table(report.validation, width=_width()), verdict(report.validation))
    _say(f"wrote {len(files)} files; open {out / 'index.html'}")


@app.command()
def gpu(
    part: Annotated[str, typer.Option(help="Which settings: small, medium, large, or all.")] = "all",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for profile and results.")] = Path("gpu"),
    device: Device = "auto",
) -> None:
    """Profile one GPU, run single-GPU settings, and hold predicted step time and memory to what was measured."""
    from autopar.demo import resolve_device
    from autopar.gpu import measure_settings, settings_of
    from autopar.report.columns import markdown_table

    with _progress() as on_message:
        results = measure_settings(settings_of(part), out, resolve_device(device), _say, on_message)
    print(markdown_table(results.columns()))
    _say(f"wrote {results.file}")


@app.command()
def models() -> None:
    """List the models, devices and stacks that ship with the program."""
    from autopar.model.presets import preset_names
    from costmodels.hardware import device_names
    from costmodels.stack import stack_names

    for title, names in (("models", preset_names()), ("devices", device_names()), ("stacks", stack_names())):
        print(f"{title}: {', '.join(names)}")


MAX_WIDTH = 120


def _width() -> int:
    """Columns of the terminal; 120 where there is none, so that files and pipes get whole tables."""
    return min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)


def _show(*parts: Any) -> None:
    """Print tables and lines on standard output."""
    from rich.console import Console

    console = Console(width=_width(), highlight=False)
    for part in parts:
        console.print(part)


@contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress line on standard error while someone is looking; otherwise a line for each part that begins."""
    from autopar.report.progress import ProgressLine

    with ProgressLine() as line:
        yield line.update


def _say(text: str) -> None:
    """Progress and notices go to standard error, so that standard output stays a result."""
    print(text, file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; every error that a user can cause is one message."""
    from typer.main import get_command

    try:
        result = get_command(app).main(args=arguments, prog_name="autopar", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_OK
    except InputError as error:
        return _fail(str(error), EXIT_USAGE)
    except NoFeasiblePlan as error:
        return _fail(str(error), EXIT_NO_PLAN)
    except RunError as error:
        return _fail(str(error), EXIT_RUN_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has seen enough, as in `autopar plan ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message(), EXIT_USAGE)
        if type(error).__name__ in ("Exit", "Abort"):
            return int(getattr(error, "exit_code", EXIT_RUN_FAILED))
        if os.environ.get("AUTOPAR_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}. This is a bug of autopar; AUTOPAR_DEBUG=1 shows where",
            EXIT_RUN_FAILED,
        )


def _fail(message: str, code: int) -> int:
    print(f"autopar: error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the ``autopar`` command."""
    sys.exit(run())
