"""Capture of other models: convolutions, recurrence, plain products, attention of torch.nn, shared weights, errors."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autopar
from autopar.errors import InputError
from autopar.graph import MatmulShape, OpGraph, OpKind, Split
from autopar.model.capture import capture


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        result: Tensor = self.relu(y)
        return result


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers = nn.Sequential(Residual(8), Residual(8), Residual(8))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.flatten(self.average(self.layers(self.pool(self.stem(x)))), 1))
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return result


class Unfused(nn.Module):
    """Attention as two products and a softmax, with a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.forgotten = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.softmax(x @ x.transpose(1, 2), dim=-1) @ self.project(x)
        return mixed * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.twice(self.twice(self.embedding(tokens))))
        return result


def operation(graph: OpGraph, name: str) -> autopar.graph.Op:
    return next(op for op in graph.ops if op.name == name)


def real_flops(module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss(module(inputs)).backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def test_convolutional_network() -> None:
    module, images = ConvNet(), torch.randn(4, 3, 32, 32)
    targets = torch.zeros(4, dtype=torch.long)
    graph = capture(module, (images,), loss_fn=F.cross_entropy, targets=targets)
    assert sum(graph.model_flops()) == real_flops(module, images, lambda y: F.cross_entropy(y, targets))
    assert graph.num_parameters == sum(p.numel() for p in module.parameters())
    assert (graph.num_blocks, graph.batch_size, graph.seq_len) == (3, 4, 1)
    names = ["conv1", "norm1", "relu", "conv2", "norm2", "add", "relu_1"]
    for block in range(3):
        assert [op.name for op in graph.block_ops(block)] == [f"layers.{block}.{name}" for name in names]
    assert [op.name for op in graph.block_ops(-1)] == ["stem", "pool"]
    assert [op.name for op in graph.block_ops(3)] == ["average", "head", "loss"]
    # The product that im2col makes: output positions, output channels, inputs of one of them (grouped: of its group).
    assert operation(graph, "stem").shape == MatmulShape(m=4 * 16 * 16, n=8, k=3 * 7 * 7)
    assert operation(graph, "layers.0.conv1").shape == MatmulShape(m=4 * 8 * 8, n=8, k=8 * 9)
    assert operation(graph, "layers.0.conv2").shape == MatmulShape(m=4 * 8 * 8, n=8, k=4 * 9)
    # No gradient of the images: the stem's backward is one product, not two.
    assert operation(graph, "stem").backward_flops == operation(graph, "stem").forward_flops
    size = 4 * 8 * 8 * 8 * 4
    norm = operation(graph, "layers.0.norm1")
    assert (norm.kind, norm.forward_bytes, norm.backward_bytes) == (OpKind.NORMALIZATION, 2 * size, 3 * size)
    assert operation(graph, "layers.0.add").forward_bytes == 3 * size
    # The residual's input has two users, so its gradient is one sum of three passes.
    relu = operation(graph, "layers.0.relu_1")
    assert (relu.kind, relu.backward_bytes) == (OpKind.ACTIVATION, 3 * size + 3 * size)
    assert ("layers.0.relu_1", "layers.1.add") in graph.edges
    # An activation in place keeps its result, which the next product shares.
    assert [kept.num_bytes for kept in operation(graph, "layers.0.relu").saved] == [size]
    assert operation(graph, "layers.0.conv2").saved == ()


def test_recurrent_network() -> None:
    module, tokens = Recurrent(), torch.zeros(3, 5, dtype=torch.long)
    graph = capture(module, (tokens,), loss_fn=lambda y: y.square().mean())
    assert [op.name for op in graph.ops] == ["embedding", "lstm", "head", "loss"]
    lstm = operation(graph, "lstm")
    products = 2 * 3 * 5 * (4 * 32 * 16 + 3 * 4 * 32 * 32)
    assert (lstm.kind, lstm.forward_flops, lstm.backward_flops) == (OpKind.MATMUL, products, 2 * products)
    assert lstm.num_parameters == sum(p.numel() for p in module.lstm.parameters())
    assert lstm.output_bytes == 3 * 5 * 32 * 4
    gates_and_states = 2 * 3 * 5 * (4 + 2) * 32 * 4
    assert lstm.saved_bytes > gates_and_states
    assert (graph.num_blocks, graph.seq_len) == (1, 5)


def test_the_children_of_a_sequential_are_blocks() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    graph = capture(module, (torch.randn(5, 3, 4),), loss_fn=F.mse_loss, targets=torch.randn(5, 4))
    assert [(op.name, op.block) for op in graph.ops] == [("0", 0), ("1", 1), ("2", 2), ("3", 3), ("loss", 4)]
    flatten = operation(graph, "0")
    assert (flatten.forward_bytes, flatten.saved, flatten.parameters) == (0, (), ())
    assert graph.model_flops() == (2 * 5 * (12 * 32 + 32 * 4), 2 * 5 * 12 * 32 + 4 * 5 * 32 * 4)
    assert set(graph.edges) == {("1", "2"), ("2", "3"), ("3", "loss")}
    planned = capture(
        module, (torch.randn(5, 3, 4),), tensor_parallel_plan={"1": "colwise", "3": "rowwise"}, loss_fn=torch.sum
    )
    assert [op.split for op in planned.ops[1:4]] == [Split.COLUMN, Split.FEATURES, Split.ROW]
    assert [kept.split for op in planned.ops[:4] for kept in op.saved] == [Split.GATHERED, Split.FEATURES]


def test_functions_outside_leaves_are_operations() -> None:
    module, x = Unfused(), torch.randn(2, 5, 16)
    graph = capture(module, (x,), loss_fn=torch.mean)
    assert [op.name for op in graph.ops] == ["bmm", "softmax", "project", "bmm_1", "mul", "loss"]
    assert operation(graph, "bmm").shape == MatmulShape(m=2 * 5, n=5, k=16)
    assert operation(graph, "softmax").forward_bytes == 2 * (2 * 5 * 5 * 4)
    assert sum(graph.model_flops()) == real_flops(module, x, torch.mean)
    assert ("softmax", "bmm_1") in graph.edges
    assert ("project", "bmm_1") in graph.edges
    assert [p.name for p in operation(graph, "mul").parameters] == ["scale"]
    assert graph.num_parameters == 16 * 16 + 16 + 16 + 3


def test_encoder_layers_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    module, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 6, 16)
    graph = capture(module, (x,), loss_fn=torch.mean)
    assert graph.num_blocks == 3
    assert graph.num_parameters == sum(p.numel() for p in module.parameters())
    attention = operation(graph, "layers.1.self_attn.sdpa")
    assert (attention.kind, attention.forward_flops) == (OpKind.ATTENTION, 4 * 2 * 6 * 6 * 16)
    assert attention.backward_flops == 5 * attention.forward_flops // 2
    assert nx.is_weakly_connected(graph.digraph())


def test_shared_weights_are_owned_once() -> None:
    module, tokens = Tied(), torch.zeros(2, 3, dtype=torch.long)
    graph = capture(module, (tokens,), loss_fn=torch.mean)
    assert [op.name for op in graph.ops] == ["embedding", "twice", "twice_1", "head", "loss"]
    assert operation(graph, "head").parameters[0].name == "head.weight"
    assert operation(graph, "head").parameters[0].shared_with == "embedding.weight"
    assert {p.shared_with for p in operation(graph, "twice_1").parameters} == {"twice.weight", "twice.bias"}
    assert graph.num_parameters == sum(p.numel() for p in module.parameters())
    # The embedding's gradient is the sum of two, besides filling and adding its rows.
    assert operation(graph, "embedding").backward_bytes == 2 * (2 * 3 * 8 * 4) + 4 * (20 * 8 * 4)


def test_the_module_is_left_as_it_was() -> None:
    module = ConvNet().train()
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    autopar.capture(module, (torch.randn(2, 3, 32, 32),), loss_fn=torch.sum)
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, values)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(child.training for child in module.modules())
    assert module(torch.randn(2, 3, 32, 32)).device.type == "cpu"


def test_dropout_follows_the_mode_of_the_module() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    assert operation(capture(module, (x,), loss_fn=torch.sum), "1").forward_bytes > 0
    assert operation(capture(module.eval(), (x,), loss_fn=torch.sum), "1").forward_bytes == 0
    assert not module.training


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Gate())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


def test_a_branch_on_values_names_module_and_operation(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        InputError, match=r"module 'inner.1' \(Gate\) needs the values of a tensor .*local_scalar_dense"
    ):
        capture(Branching(), (torch.randn(2, 4),), loss_fn=torch.sum)
    with pytest.raises(InputError, match=r"module '1' \(Selecting\) needs the values of a tensor .*nonzero"):
        capture(nn.Sequential(nn.Linear(4, 4), Selecting()), (torch.randn(2, 4),), loss_fn=torch.sum)
    with pytest.raises(InputError, match=r"module '1' \(Linear\) failed at 'addmm': .*\[2, 5\] X \[4, 4\]"):
        capture(nn.Sequential(nn.Linear(5, 5), nn.Linear(4, 4)), (torch.randn(2, 5),), loss_fn=torch.sum)
    with pytest.raises(InputError, match="the loss failed at '.*': .*ZeroDivisionError"):
        capture(nn.Linear(4, 4), (torch.randn(2, 4),), loss_fn=lambda y: y / 0 * (1 // 0))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"0": "columns"}, r"'0' is 'columns'; did you mean 'colwise'\?"),
        ({"7": "colwise"}, "'7': no module has that path; known: 0, 2"),
        ({"1": "rowwise"}, "'1': '1' is no matrix product"),
    ],
)
def test_plans_that_do_not_fit(plan: dict[str, str], message: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    with pytest.raises(InputError, match=message):
        capture(module, (torch.randn(2, 4),), tensor_parallel_plan=plan)


def test_inputs_that_are_no_tuple() -> None:
    with pytest.raises(InputError, match="inputs must be a tuple"):
        capture(nn.Linear(4, 4), torch.randn(2, 4))  # type: ignore[arg-type]
