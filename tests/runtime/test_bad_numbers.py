"""NaN and inf are found before the optimizer, and named by step, rank and layer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import RunError
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.parallel.parallel_model import ParallelModel
from autopar.runtime.step.bad_numbers import BACKWARD, FORWARD, Finding, check_numbers, explain

SPEC = ModelSpec(
    name="tiny", num_layers=4, hidden_size=16, num_heads=2, num_kv_heads=2, ffn_size=32, vocab_size=32, max_seq_len=8,
    fused_qkv=False,
)  # fmt: skip
BATCH = 8


def model(slug: str = "mb4", dtype: torch.dtype | None = None) -> ParallelModel:
    plan = parse_slug(slug)
    return autopar.parallelize(
        build(SPEC), plan, loss_fn=language_model_loss, device="cpu", compute_dtype=dtype,
        num_microbatches=BATCH // plan.layout.dp // plan.microbatch_size,
    )  # fmt: skip


def tokens(size: int = BATCH) -> Tensor:
    return torch.randint(0, SPEC.vocab_size, (size, 9), generator=torch.Generator().manual_seed(0))


def submodule(parallel: ParallelModel, name: str) -> nn.Module | None:
    found = [child for module in parallel.modules for n, child in module.named_modules() if n.endswith(name)]
    return found[0] if found else None


@contextmanager
def broken(parallel: ParallelModel, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Output of a module of this rank, if it has it, changed."""
    module = submodule(parallel, name)
    handles = [] if module is None else [module.register_forward_hook(lambda _, __, output: change(output))]
    yield
    for handle in handles:
        handle.remove()


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.nan


def bad_gradient(x: Tensor) -> Tensor:
    result: Tensor = _BadGradient.apply(x)  # type: ignore[no-untyped-call]
    return result


def message_of(parallel: ParallelModel, step: int = 3, size: int = BATCH) -> str:
    """What a step is ended with; empty if it is not."""
    batch = tokens(size)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    loss = parallel.train_step(inputs, targets)
    try:
        check_numbers(parallel, step, loss, parallel.clip_grad_norm_(1.0), inputs, targets)
    except RunError as error:
        return str(error)
    return ""


def test_good_numbers_pass() -> None:
    assert message_of(model()) == ""


@pytest.mark.parametrize("slug", ["mb4", "mb4.ac-full"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_first_module_with_a_bad_output_is_named(slug: str, dtype: torch.dtype | None) -> None:
    parallel = model(slug, dtype)
    with broken(parallel, "blocks.2.mlp.up", lambda x: x * torch.inf):
        message = message_of(parallel)
    assert message.startswith("step 3: the gradient norm is nan. First not finite is the output of blocks.2.mlp.up,")
    assert "on rank 0" in message


def test_the_first_bad_gradient_is_named() -> None:
    parallel = model()
    with broken(parallel, "blocks.1.attention.output", bad_gradient):
        message = message_of(parallel)
    assert "First not finite is the gradient of the output of blocks.1.attention." in message


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_bad_weight_is_named(dtype: torch.dtype | None) -> None:
    parallel = model(dtype=dtype)
    with torch.no_grad():
        dict(parallel.named_parameters())["blocks.3.norm2.weight"][0] = torch.nan
    assert "First not finite is the weight blocks.3.norm2.weight, on rank 0; an earlier step" in message_of(parallel)


def test_a_bad_loss_of_good_gradients_is_named() -> None:
    parallel, batch = model(), tokens()
    loss = parallel.train_step(batch[:, :-1], batch[:, 1:])
    with pytest.raises(RunError, match="step 5: the loss is inf on rank 0, though the gradients are finite"):
        check_numbers(parallel, 5, loss + torch.inf, torch.ones(()), batch[:, :-1], batch[:, 1:])


def test_what_does_not_happen_again_is_told() -> None:
    parallel, batch = model(), tokens()
    loss = parallel.train_step(batch[:, :-1], batch[:, 1:])
    with pytest.raises(RunError, match="did not happen again"):
        check_numbers(parallel, 5, loss, torch.full((), torch.nan), batch[:, :-1], batch[:, 1:])


def test_a_bad_norm_leaves_gradients_as_they_are() -> None:
    parallel = model()
    for parameter in parallel.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = next(parallel.parameters())
    assert first.grad is not None
    first.grad[0] = torch.inf
    parallel.clip_grad_norm_(0.1)
    assert all((p.grad == 1).all() for p in parallel.parameters() if p is not first and p.grad is not None)


def test_the_earliest_finding_of_all_ranks_counts() -> None:
    def finding(rank: int, phase: str, stage: int, name: str) -> Finding:
        return Finding(rank=rank, phase=phase, order=(stage, 0), name=name)

    found = [finding(0, BACKWARD, -1, "b"), finding(3, FORWARD, 1, "late"), finding(2, FORWARD, 0, "early"),
             finding(1, FORWARD, 0, "early")]  # fmt: skip
    assert "the output of early, on ranks 1, 2" in explain(found)
    assert "the gradient of the output of b, on rank 0" in explain(found[:1])


@pytest.mark.dist
def test_ranks_and_layers_of_two_ranks(tmp_path: Path) -> None:
    """A rank's own bad output is its own, though the reduction makes everybody's gradients bad."""
    cases = [
        ("dp2.mb2", "blocks.1.mlp.down", 1, "forward"), ("dp2.z3.mb2", "blocks.2.attention", 0, "forward"),
        ("pp2.mb2", "blocks.0.mlp.act", 0, "backward"), ("pp2.mb2", "blocks.3.mlp", 1, "forward"),
    ]  # fmt: skip
    job = tmp_path / "job.json"
    job.write_text(json.dumps(cases))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    node, messages = Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path}), list[dict[str, Any]]()
    launch(
        "worker_bad_numbers", job, nodes=[node], ranks_per_node=2, out_dir=tmp_path, stall_timeout_s=240,
        on_message=messages.append,
    )  # fmt: skip
    for (slug, name, rank, phase), message in zip(cases, messages, strict=True):
        told = message["told"]
        assert len(set(told)) == 1 and told[0].startswith("step 3: "), (slug, told)
        place = f"the output of {name}," if phase == "forward" else f"the gradient of the output of {name[:-4]}.up,"
        assert f"First not finite is {place} on rank {rank};" in told[0], (slug, told[0])
