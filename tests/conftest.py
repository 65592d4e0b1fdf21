"""A small demo without a machine, for all tests: real estimates of a small GPT, and measurements made up from them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from autopar.estimate import Estimate, Setting, estimate, timeline
from autopar.measurement import CountedCollective, Measurement, RankMeasurement, Span
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import Plan, Recompute, ScheduleName, parse_slug
from autopar.report import DemoReport
from autopar.search.exhaustive import SearchResult, search
from autopar.search.space import Space
from autopar.validate import compare
from autopar.workload import Precision, Workload
from costmodels.collectives import collective_seconds
from costmodels.compute import attention_seconds, matmul_seconds
from costmodels.hardware import load_cluster
from costmodels.profiles import CollectivePoint, ComputePoint, Fit, MachineProfile, SharingPoint
from costmodels.stack import load_stack

MODEL = load_preset("demo-gpt")
WORKLOAD = Workload(global_batch=16, seq_len=128, precision=Precision.FP32)
SLUGS = (
    "dp4.z0.mb4",
    "dp4.z2.mb4",
    "dp4.z3.mb4",
    "tp2.dp2.mb8",
    "tp4.mb16",
    "tp4.mb16.sp",
    "pp4.mb2",
    "pp2.dp2.mb2",
    "tp2.pp2.mb4",
)


def make_setting() -> Setting:
    """Four ranks that share two cores, talking over loopback."""
    cluster = dataclasses.replace(
        load_cluster("cpu:1x4"), sharing=(1.0, 1.03, 1.55, 2.06), link_uses_host=True, name="loopback"
    )
    graph = build_graph(MODEL, seq_len=WORKLOAD.seq_len, precision=Precision.FP32)
    return Setting(graph=graph, workload=WORKLOAD, cluster=cluster, stack=load_stack("autopar-gloo"))


def make_plans(slugs: Sequence[str] = SLUGS) -> list[Plan]:
    """Plans by slug."""
    return [parse_slug(slug) for slug in slugs]


def make_estimates(setting: Setting, slugs: Sequence[str] = SLUGS) -> list[Estimate]:
    """Predictions of these plans."""
    return [estimate(setting, plan) for plan in make_plans(slugs)]


def make_measurement(
    setting: Setting, predicted: Estimate, *, time: float = 1.0, memory: float = 1.0, noise: float = 0.02, seed: int = 0
) -> Measurement:
    """A run that took ``time`` times the predicted step and held ``memory`` times the predicted bytes."""
    plan, rng = predicted.plan, random.Random(f"{predicted.plan.slug} {seed}")
    steps = tuple(time * predicted.step_s * (1 + noise * q) for q in (-1, -0.6, -0.3, -0.1, 0, 0, 0.1, 0.3, 0.6, 1))
    passes = timeline(setting, plan)
    tail = predicted.breakdown["gradient_accumulation"] + predicted.breakdown["data_parallel"]
    ranks = []
    for rank in range(plan.layout.world_size):
        place = plan.layout.coordinates(rank)["pp"]
        spans = [
            Span(
                name=str(timed.action),
                phase="forward" if timed.action.direction == "F" else "backward",
                start_s=timed.start * time,
                end_s=timed.end * time,
            )
            for timed in passes.ranks[place]
        ]
        end = max(span.end_s for span in spans)
        spans.append(Span(name="all_reduce dp", phase="communication", start_s=end, end_s=end + tail * time))
        end += tail * time
        spans.append(
            Span(name="optimizer", phase="optimizer", start_s=end, end_s=end + predicted.breakdown["optimizer"] * time)
        )
        peak = round(predicted.memory_per_rank[place] * memory)
        ranks.append(
            RankMeasurement(
                rank=rank,
                peak_bytes=peak,
                memory={"parameters": round(predicted.memory["parameters"])},
                collectives=(
                    CountedCollective(kind="all_reduce", axis="dp", group_size=4, count=3, num_bytes=57_965_568),
                ),
                spans=tuple(spans),
            )
        )
    rng.shuffle(ranks)
    losses = tuple(5.6 * math.exp(-step / 9) + 2.4 + 0.05 * math.sin(2.1 * step) for step in range(20))
    return Measurement(
        slug=plan.slug,
        model=MODEL,
        workload=WORKLOAD,
        plan=plan,
        backend="gloo",
        device="AMD EPYC 9B14",
        versions={"python": "3.11.7", "torch": "2.13.0", "autopar": "0.1.0"},
        date="2026-01-02T03:04:05Z",
        losses=tuple(loss + rng.uniform(-4e-7, 4e-7) for loss in losses),
        step_s=steps,
        ranks=tuple(sorted(ranks, key=lambda r: r.rank)),
    )


def make_measurements(setting: Setting, estimates: Sequence[Estimate], seed: int = 7) -> list[Measurement]:
    """Runs within some percent of the predictions, reproducible by ``seed``."""
    rng = random.Random(seed)
    return [
        make_measurement(
            setting, e, time=1 + rng.uniform(-0.14, 0.16), memory=1 + rng.uniform(-0.03, 0.04), noise=0.06, seed=seed
        )
        for e in estimates
    ]


def make_profile(setting: Setting, seed: int = 3) -> MachineProfile:
    """Points that scatter around the setting's device and links."""
    rng, device, cluster = random.Random(seed), setting.cluster.device, setting.cluster
    compute: list[ComputePoint] = []

    def point(kind: str, phase: str, dims: Mapping[str, int], flops: float, seconds: float) -> None:
        measured = seconds * math.exp(rng.gauss(0, 0.06))
        compute.append(
            ComputePoint(kind=kind, phase=phase, dims=dims, flops=flops, num_bytes=0, seconds=measured, spread=0.04)
        )

    for m in (64, 128, 256, 512, 1024, 2048):
        for n, k in ((64, 256), (384, 384), (1536, 384), (384, 1536), (1024, 1024)):
            for phase, times in (("forward", 2.0), ("backward", 4.0)):
                seconds = float(matmul_seconds(device, "fp32", m, n, k, backward=phase == "backward"))
                point("matmul", phase, {"m": m, "n": n, "k": k}, times * m * n * k, seconds)
    for length in (64, 128, 256, 512):
        dims = {"batch": 4, "heads": 8, "seq": length, "head_size": 48}
        seconds = float(
            attention_seconds(
                device, "fp32", batch=4, heads=8, query_len=length, key_len=length, head_size=48, causal=True
            )
        )
        point("attention", "forward", dims, 2.0 * 4 * 8 * length * length * 48, seconds)
    collectives = tuple(
        CollectivePoint(
            kind=kind,
            group_size=size,
            num_bytes=num_bytes,
            seconds=float(
                collective_seconds(cluster, kind, size, 1, num_bytes, setting.stack.algorithms)
            ) * math.exp(rng.gauss(0, 0.12)),
            spread=0.1,
        )
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "send")
        for size in ((2,) if kind == "send" else (2, 4))
        for num_bytes in (2.0**p for p in range(12, 26, 2))
    )  # fmt: skip
    fits = (
        Fit(
            name="matmul", constants={"peak_fraction": 0.83, "m_half": 11.0, "n_half": 9.0, "k_half": 31.0},
            num_points=30, median_error=0.041, worst_error=0.152, origin="measured here, 30 points",
        ),
        Fit(
            name="optimizer", constants={"bandwidth_fraction": 0.71}, num_points=6, median_error=0.02,
            worst_error=0.06, origin="measured here, 6 points",
        ),
    )  # fmt: skip
    return MachineProfile(
        device_name="AMD EPYC 9B14", device="cpu", backend="gloo", precision="fp32", ranks=4, num_nodes=1, cores=2,
        memory_bytes=device.memory_bytes, versions={"python": "3.11.7", "torch": "2.13.0", "autopar": "0.1.0"},
        date="2026-01-02T03:00:00Z", peaks={"flops": device.peak("fp32"), "memory_bandwidth": device.memory_bandwidth},
        compute=tuple(compute), sharing=(SharingPoint(active=1, slowdown=1.0), SharingPoint(active=4, slowdown=2.06)),
        collectives=collectives, fits=fits,
    )  # fmt: skip


@pytest.fixture(scope="session")
def sample_setting() -> Setting:
    """See ``make_setting``."""
    return make_setting()


@pytest.fixture(scope="session")
def sample_estimates(sample_setting: Setting) -> list[Estimate]:
    """Predictions of nine plans."""
    return make_estimates(sample_setting)


@pytest.fixture(scope="session")
def sample_measurements(sample_setting: Setting, sample_estimates: list[Estimate]) -> list[Measurement]:
    """Runs of the same plans."""
    return make_measurements(sample_setting, sample_estimates)


@pytest.fixture(scope="session")
def sample_profile(sample_setting: Setting) -> MachineProfile:
    """See ``make_profile``."""
    return make_profile(sample_setting)


SHORT_NAMES = Space(
    recompute=(Recompute.NONE,), max_vp=2, max_cp=1, uneven_ends=False, orders=("tp-cp-dp-pp",),
    schedules=(ScheduleName.GPIPE, ScheduleName.ONE_F_ONE_B, ScheduleName.INTERLEAVED),
)  # fmt: skip


@pytest.fixture(scope="session")
def sample_search(sample_setting: Setting) -> SearchResult:
    """The best plans of a small space, the runs' among them or not."""
    return search(sample_setting, top=10, space=SHORT_NAMES)


@pytest.fixture(scope="session")
def sample_report(
    sample_setting: Setting,
    sample_estimates: list[Estimate],
    sample_measurements: list[Measurement],
    sample_profile: MachineProfile,
    sample_search: SearchResult,
) -> DemoReport:
    """Everything that a report needs, with a reference in one process."""
    alone = dataclasses.replace(sample_setting, cluster=dataclasses.replace(sample_setting.cluster, devices_per_node=1))
    reference = estimate(alone, parse_slug("mb16"))
    return DemoReport(
        title="A small GPT on four ranks <made up>",
        command="autopar demo -o reports/demo",
        date="2026-01-02T03:04:05Z",
        machine={"processor": "AMD EPYC 9B14, 2 cores", "system": "Linux & others"},
        model=MODEL,
        setting=sample_setting,
        profile=sample_profile,
        result=sample_search,
        estimates=tuple(sample_estimates),
        measurements=tuple(sample_measurements),
        validation=compare(sample_estimates, sample_measurements),
        reference=make_measurement(alone, reference, time=1.05),
        reference_estimate=reference,
        notes=("Four ranks share two cores.",),
    )


@pytest.fixture(scope="session")
def measure() -> Callable[..., Measurement]:
    """``make_measurement``, for tests that need a run of their own."""
    return make_measurement
