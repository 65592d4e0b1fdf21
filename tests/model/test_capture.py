"""The captured graph of a transformer equals the analytic one, and both equal what a real run does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from autopar.graph import Op, OpGraph, OpKind, Split
from autopar.model import transformer
from autopar.model.build import build_graph
from autopar.model.capture import capture
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.workload import Precision

SMALL = ModelSpec(
    name="small", num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=4, ffn_size=56, vocab_size=40, max_seq_len=40,
    fused_qkv=False,
)  # fmt: skip
LLAMA = dataclasses.replace(
    SMALL, name="llama", num_kv_heads=2, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False
)
GPT_CASES = {
    "demo": (load_preset("demo-gpt"), 2, 64),
    "gpt2, tied and fused, odd batch": (load_preset("gpt2-small"), 3, 32),
    "gpt3, few blocks": (dataclasses.replace(load_preset("gpt3-2.7b"), num_layers=2), 1, 128),
    "bert, not causal": (dataclasses.replace(load_preset("bert-base"), num_layers=2), 5, 48),
    "separate products, odd lengths": (SMALL, 3, 37),
    "batch of one": (SMALL, 1, 40),
    "no biases": (dataclasses.replace(SMALL, bias=False), 2, 16),
    "vocabulary as long as the sequence": (dataclasses.replace(SMALL, vocab_size=40, max_seq_len=40), 2, 16),
    "grouped queries": (dataclasses.replace(SMALL, num_kv_heads=2), 2, 16),
    "grouped queries, fused": (dataclasses.replace(SMALL, num_kv_heads=2, fused_qkv=True), 2, 16),
    "wide heads": (dataclasses.replace(SMALL, head_size=16), 2, 16),
    "no positions": (dataclasses.replace(SMALL, position=Position.NONE), 2, 16),
    "gated": (dataclasses.replace(SMALL, gated_mlp=True), 2, 16),
}


def capture_spec(spec: ModelSpec, batch: int, length: int) -> OpGraph:
    with torch.device("meta"):
        module = transformer.build(spec)
        tokens = torch.empty(batch, length, dtype=torch.long)
    return capture(module, (tokens,), loss_fn=transformer.language_model_loss, targets=tokens, name=spec.name)


def build_spec(spec: ModelSpec, batch: int, length: int) -> OpGraph:
    return build_graph(spec, seq_len=length, batch_size=batch, precision=Precision.FP32)


def differences(left: OpGraph, right: OpGraph, *, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Name and field of everything in which operations differ."""
    for one, other in zip(left.ops, right.ops, strict=True):
        for field in dataclasses.fields(Op):
            if field.name not in skip and getattr(one, field.name) != getattr(other, field.name):
                yield one.name, field.name


@pytest.mark.parametrize("case", GPT_CASES)
def test_captured_equals_built(case: str) -> None:
    """Names, kinds, blocks, splits, shapes, FLOPs, bytes, parameters, kept tensors and edges."""
    captured, built = capture_spec(*GPT_CASES[case]), build_spec(*GPT_CASES[case])
    assert [op.name for op in captured.ops] == [op.name for op in built.ops]
    assert list(differences(captured, built)) == []
    assert set(captured.edges) == set(built.edges)
    assert dataclasses.replace(captured, edges=()) == dataclasses.replace(built, edges=())


def test_llama_agrees_but_for_kernels_that_the_cpu_lacks() -> None:
    """RMSNorm and rotary positions take several kernels on a CPU: more traffic and more kept, all else is equal."""
    for fused in (False, True):
        spec = dataclasses.replace(LLAMA, fused_qkv=fused)
        captured, built = capture_spec(spec, 3, 32), build_spec(spec, 3, 32)
        assert set(captured.edges) == set(built.edges)
        split_up = {op.name for op in built.ops if op.kind is OpKind.NORMALIZATION or op.name.endswith("rotary")}
        before_norms = {source for source, target in built.edges if target in split_up}
        for name, field in differences(captured, built):
            allowed = {"saved", "forward_bytes", "backward_bytes"} if name in split_up else set()
            assert field in allowed | ({"backward_bytes"} if name in before_norms else set()), (name, field)
        by_name = {op.name: op for op in built.ops}
        for op in captured.ops:
            assert op.saved_bytes >= by_name[op.name].saved_bytes
            assert op.forward_bytes >= by_name[op.name].forward_bytes
        assert captured.model_flops() == built.model_flops()
        assert captured.num_parameters == built.num_parameters


def test_half_precision_agrees_but_for_statistics() -> None:
    """On a CPU statistics and the loss have the type of the activations; on a GPU, and in the numbers, fp32."""
    with torch.device("meta"):
        module = transformer.build(SMALL).to(torch.bfloat16)
        tokens = torch.empty(3, 16, dtype=torch.long)
    captured = capture(module, (tokens,), loss_fn=transformer.language_model_loss, targets=tokens, name="small")
    built = build_graph(SMALL, seq_len=16, batch_size=3, precision=Precision.BF16)
    assert (captured.itemsize, set(captured.edges)) == (2, set(built.edges))
    kinds = {op.name: op.kind for op in built.ops}
    assert {(kinds[name], field) for name, field in differences(captured, built)} <= {
        (OpKind.NORMALIZATION, "saved"), (OpKind.LOSS, "saved"), (OpKind.LOSS, "output_bytes"),
    }  # fmt: skip
    for one, other in zip(captured.ops, built.ops, strict=True):
        assert 0 <= other.saved_bytes - one.saved_bytes <= 4 * 3 * 16


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"ffn_size": 64}, {"mlp.up", "mlp.act", "mlp.down"}),
        ({"causal": False}, {"attention.sdpa"}),
        ({"num_heads": 2, "num_kv_heads": 2, "head_size": 12}, {"attention.sdpa"}),
    ],
)
def test_a_changed_number_is_found(change: dict[str, int], found: set[str]) -> None:
    captured, built = capture_spec(SMALL, 2, 16), build_spec(dataclasses.replace(SMALL, **change), 2, 16)
    different = {name.partition(".")[2].partition(".")[2] for name, _ in differences(captured, built)}
    assert different == found


@pytest.mark.parametrize(
    "spec", [SMALL, dataclasses.replace(SMALL, fused_qkv=True, tied_embeddings=True), LLAMA], ids=lambda spec: spec.name
)
def test_kept_bytes_are_those_of_a_real_run(spec: ModelSpec) -> None:
    module = transformer.build(spec)
    tokens = torch.randint(spec.vocab_size, (3, 32))
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = transformer.language_model_loss(module(tokens), tokens.clone())
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    assert loss.requires_grad
    captured = capture(module, (tokens,), loss_fn=transformer.language_model_loss, targets=tokens.clone())
    assert sum(op.saved_bytes for op in captured.ops) == measured
    if spec.norm is Norm.LAYERNORM:
        assert sum(op.saved_bytes for op in build_spec(spec, 3, 32).ops) == measured


@pytest.mark.parametrize("spec", [SMALL, LLAMA], ids=lambda spec: spec.name)
def test_flops_are_those_that_a_real_run_counts(spec: ModelSpec) -> None:
    """torch counts no fused attention on a CPU, so that is compared unfused, in forward."""
    module = transformer.build(spec)
    tokens = torch.randint(spec.vocab_size, (2, 32))
    graph = capture(module, (tokens,), loss_fn=transformer.language_model_loss, targets=tokens)
    with FlopCounterMode(display=False) as counter:
        loss = transformer.language_model_loss(module(tokens), tokens)
    counts = counter.get_flop_counts()
    with FlopCounterMode(display=False) as backward_counter:
        loss.backward()
    products = [op for op in graph.ops if op.kind is OpKind.MATMUL]
    assert len(products) == spec.num_layers * (7 if spec.gated_mlp else 6) + 1
    for op in products:
        assert sum(counts[f"Transformer.{op.name}"].values()) == op.forward_flops
    assert backward_counter.get_total_flops() == sum(op.backward_flops for op in products)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(tokens)
    assert counter.get_total_flops() == graph.model_flops()[0]


class _GradientSums(TorchDispatchMode):
    """Bytes moved by additions of a tensor's size."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.num_bytes = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and tuple(args[0].shape) == self.shape:
            self.num_bytes += 3 * args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def test_sums_of_gradients_are_those_of_a_real_run() -> None:
    """Gradients that several users send are added; counted in a real backward, where nothing else adds."""
    module = transformer.build(SMALL)
    tokens = torch.randint(SMALL.vocab_size, (2, 16))
    loss = transformer.language_model_loss(module(tokens), tokens)
    with _GradientSums((2, 16, SMALL.hidden_size)) as counted:
        loss.backward()
    graph = capture(module, (tokens,), loss_fn=transformer.language_model_loss, targets=tokens)
    size = 2 * 16 * SMALL.hidden_size * 4
    booked = sum(op.backward_bytes for op in graph.ops if op.kind is OpKind.ELEMENTWISE)
    booked -= size + 16 * SMALL.hidden_size * 4  # the position's gradient, summed over the batch
    norms = [op for op in graph.ops if op.kind is OpKind.NORMALIZATION]
    booked += sum(op.backward_bytes for op in norms) - len(norms) * 3 * size
    assert counted.num_bytes == booked == 4 * SMALL.num_layers * 3 * size


def test_a_model_larger_than_memory() -> None:
    """Nothing is allocated: one block of 405 billion weights' width, 28 GB of weights in fp32."""
    spec = dataclasses.replace(load_preset("llama3.1-405b"), num_layers=1)
    graph = capture_spec(spec, 1, 4096)
    assert graph.num_parameters == build_spec(spec, 1, 4096).num_parameters > 7e9


def test_without_a_plan_products_are_whole() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformer.build(SMALL)

        def forward(self, tokens: Tensor) -> Tensor:
            result: Tensor = self.model(tokens)
            return result

    tokens = torch.zeros(2, 16, dtype=torch.long)
    arguments = {"loss_fn": transformer.language_model_loss, "targets": tokens}
    whole = capture(Wrapper(), (tokens,), **arguments)
    assert whole.num_blocks == SMALL.num_layers
    assert {op.split for op in whole.ops} == {Split.NONE, Split.TOKENS}
    assert {p.split for op in whole.ops for p in op.parameters} == {Split.NONE}
    plan = {f"model.{pattern}": style for pattern, style in transformer.build(SMALL).tensor_parallel_plan.items()}
    planned = capture(Wrapper(), (tokens,), tensor_parallel_plan=plan, **arguments)
    assert [op.split for op in planned.ops] == [op.split for op in build_spec(SMALL, 2, 16).ops]
