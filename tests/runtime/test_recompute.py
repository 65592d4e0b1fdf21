"""What recomputation frees, against what the cost model says, on one rank; and gradients that stay the same."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.errors import PlanError
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.observe.memory import measure_peak
from autopar.runtime.parallel.pipeline import Observer, Unobserved
from autopar.runtime.parallel.remake import Remaking
from autopar.workload import Precision

BATCH, SEQ = 4, 32
GPT = ModelSpec(
    name="gpt", num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=256, vocab_size=96, max_seq_len=SEQ
)
EXPERTS = dataclasses.replace(GPT, name="experts", num_experts=4, top_k=2, expert_ffn_size=96, dense_layers=1)
TOKENS = torch.randint(0, 96, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(2))


def kept(spec: ModelSpec, slug: str) -> tuple[int, list[torch.Tensor]]:
    """Bytes of a step that are held between forward and backward, and the gradients."""
    model = autopar.parallelize(
        build(spec), parse_slug(slug), loss_fn=language_model_loss, num_microbatches=1, device="cpu"
    )

    def step(observer: Observer) -> None:
        model.observer = observer
        model.train_step(TOKENS[:, :-1], TOKENS[:, 1:])

    step(Unobserved())
    for parameter in model.parameters():
        parameter.grad = None
    forward = measure_peak(step, torch.device("cpu"), {}).moments[0]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return forward.end_bytes - forward.begin_bytes, gradients


def freed(spec: ModelSpec, *tags: str) -> int:
    """What the analytic graph says that recomputing these parts of all blocks frees."""
    graph = build_graph(spec, seq_len=SEQ, batch_size=BATCH, precision=Precision.FP32)
    return round(sum(tensor.num_bytes for op in graph.ops for tensor in op.saved if tensor.made_by in tags))


@pytest.mark.parametrize(
    ("spec", "choices"),
    [
        (GPT, ("core_attn", "mlp", "layernorm", "mlp+layernorm", "core_attn+mlp+layernorm")),
        (EXPERTS, ("moe", "moe_act", "layernorm+moe_act", "mlp+layernorm+moe")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_gradients_are_the_same_and_memory_falls_as_foreseen(spec: ModelSpec, choices: tuple[str, ...]) -> None:
    whole, expected = kept(spec, "mb4")
    for choice in choices:
        held, gradients = kept(spec, f"mb4.ac-selective+{choice}")
        for left, right in zip(gradients, expected, strict=True):
            assert torch.equal(left, right), choice
        foreseen = freed(spec, *choice.split("+"))
        if "moe" in choice.split("+"):
            # The graph knows one fused exchange of tokens, where eager PyTorch keeps indices and masks as well.
            assert whole - held >= foreseen > 0, choice
        else:
            assert whole - held == foreseen > 0, choice


def test_the_first_blocks_alone_are_recomputed() -> None:
    """Each block that is recomputed keeps its input instead of everything."""
    held = {slug: kept(GPT, f"mb4.{slug}")[0] for slug in ("ac-none", "ac-full1", "ac-full2", "ac-full")}
    slugs = list(held)
    first, second, third = (held[more] - held[less] for more, less in itertools.pairwise(slugs))
    assert first == second == third > 0


def test_parts_have_to_be_declared() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match="selective recomputation of 'mlp' needs to know where it is"):
        autopar.parallelize(
            module, parse_slug("mb1.ac-selective+mlp"), loss_fn=F.mse_loss, num_microbatches=1, device="cpu"
        )


def test_results_are_made_again_once_for_all_who_need_them() -> None:
    calls = 0

    def norm(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return F.layer_norm(x, (8,)) * 2

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.left, self.right = nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return self.left(y) * self.right(y)

    x = torch.randn(3, 8, requires_grad=True)
    block = Twice()
    block.inner.forward = norm  # type: ignore[method-assign]
    expected = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    Remaking(block, [block.inner], [])
    calls = 0
    found = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    assert calls == 2
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(block(x), block(x))
