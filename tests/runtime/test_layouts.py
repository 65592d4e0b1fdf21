"""Every layout trains like one process: losses over 20 steps, the collectives really called, and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autopar.measurement import CountedCollective, Measurement
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.data.text import standard_library
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.run import run_plans
from autopar.workload import Optimizer, Precision, Workload

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

GPT = ModelSpec(
    name="tiny-gpt", num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=256, vocab_size=256,
    max_seq_len=32, fused_qkv=False,
)  # fmt: skip
LLAMA = ModelSpec(
    name="tiny-llama", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=192, vocab_size=256,
    max_seq_len=32, fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
)  # fmt: skip
BATCH, SEQ, STEPS, TOLERANCE = 16, 32, 20, 1e-5
BLOCKS, WIDTH, FP32 = GPT.num_layers, GPT.hidden_size, 4
STREAM = BATCH * SEQ * WIDTH * FP32  # the stream of activations of the global batch, in bytes
SCALARS = BATCH * SEQ * FP32  # one number of each token
PARAMETERS = sum(p.numel() for p in build(GPT).parameters()) * FP32
NORMS = sum(p.numel() for name, p in build(GPT).named_parameters() if "norm" in name) * FP32

PLANS = {
    1: ("mb16", "mb4", "mb4.ac-full"),
    2: (
        "dp2.mb8", "dp2.mb2", "dp2.z1.mb8", "dp2.z1.mb2", "dp2.z2.mb8", "dp2.z2.mb2", "dp2.z3.mb8",
        "dp2.z3.mb2.ac-full", "tp2.mb16", "tp2.sp.mb16", "pp2.mb4", "pp2.mb2.sched-gpipe", "pp2.vp2.mb4",
        "pp2.mb4.split-1-3",
    ),
    4: (
        "dp4.mb4", "dp4.z2.mb4", "dp4.z3.mb4", "dp4.z3.rep2.mb4", "tp4.mb16", "pp4.mb4", "dp2.pp2.mb2",
        "dp4.z1.rep2.mb4", "dp2.pp2.z1.mb2", "dp2.tp2.z1.mb8", "dp2.pp2.z2.mb2",
        "dp2.pp2.z3.mb2", "dp2.tp2.mb8", "dp2.tp2.z2.sp.mb8", "tp2.pp2.sp.mb4",
    ),
}  # fmt: skip
# Adam hardly sees a gradient that is wrong by a factor; plain gradient descent does.
SCALE_PLANS = (
    "dp4.z3.mb2",
    "dp2.pp2.vp2.z1.mb2",
    "dp2.pp2.mb2",
    "dp2.tp2.sp.mb4.ac-full",
    "dp2.tp2.z2.mb8",
    "tp2.pp2.sp.mb4",
    "dp2.pp2.vp2.z2.mb2",
)
SGD_RATE = 0.3


def workload(optimizer: Optimizer = Optimizer.ADAMW) -> Workload:
    return Workload(global_batch=BATCH, seq_len=SEQ, precision=Precision.FP32, optimizer=optimizer)


def run(
    folder: Path, ranks: int, slugs: tuple[str, ...], model: ModelSpec = GPT,
    optimizer: Optimizer = Optimizer.ADAMW, rate: float = 3e-4, steps: int = STEPS - 5,
) -> dict[str, Measurement]:  # fmt: skip
    job = TrainJob(
        model=model, workload=workload(optimizer), plans=tuple(parse_slug(slug) for slug in slugs), steps=steps,
        warmup=2, learning_rate=rate, out_dir=str(folder),
    )  # fmt: skip
    found = run_plans(job, nodes=[local_node()], ranks_per_node=ranks, stall_timeout_s=120)
    return dict(zip(slugs, found, strict=True))


def one_process(
    model: ModelSpec = GPT, *, seed: int = 0, optimizer: Optimizer = Optimizer.ADAMW, rate: float = 3e-4,
    steps: int = STEPS, change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """An ordinary training loop over the global batch, without anything of the executor but its data."""
    module, corpus = build(model, seed), standard_library(SEQ)
    matrices, rest = ([p for p in module.parameters() if (p.ndim > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    adamw = optimizer is Optimizer.ADAMW
    update: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=rate) if adamw else torch.optim.SGD(module.parameters(), lr=rate)
    )
    losses = []
    for step in range(steps):
        tokens = corpus.global_batch(step, BATCH)
        loss = language_model_loss(module(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        for parameter in module.parameters():
            if change is not None and parameter.grad is not None:
                parameter.grad = change(parameter.grad)
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    return losses


def difference(left: list[float] | tuple[float, ...], right: list[float] | tuple[float, ...]) -> float:
    assert len(left) == len(right)
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Measurement]]:
    """Measurements of all plans of a number of ranks, run once."""
    done: dict[int, dict[str, Measurement]] = {}

    def get(ranks: int) -> dict[str, Measurement]:
        if ranks not in done:
            done[ranks] = run(tmp_path_factory.mktemp(f"layouts{ranks}"), ranks, PLANS[ranks])
        return done[ranks]

    return get


@pytest.fixture(scope="session")
def reference() -> list[float]:
    return one_process()


@pytest.mark.parametrize(("ranks", "slug"), [(ranks, slug) for ranks, slugs in PLANS.items() for slug in slugs])
def test_losses_equal_those_of_one_process(
    runs: Callable[[int], dict[str, Measurement]], reference: list[float], ranks: int, slug: str
) -> None:
    measured = runs(ranks)[slug]
    assert difference(measured.losses, reference) < TOLERANCE
    assert measured.losses[-1] < measured.losses[0] - 0.3
    assert len(measured.step_s) == STEPS - 5 and min(measured.step_s) > 0


def test_the_comparison_can_fail(runs: Callable[[int], dict[str, Measurement]], reference: list[float]) -> None:
    """Negative controls: another seed, and data parallel ranks that never average."""
    assert difference(one_process(seed=1), reference) > 100 * TOLERANCE
    share = standard_library(SEQ)
    half = [language_model_loss(build(GPT)(t[:, :-1]), t[:, 1:]).item() for t in (share.share(0, BATCH, 0, 2),)]
    assert abs(half[0] - reference[0]) > 100 * TOLERANCE


def test_gradients_have_the_right_scale(tmp_path: Path) -> None:
    expected = one_process(optimizer=Optimizer.SGD, rate=SGD_RATE, steps=8)
    for slug, measured in run(tmp_path, 4, SCALE_PLANS, optimizer=Optimizer.SGD, rate=SGD_RATE, steps=3).items():
        assert difference(measured.losses, expected) < TOLERANCE, slug
    for factor in (2.0, 0.5):
        wrong = one_process(
            optimizer=Optimizer.SGD, rate=SGD_RATE, steps=8, change=lambda gradient, by=factor: gradient * by
        )
        assert difference(wrong, expected) > 100 * TOLERANCE


def test_llama_style(tmp_path: Path) -> None:
    expected = one_process(LLAMA, steps=8)
    for slug, measured in run(tmp_path, 2, ("tp2.mb16", "tp2.sp.mb8", "pp2.mb4", "dp2.z3.mb8"), LLAMA, steps=3).items():
        assert difference(measured.losses, expected) < TOLERANCE, slug


def counted(measured: Measurement, rank: int = 0) -> set[tuple[str, str, int, int, int]]:
    found: tuple[CountedCollective, ...] = measured.ranks[rank].collectives
    return {(c.kind, c.axis, c.group_size, c.count, c.num_bytes) for c in found}


def test_one_process_communicates_nothing(runs: Callable[[int], dict[str, Measurement]]) -> None:
    assert all(not measured.ranks[0].collectives for measured in runs(1).values())


def test_data_parallel_collectives(runs: Callable[[int], dict[str, Measurement]]) -> None:
    """DDP reduces each parameter once per step, whatever the microbatches; the model fits one bucket."""
    groups = BLOCKS + 1  # fully_shard gathers each block, and the rest together
    assert counted(runs(2)["dp2.mb8"]) == {("all_reduce", "dp", 2, 1, PARAMETERS)}
    assert counted(runs(2)["dp2.mb2"]) == {("all_reduce", "dp", 2, 1, PARAMETERS)}
    assert counted(runs(4)["dp4.mb4"]) == {("all_reduce", "dp", 4, 1, PARAMETERS)}
    reduced = ("reduce_scatter", "dp", 2, groups, PARAMETERS)
    for slug in ("dp2.z1.mb8", "dp2.z1.mb2", "dp2.z2.mb8", "dp2.z2.mb2"):
        assert counted(runs(2)[slug]) == {("all_gather", "dp", 2, groups, PARAMETERS), reduced}, slug
    assert counted(runs(2)["dp2.z3.mb8"]) == {("all_gather", "dp", 2, 2 * groups, 2 * PARAMETERS), reduced}
    gathers = 2 * 4  # forward and backward of each of four microbatches
    assert counted(runs(2)["dp2.z3.mb2.ac-full"]) == {
        ("all_gather", "dp", 2, gathers * groups, gathers * PARAMETERS),
        reduced,
    }


def test_hybrid_sharding_collectives(runs: Callable[[int], dict[str, Measurement]]) -> None:
    groups = BLOCKS + 1
    for slug, gathers in (("dp4.z1.rep2.mb4", 1), ("dp4.z3.rep2.mb4", 2)):
        assert counted(runs(4)[slug]) == {
            ("all_gather", "dp_shard", 2, gathers * groups, gathers * PARAMETERS),
            ("reduce_scatter", "dp_shard", 2, groups, PARAMETERS),
            ("all_reduce", "dp_replicate", 2, groups, PARAMETERS // 2),
        }


@pytest.mark.parametrize(("ranks", "slug"), [(2, "tp2.mb16"), (4, "tp4.mb16")])
def test_tensor_parallel_collectives(runs: Callable[[int], dict[str, Measurement]], ranks: int, slug: str) -> None:
    """Per block: attention and feed-forward reduce their output in forward and their input's gradient in backward.

    The embedding reduces its output, the head its input's gradient, and the loss three numbers of each token.
    """
    expected = (4 * BLOCKS + 2) * STREAM + 3 * SCALARS
    assert counted(runs(ranks)[slug]) == {("all_reduce", "tp", ranks, 4 * BLOCKS + 5, expected)}


def test_sequence_parallel_collectives(runs: Callable[[int], dict[str, Measurement]]) -> None:
    """Each of those reductions of the stream becomes a gather and a scatter."""
    positions = GPT.max_seq_len * WIDTH * FP32
    assert counted(runs(2)["tp2.sp.mb16"]) == {
        ("all_gather", "tp", 2, 4 * BLOCKS + 2, (4 * BLOCKS + 2) * STREAM),
        ("reduce_scatter", "tp", 2, 4 * BLOCKS + 2, (4 * BLOCKS + 2) * STREAM),
        ("all_reduce", "tp", 2, 1 + 3, NORMS + positions + 3 * SCALARS),
    }


def test_pipeline_collectives(runs: Callable[[int], dict[str, Measurement]]) -> None:
    """The stream once forward, its gradient once back, over each boundary; the loss goes to all stages."""
    loss = ("broadcast", "pp", 2, 1, FP32)
    for slug, microbatches in (("pp2.mb4", 4), ("pp2.mb2.sched-gpipe", 8), ("pp2.mb4.split-1-3", 4)):
        expected = {("send", "pp", 2, microbatches, STREAM), ("recv", "pp", 2, microbatches, STREAM), loss}
        assert counted(runs(2)[slug], 0) == expected, slug
        assert counted(runs(2)[slug], 1) == expected, slug
    # Four virtual stages have three boundaries, all between the two ranks.
    three = {("send", "pp", 2, 12, 3 * STREAM), ("recv", "pp", 2, 12, 3 * STREAM), loss}
    assert counted(runs(2)["pp2.vp2.mb4"]) == three
    middle = {(kind, "pp", 4, 8, 2 * STREAM) for kind in ("send", "recv")}
    assert counted(runs(4)["pp4.mb4"], 1) == middle | {("broadcast", "pp", 4, 1, FP32)}


def test_two_axes_at_once(runs: Callable[[int], dict[str, Measurement]]) -> None:
    half = STREAM // 2  # each data parallel rank has half of the batch
    measured = runs(4)["dp2.pp2.mb2"]
    pipeline = {("send", "pp", 2, 4, half), ("recv", "pp", 2, 4, half), ("broadcast", "pp", 2, 1, FP32)}
    stages = [dict(measured.ranks[rank].memory)["parameters"] for rank in (0, 2)]
    assert sum(stages) == PARAMETERS
    for rank, stage in ((0, stages[0]), (2, stages[1])):
        assert counted(measured, rank) == pipeline | {("all_reduce", "dp", 2, 1, stage)}
    tensor = runs(4)["dp2.tp2.mb8"]
    local = dict(tensor.ranks[0].memory)["parameters"]
    assert counted(tensor) == {
        ("all_reduce", "tp", 2, 4 * BLOCKS + 5, (4 * BLOCKS + 2) * half + 3 * SCALARS // 2),
        ("all_reduce", "dp", 2, 1, local),
    }


def test_memory_items(runs: Callable[[int], dict[str, Measurement]]) -> None:
    """AdamW keeps two moments per weight, and a step count of four bytes per tensor."""
    tensors = len(list(build(GPT).parameters()))
    for ranks, slug, shards in (
        (1, "mb16", 1),
        (2, "dp2.mb8", 1),
        (2, "dp2.z1.mb8", 2),
        (2, "dp2.z2.mb8", 2),
        (4, "dp4.z3.mb4", 4),
    ):
        for rank in runs(ranks)[slug].ranks:
            items = rank.memory
            assert items["parameters"] == items["gradients"] == PARAMETERS // shards, slug
            assert items["optimizer"] == 2 * PARAMETERS // shards + 4 * tensors, slug
            assert rank.peak_bytes == sum(items[name] for name in items if name != "gradients"), slug
    buckets = runs(2)["dp2.mb8"].ranks[0].memory["buffers"] - runs(2)["dp2.z2.mb8"].ranks[0].memory["buffers"]
    assert abs(buckets - PARAMETERS) < 4096
    assert runs(1)["mb4"].peak_bytes < runs(1)["mb16"].peak_bytes
    assert runs(1)["mb4.ac-full"].peak_bytes < runs(1)["mb4"].peak_bytes


def test_spans_are_the_schedule(runs: Callable[[int], dict[str, Measurement]]) -> None:
    measured = runs(2)["pp2.mb4"]
    actions = [[span.name for span in rank.spans if span.phase in ("forward", "backward")] for rank in measured.ranks]
    assert actions[0] == ["0F0", "0F1", "0B0", "0F2", "0B1", "0F3", "0B2", "0B3"]
    assert actions[1] == ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2", "1F3", "1B3"]
    ends = {span.name: span for rank in measured.ranks for span in rank.spans}
    for microbatch in range(4):
        assert ends[f"0F{microbatch}"].end_s <= ends[f"1F{microbatch}"].start_s
        assert ends[f"1B{microbatch}"].end_s <= ends[f"0B{microbatch}"].start_s
    for rank in measured.ranks:
        assert [span.name for span in rank.spans].count("send pp") == 4
        assert all(0 <= span.start_s <= span.end_s < 60 for span in rank.spans)
        assert rank.spans[-1].name == "optimizer"
