"""Operations of a training step, one by one, on one rank: products, attention, memory-bound ones, the optimizer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.runtime.profile.stopwatch import Clock, Timing, count_sets, time_operation
from costmodels.profiles import ComputePoint, stream_bytes
from costmodels.speed import scaled_points

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Dims = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is measured.

    Attributes:
        matmuls: (m, n, k). attentions: (batch, heads, seq, head_size). streams: (tokens, width). losses: (tokens,
            vocab). embeddings: (tokens, width, vocab). optimizers: parameters.
        copy_bytes: size of the copy that gives the memory bandwidth.
        budget_s: seconds per measurement.
    """

    matmuls: tuple[tuple[int, int, int], ...]
    attentions: tuple[tuple[int, int, int, int], ...]
    streams: tuple[tuple[int, int], ...]
    losses: tuple[tuple[int, int], ...]
    embeddings: tuple[tuple[int, int, int], ...]
    optimizers: tuple[int, ...]
    copy_bytes: int
    budget_s: float
    tiny: tuple[int, int] = field(default=(8, 64))


def make_grid(device: str, quick: bool) -> Grid:
    """Sizes for a device: of a small model on a CPU core, of a large one on a GPU; a third of them when quick."""
    scale, most_flops = (1, 4.3e9) if device == "cpu" else (4, 2.2e12)
    rows = (64, 1024) if quick else (64, 256, 1024, 4096)
    pairs = [(64, 64), (256, 256), (1024, 256), (256, 1024), (512, 512), (1024, 1024)]
    if not quick:
        pairs += [(64, 1024), (1024, 64), (128, 512), (512, 2048), (2048, 512), (2048, 2048)]
    matmuls = [(m * scale, n * scale, k * scale) for m in rows for n, k in pairs]
    attentions = [(8, 4, 128, 64), (2, 8, 512, 64), (2, 8, 256, 32)]
    streams = [(256, 256), (1024, 512), (4096, 512)]
    if not quick:
        attentions += [(batch, 4, seq, size) for batch, seq in ((16, 64), (8, 128), (4, 256), (2, 512), (1, 1024))
                       for size in (32, 64, 128)]  # fmt: skip
        streams += [(512, 384), (1024, 256), (1024, 1024), (2048, 1024), (4096, 1024), (4096, 1536)]
    losses = [(1024, 256), (4096, 256), (1024, 8192)]
    embeddings = [(1024, 256, 256), (4096, 512, 256), (1024, 512, 8192)]
    optimizers = (1_000_000, 4_000_000) if quick else (300_000, 1_000_000, 4_000_000, 12_000_000)
    return Grid(
        matmuls=tuple(shape for shape in matmuls if 2.0 * shape[0] * shape[1] * shape[2] <= most_flops),
        attentions=tuple((b, h * scale, s * scale, d) for b, h, s, d in attentions),
        streams=tuple((t * scale, w * scale) for t, w in streams),
        losses=tuple((t * scale, v * scale) for t, v in losses),
        embeddings=tuple((t * scale, w * scale, v * scale) for t, w, v in embeddings),
        optimizers=tuple(parameters * scale**2 for parameters in optimizers),
        copy_bytes=(64 if device == "cpu" else 512) * 2**20,
        budget_s=0.06 if quick else 0.15,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Paced:
    """Points of one operation, and seconds of the yardstick around them; 0 where nobody measured it."""

    points: tuple[ComputePoint, ...]
    pace: float


def measure_compute(
    clock: Clock, precision: str, grid: Grid, pace: Callable[[], float] | None = None
) -> Iterator[tuple[str, tuple[Paced, ...]]]:
    """Measure every operation of the grid. Yields (part, its points), so that a caller can report progress.

    Args:
        pace: seconds of the yardstick now, asked before and after every operation.
    """
    meter = _Meter(clock=clock, dtype=DTYPES[precision], budget_s=grid.budget_s)
    streams = (grid.tiny, *grid.streams)
    parts: dict[str, list[Callable[[], tuple[ComputePoint, ...]]]] = {
        "matmul": [partial(meter.matmul, *shape) for shape in grid.matmuls],
        "attention": [partial(meter.attention, *shape) for shape in grid.attentions],
        **{
            kind: [partial(meter.stream, kind, *shape) for shape in streams]
            for kind in ("normalization", "activation", "elementwise")
        },
        "embedding": [partial(meter.embedding, *shape) for shape in grid.embeddings],
        "loss": [partial(meter.loss, *shape) for shape in grid.losses],
        "optimizer": [partial(meter.optimizer, parameters) for parameters in grid.optimizers],
    }
    before = pace() if pace else 0.0
    for part, operations in parts.items():
        found = []
        for measure in operations:
            points = measure()
            after = pace() if pace else 0.0
            found.append(Paced(points=points, pace=(before + after) / 2))
            before = after
        yield part, tuple(found)


def at_one_speed(found: Sequence[Paced]) -> tuple[tuple[ComputePoint, ...], float]:
    """All points as if the machine had kept its median speed, and the yardstick's seconds at that."""
    reference = statistics.median(paced.pace for paced in found)
    if not reference:
        return tuple(point for paced in found for point in paced.points), 0.0
    return tuple(p for paced in found for p in scaled_points(paced.points, reference / paced.pace)), reference


def measure_bandwidth(clock: Clock, grid: Grid) -> float:
    """Bytes/s, read and written, of a copy much larger than the caches."""
    sets = [(_empty(grid.copy_bytes // 4, clock), _empty(grid.copy_bytes // 4, clock)) for _ in range(2)]
    marks = [clock.time(partial(a.copy_, b))[1] for _ in range(5) for a, b in sets]
    return 2 * grid.copy_bytes / min(clock.read(marks)[2:])


def _empty(elements: int, clock: Clock) -> Tensor:
    return torch.zeros(elements, device=clock.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Meter:
    clock: Clock
    dtype: torch.dtype
    budget_s: float

    def matmul(self, m: int, n: int, k: int) -> tuple[ComputePoint, ...]:
        """A linear layer with bias, as models call it; its backward makes dX, dW and the bias gradient."""
        return self._points(
            "matmul", {"m": m, "n": n, "k": k},
            lambda: (self._tensor(m, k), self._tensor(n, k), self._tensor(n)), F.linear,
            flops=2.0 * m * n * k, backward_flops=4.0 * m * n * k, elements=m * k + n * k + m * n,
        )  # fmt: skip

    def attention(self, batch: int, heads: int, seq: int, head_size: int) -> tuple[ComputePoint, ...]:
        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.view(batch, seq, heads, head_size).transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        width = heads * head_size
        flops = 2.0 * batch * heads * seq * seq * head_size
        return self._points(
            "attention", {"batch": batch, "heads": heads, "seq": seq, "head_size": head_size},
            lambda: tuple(self._tensor(batch, seq, width) for _ in range(3)), forward,
            flops=flops, backward_flops=2.5 * flops, elements=4 * batch * seq * width,
        )  # fmt: skip

    def stream(self, kind: str, tokens: int, width: int) -> tuple[ComputePoint, ...]:
        """A normalization (LayerNorm with weight and bias), an activation (GELU) or an addition."""
        dims = {"tokens": tokens, "width": width}
        size = tokens * width
        if kind == "normalization":

            def make() -> tuple[Tensor, ...]:
                return self._tensor(tokens, width), self._tensor(width), self._tensor(width)

            return self._points(kind, dims, make, lambda x, w, b: F.layer_norm(x, (width,), w, b), elements=2 * size)
        if kind == "activation":
            return self._points(kind, dims, lambda: (self._tensor(tokens, width),), F.gelu, elements=2 * size)
        return self._points(
            kind, dims, lambda: (self._tensor(tokens, width), self._tensor(tokens, width)), torch.add,
            elements=3 * size, backward=False,
        )  # fmt: skip

    def embedding(self, tokens: int, width: int, vocab: int) -> tuple[ComputePoint, ...]:
        def make() -> tuple[Tensor, ...]:
            return torch.randint(vocab, (tokens,), device=self.clock.device), self._tensor(vocab, width)

        dims = {"tokens": tokens, "width": width, "vocab": vocab}
        return self._points("embedding", dims, make, F.embedding, elements=2 * tokens * width + vocab * width)

    def loss(self, tokens: int, vocab: int) -> tuple[ComputePoint, ...]:
        def make() -> tuple[Tensor, ...]:
            return self._tensor(tokens, vocab), torch.randint(vocab, (tokens,), device=self.clock.device)

        return self._points(
            "loss", {"tokens": tokens, "vocab": vocab}, make, F.cross_entropy, elements=2 * tokens * vocab
        )

    def optimizer(self, parameters: int) -> tuple[ComputePoint, ...]:
        """AdamW (fused), over parameters in tensors of different sizes."""
        shares = (0.5, 0.25, 0.125, 0.0625, 0.0625)
        weights = [torch.nn.Parameter(self._tensor(int(parameters * share)).detach()) for share in shares]
        for weight in weights:
            weight.grad = torch.rand_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        timing, _ = time_operation(
            self.clock, tuple, lambda: optimizer.step(), num_sets=2, budget_s=self.budget_s, backward=False
        )
        dims = {"parameters": sum(weight.numel() for weight in weights)}
        return (self._point("optimizer", "forward", dims, 0.0, timing),)

    def _tensor(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.clock.device).to(self.dtype).requires_grad_()

    def _point(self, kind: str, phase: str, dims: Dims, flops: float, timing: Timing) -> ComputePoint:
        return ComputePoint(
            kind=kind, phase=phase, dims=dims, flops=flops,
            num_bytes=0.0 if flops else stream_bytes(kind, phase, dims, self.dtype.itemsize),
            seconds=timing.seconds, spread=timing.spread,
        )  # fmt: skip

    def _points(
        self,
        kind: str,
        dims: Dims,
        make: Callable[[], tuple[Tensor, ...]],
        forward: Callable[..., Tensor],
        *,
        elements: int,
        flops: float = 0.0,
        backward_flops: float = 0.0,
        backward: bool = True,
    ) -> tuple[ComputePoint, ...]:
        sets = count_sets(elements * self.dtype.itemsize)
        ahead, back = time_operation(
            self.clock, make, forward, num_sets=sets, budget_s=self.budget_s, backward=backward
        )
        points = (self._point(kind, "forward", dims, flops, ahead),)
        return points if back is None else (*points, self._point(kind, "backward", dims, backward_flops, back))
