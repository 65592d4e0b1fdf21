"""``autopar preflight`` and ``export``: before and around runs on a cluster, and the options that these share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.cli.common import Device, JsonFlag, app, progress, say, show, terminal_width
from autopar.errors import InputError

if TYPE_CHECKING:
    from autopar.measurement import Measurement
    from autopar.plan import Plan, PlanFile
    from autopar.runtime.job import TrainJob
    from autopar.runtime.launch.places import Place
    from autopar.runtime.outcome import Outcome
    from costmodels.hardware import Cluster

Start = Callable[[str, Path], None]

NodesOption = Annotated[
    int | None,
    typer.Option("--nodes", min=1, help="Nodes, each started by this command; shares --out with the others."),
]
NodeRankOption = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="Which of the nodes this one is, from 0.")
]
MasterOption = Annotated[str, typer.Option("--master", help="host:port of node 0, where all nodes meet.")]
InterfaceOption = Annotated[str, typer.Option("--interface", help="Network interface for collectives, such as eth0.")]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Processes on each node; every device on CUDA.")]
EmulateOption = Annotated[str | None, typer.Option(help="NODESxRATE: on an emulated cluster (needs root).")]
EXIT_NOT_FIT = 3


@app.command()
def preflight(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that the run will write to.")] = Path("runs"),
    ranks: RanksOption = None,
    nodes: NodesOption = None,
    node_rank: NodeRankOption = None,
    master: MasterOption = "",
    interface: InterfaceOption = "",
    emulate: EmulateOption = None,
    expect: Annotated[str, typer.Option(help="Bandwidth that every link should reach, such as 200Gbit.")] = "",
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Before a long run: versions, clocks, space, shared folder, sums, speeds of ranks and links; name what is off."""
    from autopar.demo import default_ranks, resolve_device
    from autopar.report.preflight_tables import preflight_json, preflight_table
    from autopar.runtime.launch.places import find_place
    from autopar.runtime.preflight.judge import Limits, judge
    from autopar.runtime.preflight.judge import preflight as gather
    from costmodels.records import write_json
    from costmodels.units import parse_bandwidth

    device = "cpu" if emulate else resolve_device(device)
    place = find_place(os.environ, nodes=nodes, node_rank=node_rank, master=master)
    limits = Limits(bandwidth=parse_bandwidth(expect) if expect else None)
    each = ranks or (1 if emulate else default_ranks(device))
    with progress() as on_message, starter(
        place, each, out=out / "preflight", emulate=emulate, interface=interface, on_message=on_message
    ) as start:  # fmt: skip
        facts = gather(out, device=device, start=start, leads=place.leads)
    if facts is None:
        return
    findings = judge(facts, limits)
    document = {"schema_version": 1, **preflight_json(facts, findings)}
    write_json(out / "preflight.json", document)
    if as_json:
        print(json.dumps(document))
    else:
        show(preflight_table(facts, findings, width=terminal_width()))
    say(f"wrote {out / 'preflight.json'}")
    if findings:
        raise typer.Exit(EXIT_NOT_FIT)


export_app = typer.Typer(help="Tell a plan to other programs.", no_args_is_help=True)
app.add_typer(export_app, name="export")


@export_app.command("slurm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def export_slurm(
    context: typer.Context,
    plan_file: Annotated[Path, typer.Argument(help="plan.json; what follows -- is passed on to `autopar run`.")],
    script: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("job.sbatch"),
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes, and on CUDA devices, of a node.")] = 8,
    folder: Annotated[str, typer.Option(help="Folder of the run, shared by all nodes.")] = "runs",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    time: Annotated[str, typer.Option(help="Limit, as sbatch takes it.")] = "24:00:00",
    partition: Annotated[str, typer.Option(help="Empty for the cluster's default.")] = "",
    account: Annotated[str, typer.Option(help="Empty for the default.")] = "",
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="Cores for each process.")] = 8,
    max_restarts: Annotated[int, typer.Option(min=0, help="Times that ranks are started again within a job.")] = 3,
    checkpoint_s: Annotated[int, typer.Option(help="Seconds before the limit at which ranks save and end.")] = 120,
    interface: InterfaceOption = "",
    setup: Annotated[list[str] | None, typer.Option(help="Shell line that prepares a node; may be repeated.")] = None,
    python: Annotated[str, typer.Option(help="Interpreter that has autopar, on every node.")] = "python",
) -> None:
    """Write a batch script: torchrun on every node, restarts, a checkpoint before time is up, and on again."""
    from autopar.export.slurm import SlurmJob, nodes_of, sbatch_script
    from autopar.plan import read_plan_file
    from costmodels.records import write_text

    content = read_plan_file(plan_file)
    each = min(ranks_per_node, content.plan.layout.world_size)
    job = SlurmJob(
        name=f"autopar-{content.model.name}", nodes=nodes_of(content.plan.layout.world_size, each),
        ranks_per_node=each, device=device, plan=str(plan_file), out=folder, options=tuple(context.args), time=time,
        partition=partition, account=account, cpus_per_rank=cpus_per_rank, max_restarts=max_restarts,
        checkpoint_s=checkpoint_s, interface=interface, setup=tuple(setup or ()), python=python,
    )  # fmt: skip
    write_text(script, sbatch_script(job))
    say(f"wrote {script}: {job.nodes} nodes of {each}; start it with `sbatch {script}`")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How and where ``autopar run`` runs.

    Attributes:
        place: the part of this process.
        timeout_s: seconds without progress.
        max_restarts: starts after the first one on the same ranks.
        interface, emulate: of the network.
        elastic: ranks to go on with at the least; 0 never replans.
        cluster: hardware for the planner, as of ``autopar plan``; empty for CPUs of this kind.
    """

    place: Place
    timeout_s: float
    max_restarts: int
    interface: str = ""
    emulate: str | None = None
    elastic: int = 0
    cluster: str = ""


def train(
    job: TrainJob, content: PlanFile, how: Execution, on_message: Callable[[dict[str, Any]], None]
) -> tuple[Outcome, Measurement | None] | None:
    """Train, as a whole or this process's part of it; None where another process has the result.

    Raises:
        InputError: options that do not fit each other, the plan or this machine.
        RunError: the run failed.
    """
    import dataclasses

    from autopar.elastic import Ranks, train_on_what_is_left
    from autopar.runtime.launch.places import Role
    from autopar.runtime.run import run_training, run_training_part

    world, place = content.plan.layout.world_size, how.place
    stack = "autopar-gloo" if job.device == "cpu" else "autopar-nccl"
    if how.elastic and job.device != "cpu" and not how.cluster:
        raise InputError("--elastic plans anew: name the hardware with --cluster, such as h100:4x8")
    if place.role is not Role.LAUNCHER:
        if how.emulate is not None:
            raise InputError("--emulate sets up its own nodes: leave it out under torchrun, Slurm and with --nodes")
        number = place.world_size or world
        if how.elastic and number != world:
            job = _replanned(job, content, how, number, stack)
        if number % place.num_nodes:
            raise InputError(f"a plan of {number} ranks does not divide over {place.num_nodes} nodes")
        return run_training_part(
            job, place, ranks_per_node=number // place.num_nodes, stall_timeout_s=how.timeout_s,
            max_restarts=how.max_restarts, interface=how.interface, on_message=on_message,
        )  # fmt: skip
    with _nodes(how.emulate, how.interface) as nodes:
        if world % len(nodes):
            raise InputError(f"a plan of {world} ranks does not divide over {len(nodes)} emulated nodes")

        def job_under(plan: Plan) -> TrainJob:
            if plan == content.plan or job.training is None:
                return job
            saving = dataclasses.replace(job.training.saving, resume=True)
            return dataclasses.replace(job, plans=(plan,), training=dataclasses.replace(job.training, saving=saving))

        def run(plan: Plan, ranks: Ranks) -> tuple[Outcome, Measurement | None]:
            return run_training(
                job_under(plan), nodes=ranks.nodes, ranks_per_node=ranks.ranks_per_node,
                stall_timeout_s=how.timeout_s, max_restarts=how.max_restarts, on_message=on_message,
            )  # fmt: skip

        ranks = Ranks(nodes=nodes, ranks_per_node=world // len(nodes))
        if not how.elastic:
            return run(content.plan, ranks)
        return train_on_what_is_left(
            content, ranks, least=how.elastic, run=run, stack=stack, on_message=on_message,
            cluster_of=lambda left: _hardware(how.cluster, len(left.nodes), left.ranks_per_node),
        )  # fmt: skip


def _replanned(job: TrainJob, content: PlanFile, how: Execution, ranks: int, stack: str) -> TrainJob:
    """The job under a plan for as many ranks as torchrun has found; the same in every rank, since planning is."""
    import dataclasses

    from autopar.elastic import plan_for

    if ranks < how.elastic:
        raise InputError(f"{ranks} ranks are left; --elastic goes on with at least {how.elastic}")
    cluster = _hardware(how.cluster, how.place.num_nodes, ranks // how.place.num_nodes)
    return dataclasses.replace(job, plans=(plan_for(content, cluster, stack),))


def _hardware(cluster: str, num_nodes: int, ranks_per_node: int) -> Cluster:
    import dataclasses

    from costmodels.hardware import load_cluster

    found = load_cluster(cluster or f"cpu:{num_nodes}x{ranks_per_node}")
    return dataclasses.replace(found, num_nodes=num_nodes, devices_per_node=ranks_per_node)


@contextmanager
def starter(
    place: Place,
    ranks_per_node: int,
    *,
    out: Path,
    emulate: str | None = None,
    interface: str = "",
    timeout_s: float = 180.0,
    max_restarts: int = 0,
    on_message: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[Start]:
    """How this process starts a worker module with a job file: all ranks, those of its node, or itself as one.

    Raises:
        InputError: ``--emulate`` where ranks are started by others.
    """
    from autopar.runtime.launch.node_run import run_node, run_rank
    from autopar.runtime.launch.places import Role

    if place.role is not Role.LAUNCHER and emulate is not None:
        raise InputError("--emulate sets up its own nodes: leave it out under torchrun, Slurm and with --nodes")
    if place.role is Role.NODE:
        yield lambda module, job: run_node(
            place, module, job, ranks_per_node=ranks_per_node, max_restarts=max_restarts, interface=interface,
            on_message=on_message,
        )  # fmt: skip
    elif place.role is Role.RANK:
        yield lambda module, job: run_rank(place, module, [str(job)])
    else:
        with _nodes(emulate, interface) as nodes:
            from autopar.runtime.launch.launcher import launch

            yield lambda module, job: launch(
                module, job, nodes=nodes, ranks_per_node=ranks_per_node, out_dir=out, stall_timeout_s=timeout_s,
                max_restarts=max_restarts, on_message=on_message,
            )  # fmt: skip


@contextmanager
def _nodes(emulate: str | None, interface: str) -> Iterator[tuple[Any, ...]]:
    import dataclasses

    from autopar.runtime.launch.emulate import emulated_cluster, parse_emulation
    from autopar.runtime.launch.nodes import local_node

    if emulate is None:
        yield (dataclasses.replace(local_node(), interface=interface or None),)
        return
    number, rate = parse_emulation(emulate)
    with emulated_cluster(number, rate) as nodes:
        yield nodes
