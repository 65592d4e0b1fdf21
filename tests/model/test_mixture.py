"""The module of a mixture of experts: routing, capacity, and agreement with a dense computation and the graph."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopar.errors import InputError
from autopar.model.build import build_graph
from autopar.model.experts import MixtureOfExperts, WholeSequence
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.model.transformer import build, language_model_loss

GATED = ModelSpec(
    name="gated", num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=50, max_seq_len=16,
    fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
    num_experts=8, top_k=2, expert_ffn_size=24, shared_ffn_size=40, dense_layers=1,
)  # fmt: skip
PLAIN = dataclasses.replace(
    GATED, name="plain", gated_mlp=False, bias=True, shared_ffn_size=0, dense_layers=0, top_k=3, norm=Norm.LAYERNORM
)
SPECS = (GATED, PLAIN)


def mixture(spec: ModelSpec, seed: int = 0) -> MixtureOfExperts:
    """A mixture with weights so large that nothing hides in rounding."""
    module, generator = MixtureOfExperts(spec), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def stream(batch: int = 3, length: int = 16) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(5))


def densely(module: MixtureOfExperts, x: Tensor, capacity: float = math.inf) -> Tensor:
    """Every token through every expert, one after another, weighted with zero where it was not sent there."""
    result = torch.zeros_like(x) if module.shared is None else module.shared(x)
    scores = F.linear(x, module.router.weight, module.router.bias).softmax(-1)
    for b in range(x.shape[0]):
        load = [0] * module.num_experts
        for s in range(x.shape[1]):
            best = sorted(range(module.num_experts), key=lambda e, row=scores[b, s]: -row[e].item())[: module.top_k]
            total = scores[b, s, best].sum() if module.top_k > 1 else 1.0
            for expert in best:
                load[expert] += 1
                if load[expert] > capacity:
                    continue
                in_bias = None if module.up.bias is None else module.up.bias[expert].flatten()
                out = F.linear(x[b, s], module.up.weight[expert].flatten(0, -2), in_bias)
                inner = F.silu(out.chunk(2)[0]) * out.chunk(2)[1] if module.gated else F.gelu(out)
                bias = None if module.down.bias is None else module.down.bias[expert]
                part = scores[b, s, expert] / total * F.linear(inner, module.down.weight[expert], bias)
                index = torch.tensor([b * x.shape[1] + s])
                result = result.flatten(0, 1).index_add(0, index, part.unsqueeze(0)).view_as(x)
    return result


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_parameters_are_those_of_the_analytic_graph(spec: ModelSpec) -> None:
    expected = {p.name: p.elements for p in build_graph(spec, seq_len=16).parameters()}
    assert {name: p.numel() for name, p in build(spec).named_parameters()} == expected


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spec", [*SPECS, dataclasses.replace(GATED, name="switch", top_k=1)], ids=lambda s: s.name)
def test_it_equals_every_token_through_every_expert(spec: ModelSpec, factor: float) -> None:
    """Results and all gradients."""
    found = []
    module = mixture(dataclasses.replace(spec, capacity_factor=factor))
    capacity = math.ceil(16 * spec.top_k / 8 * factor) if factor else math.inf
    for forward in (module, lambda x: densely(module, x, capacity)):
        module.zero_grad()
        x = stream().requires_grad_()
        result = forward(x)
        result.square().sum().backward()
        assert x.grad is not None
        found.append([result.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 2 + len(list(module.parameters()))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_capacity_drops_and_counts_each_sequence_by_itself() -> None:
    free, narrow = (mixture(dataclasses.replace(GATED, shared_ffn_size=0, capacity_factor=f)) for f in (0.0, 0.5))
    x = stream()
    assert not torch.allclose(free(x), narrow(x))
    kept = torch.isclose(free(x), narrow(x)).all(-1)
    assert kept[:, 0].all(), "the first token of a sequence always finds room"
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(narrow(x), torch.cat([narrow(row.unsqueeze(0)) for row in x]))
    wide = mixture(dataclasses.replace(GATED, shared_ffn_size=0, capacity_factor=8.0))
    assert torch.equal(wide(x), free(x)), "room for all"


class Quarters:
    """Four ranks, one after another in this process, with a quarter of each sequence in two runs."""

    num_ranks, runs = 4, 2

    def __init__(self) -> None:
        self.before = torch.zeros(3, 8, dtype=torch.int64)

    def counted_before(self, counts: Tensor) -> Tensor:
        earlier = torch.stack((self.before, self.before + counts[:, 0]), dim=1)
        self.before = self.before + counts.sum(1)
        return earlier


def test_a_divided_sequence_counts_what_comes_before() -> None:
    module = mixture(dataclasses.replace(GATED, capacity_factor=0.5))
    x = stream()
    whole = module(x)
    module.order = Quarters()
    torch.testing.assert_close(torch.cat([module(part) for part in x.chunk(4, dim=1)], dim=1), whole)
    module.order = WholeSequence()
    assert not torch.allclose(torch.cat([module(part) for part in x.chunk(4, dim=1)], dim=1), whole)


def test_operations_are_those_of_the_graph() -> None:
    """FLOPs of both passes and the floating point tensors that autograd keeps."""
    spec = dataclasses.replace(GATED, shared_ffn_size=0)
    graph = build_graph(spec, seq_len=16, batch_size=3)
    ops = [op for op in graph.block_ops(1) if ".moe." in op.name]
    module, x = mixture(spec), stream().requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x).sum().backward()
    assert counter.get_total_flops() == sum(op.forward_flops + op.backward_flops for op in ops)
    floating = {a: t for a, t in kept.items() if a not in weights and t.is_floating_point()}
    measured = sum(t.untyped_storage().nbytes() for t in floating.values())
    roles = {t.name.partition(".moe.")[2]: t.num_bytes for op in ops for t in op.saved}
    # fp32 here, bf16 in the graph; the router's scores and weights are fp32 in both. Normalising keeps the weights of
    # the k best and their sum once more.
    narrow = ("router.scores", "combine.weights")
    expected = sum(size * (1 if name in narrow else 2) for name, size in roles.items()
                   if name not in ("router.map", "dispatch.order"))  # fmt: skip
    assert measured == expected + 48 * (2 + 1) * 4


def test_it_learns() -> None:
    spec = dataclasses.replace(GATED, capacity_factor=1.25)
    model = build(spec)
    tokens = torch.randint(0, 50, (8, 17), generator=torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(12):
        loss = language_model_loss(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(50), abs=0.1) and losses[-1] < losses[0] - 1


def test_shapes_without_values() -> None:
    """Pipelines ask for shapes on the meta device, where no token can be counted."""
    with torch.device("meta"):
        model = build(dataclasses.replace(GATED, capacity_factor=1.0))
        assert model(torch.empty(2, 16, dtype=torch.int64)).shape == (2, 16, 50)


def test_divided_products_are_named() -> None:
    def of_blocks(spec: ModelSpec) -> set[str]:
        return {name for name in build(spec).tensor_parallel_plan if ".mlp." in name or ".moe." in name}

    assert of_blocks(GATED) == {
        "blocks.*.mlp.gate", "blocks.*.mlp.up", "blocks.*.mlp.down",
        "blocks.*.moe.shared.gate", "blocks.*.moe.shared.up", "blocks.*.moe.shared.down",
    }  # fmt: skip
    assert not of_blocks(PLAIN)


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(InputError, match="capacity_factor is -1"):
        dataclasses.replace(GATED, capacity_factor=-1.0)
    with pytest.raises(InputError, match="has no qk_norm, clamped_activation"):
        build(dataclasses.replace(GATED, qk_norm=True, clamped_activation=True))
