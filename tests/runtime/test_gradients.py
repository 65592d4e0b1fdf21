"""Norm of the whole gradient, clipping and bf16 over fp32 weights: layouts against one process."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import Plan, parse_slug
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.parallel.gradients import add_nothing, add_nothing_in_turn
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.parallel.precision import cast_when_used, plain_name

BATCH, SEQ, STEPS, RATE = 8, 16, 3, 0.5
DENSE = ModelSpec(
    name="dense", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=64,
    max_seq_len=SEQ, fused_qkv=False,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, name="tied", tied_embeddings=True),
    "experts": dataclasses.replace(DENSE, name="experts", num_layers=2, num_experts=4, top_k=2, expert_ffn_size=32),
}
# Below the norm of the first steps, so that gradients are really clipped.
MAX_NORM = 0.5

FP32, BF16 = "fp32", "bf16"
# Gradients of bf16 products have three digits, and a token between two experts may go to the other one.
TOLERANCE = {FP32: {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-6}, BF16: {"loss": 1e-3, "norm": 5e-3, "gradient": 1e-2}}
CASES = [
    ("dense", "dp4.mb2", FP32), ("dense", "dp2.tp2.sp.mb2", FP32), ("dense", "dp4.z3.rep2.mb1", FP32),
    ("dense", "dp2.tp2.z2.sp.mb4", FP32), ("dense", "pp2.tp2.sp.mb2", FP32), ("dense", "pp2.dp2.vp2.z1.mb2", FP32),
    ("dense", "tp2.pp2.mb2", FP32), ("tied", "tp2.pp2.vp2.mb2.sched-zb-v", FP32),
    ("tied", "dp2.tp2.z1.mb4", FP32), ("dense", "cp2.dp2.z3.mb2", FP32), ("experts", "dp4.ep2.mb2", FP32),
    ("dense", "dp4.mb2", BF16), ("dense", "dp2.tp2.sp.mb2", BF16), ("dense", "dp4.z3.rep2.mb1", BF16),
    ("dense", "pp2.tp2.sp.mb2", BF16), ("dense", "pp2.dp2.z2.mb1", BF16), ("dense", "pp2.dp2.mb1.ac-full", BF16),
    ("tied", "dp2.tp2.z1.mb4", BF16), ("dense", "cp2.tp2.mb4", BF16), ("dense", "pp2.dp2.mb1.sched-zb-h1", BF16),
    ("dense", "pp2.dp2.vp2.z3.mb1.sched-zb-v", BF16), ("experts", "dp4.ep2.mb2", BF16),
    ("experts", "dp4.ep2.z2.mb1", BF16),
]  # fmt: skip
TYPES = ["dp4.mb1", "dp4.z2.mb1", "dp2.tp2.sp.mb4"]
PARAMETERS = sum(p.numel() for p in build(DENSE).parameters())


def batch(step: int) -> Tensor:
    """The global batch of a step and the tokens that follow."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, DENSE.vocab_size, (BATCH, SEQ + 1), generator=generator)


@dataclasses.dataclass
class Reference:
    """What one process gets: loss, norm before clipping and clipped gradients of every step."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]


def one_process(spec: ModelSpec) -> Reference:
    """Plain torch, fp32."""
    module, found = build(spec), Reference([], [], [])
    update = torch.optim.SGD(module.parameters(), lr=RATE)
    for step in range(STEPS):
        tokens = batch(step)
        loss = language_model_loss(module(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        found.losses.append(loss.item())
        found.norms.append(nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM).item())
        found.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        update.step()
        update.zero_grad()
    return found


def parallel(plan: Plan, spec: ModelSpec, dtype: torch.dtype | None) -> ParallelModel:
    """The same model under a plan."""
    return autopar.parallelize(
        build(spec), plan, loss_fn=language_model_loss, device="cpu", compute_dtype=dtype,
        num_microbatches=BATCH // plan.layout.dp // plan.microbatch_size,
    )  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks found, once for all tests."""
    folder = tmp_path_factory.mktemp("gradients")
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": CASES, "types": TYPES}))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    node = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})
    messages: list[dict[str, Any]] = []
    launch(
        "worker_gradients", job, nodes=[node], ranks_per_node=4, out_dir=folder, stall_timeout_s=240,
        on_message=messages.append,
    )  # fmt: skip
    return messages


@pytest.mark.dist
def test_losses_norms_and_clipped_gradients_are_those_of_one_process(told: list[dict[str, Any]]) -> None:
    found = [message for message in told if "slug" in message]
    assert [(m["model"], m["slug"], m["precision"]) for m in found] == CASES
    for message in found:
        for what, limit in TOLERANCE[message["precision"]].items():
            assert message[what] < limit, message


@pytest.mark.dist
def test_the_norm_of_what_a_rank_holds_is_not_that_of_the_model(told: list[dict[str, Any]]) -> None:
    """Control: without holdings only DDP alone, where every rank has everything, would be right."""
    for message in told:
        if message.get("precision") == FP32:
            assert (message["naive"] < 1e-5) == (message["slug"] == "dp4.mb2"), message


@pytest.mark.dist
def test_bf16_computes_and_sends_narrow_and_reduces_wide(told: list[dict[str, Any]]) -> None:
    found = {message.pop("types of"): message for message in told if "types of" in message}
    assert list(found) == TYPES
    for message in found.values():
        assert message["products"] == ["torch.bfloat16"]
        assert message["weights"] == message["gradients"] == message["state"] == ["torch.float32"]
    groups = DENSE.num_layers + 1
    assert found["dp4.mb1"]["calls"] == [["all_reduce", "dp", 1, 4 * PARAMETERS]]
    assert found["dp4.z2.mb1"]["calls"] == [
        ["all_gather", "dp", groups, 2 * PARAMETERS],
        ["reduce_scatter", "dp", groups, 4 * PARAMETERS],
    ]
    stream = BATCH // 2 * batch(0)[:, :-1].shape[1] * DENSE.hidden_size
    scattered = [call for call in found["dp2.tp2.sp.mb4"]["calls"] if call[0] == "reduce_scatter"]
    added = 4 * DENSE.num_layers + 2  # the embedding of each microbatch too
    assert scattered == [["reduce_scatter", "tp", added, added * stream * 2]]


def test_one_rank_in_bf16_accumulates_in_fp32() -> None:
    """Losses and norms of eight microbatches; the control is a module that is bf16 throughout."""
    reference = one_process(DENSE)
    model = parallel(parse_slug("mb1"), DENSE, torch.bfloat16)
    tokens = batch(0)
    loss = model.train_step(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32 and abs(loss.item() - reference.losses[0]) < 1e-3
    assert abs(model.clip_grad_norm_(MAX_NORM).item() / reference.norms[0] - 1) < 5e-3
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
    narrow = build(DENSE).to(torch.bfloat16)
    bad = language_model_loss(narrow(tokens[:, :-1]), tokens[:, 1:])
    assert abs(bad.item() - reference.losses[0]) > 1e-3


def test_training_in_bf16_keeps_small_updates() -> None:
    """A weight of 1 takes updates of 1e-4 one after another; in bf16 itself it would stay 1."""
    model = parallel(parse_slug("mb8"), DENSE, torch.bfloat16)
    norm = dict(model.named_parameters())["norm.weight"]
    narrow = torch.ones((), dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(20):
            norm.add_(1e-4)
            narrow.add_(1e-4)
    assert torch.allclose(norm, torch.full_like(norm, 1.002), atol=1e-6) and narrow == 1


def test_casting_keeps_parameters_names_and_ties() -> None:
    module = build(DENSE)
    module.head.weight = module.embedding.token.weight
    before = list(module.named_parameters())
    cast_when_used(module, torch.bfloat16)
    assert [(plain_name(name), id(p)) for name, p in module.named_parameters()] == [(n, id(p)) for n, p in before]
    assert module.get_submodule("blocks.0.mlp.up").weight.dtype == module.head.weight.dtype == torch.bfloat16
    half = build(DENSE)
    cast_when_used(half, torch.bfloat16, only=[p for name, p in half.named_parameters() if name == "head.weight"])
    assert half.head.weight.dtype == torch.bfloat16 and half.norm.weight.dtype == torch.float32
    assert [name for name, _ in half.named_parameters() if name != plain_name(name)] == [
        "head.parametrizations.weight.original"
    ]


def test_clipping_one_rank_is_torchs() -> None:
    plain = build(DENSE)
    model = parallel(parse_slug("mb2"), DENSE, None)
    tokens = batch(0)
    language_model_loss(plain(tokens[:, :-1]), tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
    model.train_step(tokens[:, :-1], tokens[:, 1:])
    unclipped = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(model.clip_grad_norm_(float("inf")), nn.utils.get_total_norm(unclipped))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), unclipped, strict=True) if p.grad is not None)
    for limit in (10.0, 0.1):
        wanted = nn.utils.clip_grad_norm_(plain.parameters(), limit)
        torch.testing.assert_close(model.clip_grad_norm_(limit), wanted)
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = parallel(parse_slug("mb8"), DENSE, None)
    for bad in (float("nan"), float("inf")):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        next(model.parameters()).grad[0] = bad  # type: ignore[index]
        assert not torch.isfinite(model.clip_grad_norm_(1.0))


def test_without_gradients_the_norm_is_zero() -> None:
    assert parallel(parse_slug("mb8"), DENSE, None).clip_grad_norm_(1.0) == 0


def hooks_run(total: Callable[[list[nn.Parameter]], Tensor], number: int) -> list[int]:
    """Order in which the hooks behind parameters run in a backward pass from ``total`` of them."""
    parameters, seen = [nn.Parameter(torch.ones(2)) for _ in range(number)], list[int]()
    nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in parameters]  # type: ignore[union-attr]
    for index, node in enumerate(nodes):
        node.register_hook(lambda *grads, index=index: seen.append(index))
    total(parameters).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in parameters)
    return seen


def test_a_late_reduction_fills_buckets_in_the_order_of_a_backward_pass() -> None:
    """DDP rebuilds its buckets in the order of the hooks. Control: one node for all parameters mixes them up."""
    backward = list(reversed(range(40)))
    assert hooks_run(add_nothing_in_turn, 40) == backward
    assert sorted(hooks_run(add_nothing, 40)) == sorted(backward) and hooks_run(add_nothing, 40) != backward
