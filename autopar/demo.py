"""The main job: profile this machine, capture a model, plan, run the plans for real, hold prediction to measurement."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting, estimate
from autopar.estimate.machine import runtime_stack
from autopar.estimate.traffic import expected_collectives
from autopar.graph import OpGraph
from autopar.measurement import Measurement, read_measurement, together, write_measurement
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, PlanFile, ScheduleName, check_plan, parse_slug, write_plan_file
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.nodes import Node, local_node
from autopar.runtime.profile.machine import profile_machine
from autopar.runtime.run import run_plans
from autopar.runtime.support import check_supported, unsupported
from autopar.search.exhaustive import SearchResult, search
from autopar.search.space import PLAIN
from autopar.validate import compare
from autopar.workload import Precision, Workload
from costmodels.calibration import MachineProfile, profile_cluster, read_profile, with_fits
from costmodels.speed import slowed, slowness

if TYPE_CHECKING:
    from autopar.report.content import DemoReport

Say = Callable[[str], None]
OnMessage = Callable[[dict[str, Any]], None]

SPACE = dataclasses.replace(PLAIN, min_microbatches=4, max_vp=1, schedules=(ScheduleName.ONE_F_ONE_B,))
"""What is planned for: pipelines with few idle ranks under the schedule that every engine has."""
LAYOUTS = 10
STEPS, ROUNDS = 4, 3
STALL_TIMEOUT_S = 180.0
SHOWN_PLANS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What to run.

    Attributes:
        out: folder of the report.
        ranks: processes; None means 4 on CPUs, all devices on CUDA.
        emulate: nodes and rate of an emulated cluster such as ``4x200mbit``; None runs on this machine as it is.
        device: cpu or cuda.
        num_layouts: layouts to run beside the single process.
        plans: run these, by slug, instead of layouts that the planner picks.
        steps: timed steps of each in every round.
        rounds: times that all of them are run.
        quick: a coarse profile.
        reuse: predict anew for the profile and the runs that ``out`` holds, and run nothing.
    """

    out: Path
    ranks: int | None = None
    emulate: str | None = None
    device: str = "cpu"
    num_layouts: int = LAYOUTS
    plans: tuple[str, ...] = ()
    steps: int = STEPS
    rounds: int = ROUNDS
    quick: bool = False
    reuse: bool = False

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        words = ["autopar", "demo"]
        words += ["--emulate", self.emulate] if self.emulate else []
        words += ["--ranks", str(self.ranks)] if self.ranks else []
        words += ["--layouts", str(self.num_layouts)] if self.num_layouts != LAYOUTS else []
        words += [word for slug in self.plans for word in ("--plan", slug)]
        words += ["--steps", str(self.steps)] if self.steps != STEPS else []
        words += ["--rounds", str(self.rounds)] if self.rounds != ROUNDS else []
        words += ["--quick"] if self.quick else []
        words += ["-o", str(self.out)]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where ranks run: nodes, ranks on each, and the rate of emulated links in bytes/s."""

    nodes: tuple[Node, ...]
    ranks_per_node: int
    link_rate: float | None = None

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return len(self.nodes) * self.ranks_per_node


@contextmanager
def site(options: DemoOptions) -> Iterator[Site]:
    """The machine as it is, or an emulated cluster that is taken down at the end."""
    if options.emulate is None:
        yield Site(nodes=(local_node(),), ranks_per_node=options.ranks or default_ranks(options.device))
        return
    from autopar.runtime.launch.emulate import emulated_cluster, parse_emulation, why_unavailable

    num_nodes, rate = parse_emulation(options.emulate)
    if options.device != "cpu":
        raise InputError("--emulate runs on CPUs: leave out --device")
    obstacle = why_unavailable()
    if obstacle:
        raise InputError(f"--emulate {options.emulate} cannot be set up here: {obstacle}")
    ranks = options.ranks or num_nodes
    if ranks % num_nodes:
        raise InputError(f"--ranks {ranks} does not divide over {num_nodes} emulated nodes")
    with emulated_cluster(num_nodes, rate) as nodes:
        yield Site(nodes=nodes, ranks_per_node=ranks // num_nodes, link_rate=rate)


def resolve_device(device: str) -> str:
    """``auto`` is cuda where torch finds one, else cpu. Raises InputError for anything but auto, cpu and cuda."""
    if device in ("cpu", "cuda"):
        return device
    if device != "auto":
        raise InputError(f"device '{device}' is not auto, cpu or cuda")
    # A look at the driver's files spares importing torch on machines without one.
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_ranks(device: str) -> int:
    """4 processes on CPUs, one for each device on CUDA."""
    if device == "cpu":
        return 4
    import torch

    return max(1, torch.cuda.device_count())


def demo_model(device: str) -> tuple[ModelSpec, Workload]:
    """The model and the workload of the demo: sized for two CPU cores, or for a GPU."""
    if device == "cpu":
        return load_preset("demo-gpt"), Workload(global_batch=8, seq_len=128, precision=Precision.FP32)
    return load_preset("demo-gpt-gpu"), Workload(global_batch=32, seq_len=1024, precision=Precision.BF16)


def capture_model(spec: ModelSpec, workload: Workload) -> OpGraph:
    """Capture the module of these numbers for one microbatch of one sequence. Imports torch."""
    import torch

    from autopar.model.capture import capture
    from autopar.model.transformer import build, language_model_loss

    module = build(spec)
    if workload.precision is Precision.BF16:
        module = module.to(torch.bfloat16)
    tokens = torch.zeros((1, workload.seq_len), dtype=torch.int64)
    return capture(module, (tokens,), loss_fn=language_model_loss, targets=tokens, name=spec.name)


def plan_layouts(setting: Setting, spec: ModelSpec) -> SearchResult:
    """Rank every layout that fits and that the executor runs."""

    def refuse(plan: Plan) -> Any:
        return unsupported(plan, spec, plan.num_microbatches(setting.workload))

    return search(setting, top=10_000, space=SPACE, unsupported=refuse)


def given(setting: Setting, spec: ModelSpec, slugs: Sequence[str]) -> tuple[Estimate, ...]:
    """Estimates of named plans, fastest first. Raises PlanError for one that is against the rules or does not run."""
    plans = [parse_slug(slug) for slug in slugs]
    for plan in plans:
        check_plan(plan, setting.graph, setting.workload, setting.cluster.world_size)
        check_supported(plan, spec, plan.num_microbatches(setting.workload))
    return tuple(sorted((estimate(setting, plan) for plan in plans), key=lambda found: found.step_s))


def choose(ranked: Sequence[Estimate], number: int) -> tuple[Estimate, ...]:
    """The best plan and the fastest of each unlike kind, unlike in dimensions, sharding or sequence parallelism.

    Kinds that combine the same axes are taken in turn, so that few layouts already cover all dimensions.
    """
    fastest: dict[tuple[Any, ...], Estimate] = {}
    for candidate in ranked:
        fastest.setdefault(_kind(candidate.plan, ranked[0].plan.layout.world_size), candidate)
    by_axes: dict[tuple[bool, ...], list[Estimate]] = {}
    for candidate in fastest.values():
        layout = candidate.plan.layout
        by_axes.setdefault((layout.tp > 1, layout.pp > 1, layout.dp > 1), []).append(candidate)
    chosen: list[Estimate] = []
    while len(chosen) < number and any(by_axes.values()):
        for queue in by_axes.values():
            if queue and len(chosen) < number:
                chosen.append(queue.pop(0))
    return tuple(sorted(chosen, key=lambda candidate: candidate.step_s))


def _kind(plan: Plan, world_size: int) -> tuple[Any, ...]:
    layout = plan.layout
    kind = (layout.tp, layout.pp, layout.vp > 1, layout.dp_replicate, layout.dp_shard, plan.zero_stage)
    alone = (plan.microbatch_size, plan.recompute) if world_size == 1 else ()
    return (*kind, plan.sequence_parallel, *alone)


def single_process(setting: Setting) -> Setting:
    """The same question for one rank alone."""
    cluster = dataclasses.replace(setting.cluster, num_nodes=1, devices_per_node=1)
    return dataclasses.replace(setting, cluster=cluster)


def demo(options: DemoOptions, say: Say, progress: OnMessage) -> DemoReport:
    """Profile, capture, plan, run and compare; everything that a report shows.

    Raises:
        InputError: options that contradict each other or this machine.
        RunError: a run failed.
    """
    from autopar.report.content import DemoReport
    from autopar.report.tables import speed_note

    options.out.mkdir(parents=True, exist_ok=True)
    spec, workload = demo_model(options.device)
    if options.reuse:
        profile, found, setting, estimates, measured, reference = _reuse(options, spec, workload, say)
    else:
        profile, found, setting, estimates, measured, reference = _measure(options, spec, workload, say, progress)
    collectives = {e.plan.slug: expected_collectives(setting, e.plan) for e in estimates}
    validation = compare(
        estimates, measured, collectives=collectives, at_speed=predict_at_speed(setting, profile, measured)
    )
    note = speed_note(validation)
    return DemoReport(
        title=_title(spec, profile),
        command=options.command,
        date=profile.date,
        machine=_machine(profile),
        model=spec,
        setting=setting,
        profile=profile,
        result=dataclasses.replace(found, best=found.best[:SHOWN_PLANS]),
        estimates=estimates,
        measurements=measured,
        validation=validation,
        notes=(note,) if note else (),
        reference=reference,
        reference_estimate=estimate(single_process(setting), reference.plan),
    )


def predict_at_speed(
    setting: Setting, profile: MachineProfile, measured: Sequence[Measurement]
) -> dict[str, tuple[float, float]]:
    """By slug how many times slower the machine was in a run than in the profile, and the step predicted for that."""
    found = {}
    for run in measured:
        factor = slowness(profile, run.yardstick_s)
        if factor is not None:
            slower = with_fits(slowed(profile, factor))
            then = dataclasses.replace(setting, cluster=profile_cluster(slower), stack=runtime_stack(slower))
            found[run.slug] = (factor, estimate(then, run.plan).step_s)
    return found


_Found = tuple[
    MachineProfile, SearchResult, Setting, tuple[Estimate, ...], tuple[Measurement, ...], Measurement
]  # fmt: skip


def _measure(options: DemoOptions, spec: ModelSpec, workload: Workload, say: Say, progress: OnMessage) -> _Found:
    """Profile, capture, plan and run."""
    with site(options) as place:
        say(f"profile: {place.ranks} ranks on {len(place.nodes)} node(s)")
        profile = profile_machine(
            ranks=place.ranks, nodes=place.nodes, device=options.device, precision=workload.precision.value,
            out=options.out / "profile.json", quick=options.quick, link_rate=place.link_rate, on_message=progress,
        )  # fmt: skip
        setting, found = _plan(profile, spec, workload, say)
        chosen = given(setting, spec, options.plans) if options.plans else choose(found.best, options.num_layouts)
        say(f"plan: {found.considered} considered, {found.feasible} feasible; best {chosen[0].plan.slug}")
        write_plan_file(options.out / "plan.json", _plan_file(spec, workload, chosen[0]))
        say(f"run: {len(chosen)} layouts and a single process")
        measured = run_layouts(options, place, spec, workload, [e.plan for e in chosen], progress)
        one = Site(nodes=place.nodes[:1], ranks_per_node=1)
        alone = parse_slug(f"mb{workload.global_batch}")
        reference = run_layouts(options, one, spec, workload, [alone], progress)[0]
    return profile, found, setting, chosen, measured, reference


def _reuse(options: DemoOptions, spec: ModelSpec, workload: Workload, say: Say) -> _Found:
    """Predict anew what an earlier demo measured: the table before and after a change of the cost model."""
    profile = read_profile(options.out / "profile.json")
    setting, found = _plan(profile, spec, workload, say)
    runs = [read_measurement(path) for path in sorted((options.out / "runs").glob("*/measurement.json"))]
    measured = tuple(m for m in runs if m.plan.layout.world_size == profile.ranks)
    references = [m for m in runs if m.plan.layout.world_size == 1]
    if not measured or not references:
        raise InputError(f"{options.out}/runs holds no runs of {profile.ranks} ranks and of one: leave out --reuse")
    estimates = sorted((estimate(setting, m.plan) for m in measured), key=lambda e: e.step_s)
    return profile, found, setting, tuple(estimates), measured, references[0]


def _plan(profile: MachineProfile, spec: ModelSpec, workload: Workload, say: Say) -> tuple[Setting, SearchResult]:
    say(f"capture: {spec.name}")
    graph = capture_model(spec, workload)
    _check_capture(graph, build_graph(spec, seq_len=workload.seq_len, precision=workload.precision), say)
    setting = Setting(graph=graph, workload=workload, cluster=profile_cluster(profile), stack=runtime_stack(profile))
    return setting, plan_layouts(setting, spec)


def _title(spec: ModelSpec, profile: MachineProfile) -> str:
    where = f"{profile.ranks} ranks"
    if profile.link_rate is not None:
        where += f", an emulated cluster of {profile.num_nodes} nodes at {profile.link_rate * 8 / 1e6:.0f} Mbit/s"
    return f"{spec.name} on {where}"


def _machine(profile: MachineProfile) -> dict[str, str]:
    words = {"processor": profile.device_name, "cores": str(profile.cores), "ranks": str(profile.ranks)}
    if profile.link_rate is not None:
        words["network"] = f"{profile.num_nodes} network namespaces, {profile.link_rate * 8 / 1e6:.0f} Mbit/s each"
    return {**words, "backend": profile.backend, "precision": profile.precision, **profile.versions}


def run_layouts(
    options: DemoOptions, place: Site, spec: ModelSpec, workload: Workload, plans: Sequence[Plan], progress: OnMessage
) -> tuple[Measurement, ...]:
    """Run plans one after another in the same processes, and all of them again in every round.

    A machine whose speed changes from minute to minute then meets every plan several times.
    """
    rounds: list[tuple[Measurement, ...]] = []
    folder = options.out / "runs"
    for number in range(options.rounds):
        out = folder if number == 0 else folder / f"round-{number + 1}"
        job = TrainJob(
            model=spec, workload=workload, plans=tuple(plans), steps=options.steps, out_dir=str(out),
            device=options.device,
        )  # fmt: skip
        rounds.append(
            run_plans(
                job, nodes=place.nodes, ranks_per_node=place.ranks_per_node, stall_timeout_s=STALL_TIMEOUT_S,
                on_message=progress,
            )
        )  # fmt: skip
        if number:
            shutil.rmtree(out)
    measured = tuple(together(runs) for runs in zip(*rounds, strict=True))
    for run in measured:
        write_measurement(folder / run.slug / "measurement.json", run)
    return measured


def _plan_file(spec: ModelSpec, workload: Workload, best: Estimate) -> PlanFile:
    return PlanFile(slug=best.plan.slug, model=spec, workload=workload, plan=best.plan, predicted=best.headline)


def _check_capture(captured: OpGraph, built: OpGraph, say: Say) -> None:
    """Tell whether the captured graph is the one that the model's numbers give."""
    same = captured.ops == built.ops
    say(f"capture: {len(captured.ops)} operations, {'equal to' if same else 'unlike'} the graph from the numbers")
