"""A mixture of experts as an ``nn.Module``: a router, routed experts as stacked weights, and a shared expert.

Names are those of the analytic graph (``autopar.model.layers.moe``). Each token goes to its ``top_k`` best experts of a
softmax over all; their weights are normalised to one (GShard, Lepikhin et al. 2020), but for top_k = 1, where the
router would have no gradient then: there the weight is the probability itself (Switch Transformer, Fedus et al. 2021).
Without a capacity no token is dropped. With one, an expert takes ceil(S k / E * capacity_factor) rows of each sequence
in the order of its tokens, and those over it are dropped: the residual stream passes them on. GShard and Switch count
over a device's tokens; here it is a sequence, so that the result does not depend on how the batch is divided.

Letters: B sequences, S tokens each, T = B S, h hidden_size, f expert_ffn_size, E experts, k top_k, R rows (choices that
are not dropped; T k without a capacity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.errors import InputError
from autopar.model.feed_forward import FeedForward, GatedSilu
from autopar.model.spec import ModelSpec

Experts = Callable[[Tensor, Sequence[int]], Tensor]
"""From rows [R, h], those of the first expert first, and the number of each expert's rows to results [R, h]."""
Exchange = Callable[[Experts, Tensor, Tensor], Tensor]
"""Brings rows [R, h] in the order of experts, counts [E] of them, to experts, and their results back in that order."""


class TokenOrder(Protocol):
    """Where a rank's tokens are in their sequences, for counting in the order of the tokens.

    Attributes:
        num_ranks: ranks that divide a sequence evenly.
        runs: equal parts of a rank's tokens that are each contiguous in the sequence.
    """

    @property
    def num_ranks(self) -> int: ...

    @property
    def runs(self) -> int: ...

    def counted_before(self, counts: Tensor) -> Tensor:
        """From the rows of each of this rank's runs, [B, runs, E], to those of all tokens before each run."""
        ...


class WholeSequence:
    """A rank that has all tokens of its sequences."""

    num_ranks = 1
    runs = 1

    def counted_before(self, counts: Tensor) -> Tensor:
        """Nothing is before the only run."""
        return torch.zeros_like(counts)


def at_home(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """The exchange of a single process, which holds all experts."""
    return experts(rows, counts.tolist())


class Router(nn.Linear):
    """Scores of all experts, and the best of each token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.hidden_size, spec.num_experts, bias=spec.bias)
        self.top_k = spec.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Tokens [T, h] to the weights (fp32) and indices (int64) of their experts, both [T, k], best first."""
        probabilities = super().forward(x).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen


class ExpertProduct(nn.Module):
    """A linear layer for each expert.

    Attributes:
        weight: [E, *features, inputs]; under expert parallelism a DTensor.
        bias: [E, *features], or None.
        shares: ranks that each hold a part of the inputs and whose results are added up.
    """

    def __init__(self, num_experts: int, features: Sequence[int], inputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, *features, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, *features)) if bias else None
        self.shares = 1

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows [R, inputs] of this rank's experts, ``sizes`` of each, to [R, features]."""
        weights = _local(self.weight).flatten(1, -2).unbind(0)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if self.bias is not None:
            bias = _local(self.bias).flatten(1)
            if self.shares > 1:
                # An equal part of it on each rank, and the whole gradient, as all of them see all rows.
                bias = bias + bias.detach() * (1 / self.shares - 1)
            biases = bias.unbind(0)
        return torch.cat([F.linear(*each) for each in zip(torch.split(x, list(sizes)), weights, biases, strict=True)])


class MixtureOfExperts(nn.Module):
    """The feed-forward part of a block: routed experts, and one that every token passes if the spec has it.

    Attributes:
        exchange: how rows come to the ranks that hold their experts.
        order: where this rank's tokens are in their sequences.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor = spec.num_experts, spec.top_k, spec.capacity_factor
        self.gated = spec.gated_mlp
        h, f = spec.hidden_size, spec.expert_ffn_size
        self.shared = FeedForward(spec, spec.shared_ffn_size) if spec.shared_ffn_size else None
        self.router = Router(spec)
        self.up = ExpertProduct(spec.num_experts, (2 if spec.gated_mlp else 1, f), h, bias=spec.bias)
        self.act: nn.Module = GatedSilu() if spec.gated_mlp else nn.GELU()
        self.down = ExpertProduct(spec.num_experts, (h,), f, bias=spec.bias)
        self.exchange: Exchange = at_home
        self.order: TokenOrder = WholeSequence()

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] to [B, S, h]."""
        if x.is_meta:
            return torch.empty_like(x)
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens)
        destinations = self._destinations(chosen.view(x.shape[0], -1)).flatten()
        counts = _counts(destinations.unsqueeze(0), self.num_experts + 1)[0, :-1]
        order = destinations.argsort(stable=True)
        if self.capacity_factor:
            order = order[: int(counts.sum())]
        rows = tokens.index_select(0, order // self.top_k)
        results = self.exchange(self.experts, rows, counts)
        by_choice = tokens.new_zeros(destinations.shape[0], x.shape[-1]).index_put((order,), results)
        weighted = by_choice.view(*chosen.shape, -1) * weights.to(x.dtype).unsqueeze(-1)
        combined: Tensor = weighted.sum(1).view_as(x)
        if self.shared is not None:
            combined = combined + self.shared(x)
        return combined

    def experts(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The experts of this rank: rows [R, h], ``sizes`` of each, to their results."""
        inner = self.up(rows, sizes)
        activated = self.act(*inner.chunk(2, dim=-1)) if self.gated else self.act(inner)
        result: Tensor = self.down(activated, sizes)
        return result

    def _destinations(self, chosen: Tensor) -> Tensor:
        """Experts of the choices [B, S k] of each sequence, E for those that are dropped."""
        if not self.capacity_factor:
            return chosen
        if chosen.shape[1] // self.top_k % self.order.runs:
            raise InputError(
                f"a capacity counts a rank's {chosen.shape[1] // self.top_k} tokens of a sequence in {self.order.runs} "
                "equal runs: use sequences that 2 * cp * tp divides"
            )
        capacity = math.ceil(chosen.shape[1] * self.order.num_ranks / self.num_experts * self.capacity_factor)
        runs = chosen.reshape(chosen.shape[0] * self.order.runs, -1)
        counts = _counts(runs, self.num_experts)
        before = self.order.counted_before(counts.view(-1, self.order.runs, self.num_experts)).flatten(0, 1)
        places = _places(runs, counts) + before.gather(1, runs)
        return runs.masked_fill(places >= capacity, self.num_experts)


def _counts(values: Tensor, kinds: int) -> Tensor:
    """How often each of ``kinds`` values is in each row: [B, N] to [B, kinds]."""
    return values.new_zeros(values.shape[0], kinds).scatter_add_(1, values, torch.ones_like(values))


def _places(values: Tensor, counts: Tensor) -> Tensor:
    """How many equal values are before each in its row: [B, N], given ``_counts``."""
    order = values.argsort(dim=1, stable=True)
    starts = (counts.cumsum(1) - counts).gather(1, values.gather(1, order))
    places = torch.arange(values.shape[1], device=values.device) - starts
    return torch.empty_like(values).scatter_(1, order, places)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local
