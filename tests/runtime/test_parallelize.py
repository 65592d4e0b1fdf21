"""``autopar.parallelize`` for modules of a user's own: what it finds, refuses, and computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.errors import InputError, PlanError
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.parallel.parts import Chain, boundaries, find_parts, skeleton
from autopar.runtime.parallel.tensor_styles import resolve_plan

SPEC = ModelSpec(
    name="t", num_layers=3, hidden_size=16, num_heads=2, num_kv_heads=2, ffn_size=32, vocab_size=20, max_seq_len=8,
    fused_qkv=False,
)  # fmt: skip


class Branched(nn.Module):
    """A module whose blocks are in a list, with a skip that a pipeline could not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y).relu()
        return x + y


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


def test_one_rank_accumulates_to_the_gradient_of_the_whole_batch() -> None:
    x, y = torch.randn(12, 8), torch.randn(12, 4)
    plain = mlp()
    expected = F.mse_loss(plain(x), y)
    expected.backward()
    for slug, microbatches in (("mb12", 1), ("mb3", 4), ("mb3.ac-full", 4)):
        model = autopar.parallelize(
            mlp(), parse_slug(slug), loss_fn=F.mse_loss, num_microbatches=microbatches, device="cpu"
        )
        torch.testing.assert_close(model.train_step(x, y), expected.detach())
        for (name, parameter), (same, reference) in zip(
            model.named_parameters(), plain.named_parameters(), strict=True
        ):
            assert name == same
            torch.testing.assert_close(parameter.grad, reference.grad)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    model = autopar.parallelize(mlp(), parse_slug("mb3"), loss_fn=F.mse_loss, num_microbatches=4, device="cpu")
    with pytest.raises(InputError, match="10 does not divide into 4 microbatches"):
        model.train_step(torch.randn(10, 8), torch.randn(10, 4))


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("dp2.mb1", "the plan is for 2 ranks, but there are 1; start under torchrun"),
        ("mb1.ac-selective+op_level", "recomputation of op_level alone"),
    ],
)
def test_plans_that_do_not_fit_are_refused(slug: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        autopar.parallelize(build(SPEC), parse_slug(slug), loss_fn=language_model_loss, num_microbatches=4)
    assert message in str(caught.value)


def test_recompute_needs_blocks() -> None:
    with pytest.raises(PlanError, match="declare pipeline_parts"):
        autopar.parallelize(
            nn.Linear(2, 2), parse_slug("mb1.ac-full"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu"
        )


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"blocks.*.mlp.upp": "colwise"}, "no module named 'blocks.*.mlp.upp'"),
        ({"blocks.*.mlp": "colwise"}, "is a FeedForward; only Linear"),
        ({"blocks.*.mlp.up": "columns"}, "it is one of colwise, rowwise"),
        ({"head": "colwise"}, "tp=3 does not divide the 20 features of 'head'"),
    ],
)
def test_wrong_tensor_parallel_plans_are_refused(declared: Mapping[str, str], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        resolve_plan(build(SPEC), declared, 3)
    assert message in str(caught.value)


def test_tensor_parallelism_needs_a_declaration() -> None:
    with pytest.raises(PlanError, match="pass tensor_parallel_plan"):
        resolve_plan(mlp(), None, 2)
    assert len(resolve_plan(build(SPEC), None, 2)) == 6 * SPEC.num_layers + 2


def test_parts_of_modules() -> None:
    assert find_parts(build(SPEC)).blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert find_parts(mlp()).blocks == ("0", "1", "2", "3") and find_parts(mlp()).chained
    assert find_parts(Branched()).blocks == ("layers.0", "layers.1", "layers.2")
    assert not find_parts(Branched()).chained and not find_parts(nn.Linear(1, 1)).blocks


def test_stages_keep_names_and_lose_nothing() -> None:
    module = build(SPEC)
    stages = find_parts(module).stages(parse_slug("pp2.mb1"))
    assert stages == (("embedding", "blocks.0", "blocks.1"), ("blocks.2", "norm", "head"))
    chains = [Chain(module, stage) for stage in stages]
    names = [name for chain in chains for name, _ in chain.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    tokens = torch.randint(0, 20, (2, 8))
    assert torch.equal(chains[1](chains[0](tokens)), module(tokens))


def test_shapes_between_stages_are_found_without_computing() -> None:
    module = build(SPEC)
    bare = skeleton(module)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert not any(parameter.is_meta for parameter in module.parameters())
    stages = find_parts(module).stages(parse_slug("pp3.mb1"))
    found = boundaries([Chain(bare, stage) for stage in stages], torch.zeros(2, 8, dtype=torch.int64))
    assert [tuple(x.shape) for x in found] == [(2, 8), (2, 8, 16), (2, 8, 16), (2, 8, 20)]


@pytest.mark.dist
def test_modules_of_a_user_on_two_ranks(tmp_path: Path) -> None:
    """The worker compares losses and gradients with one process, under several plans."""
    job = tmp_path / "job.json"
    job.write_text("{}")
    folder = str(Path(__file__).parent)
    node = Node(
        index=0, address="127.0.0.1", env={"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    )
    messages: list[dict[str, str]] = []
    launch(
        "worker_user_modules", job, nodes=[node], ranks_per_node=2, out_dir=tmp_path, stall_timeout_s=120,
        on_message=messages.append,
    )  # fmt: skip
    assert [message["checked"] for message in messages] == [
        "sequential dp2.mb2", "sequential dp2.z3.mb4", "sequential pp2.mb2", "sequential pp2.mb2.split-3-1",
        "sequential tp2.mb4", "branched dp2.z2.mb4", "branched pp2 refused", "normed tp2.mb4", "normed tp2 refused",
        "normed tp2.sp refused",
    ]  # fmt: skip
