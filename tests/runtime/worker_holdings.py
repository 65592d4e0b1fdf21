"""Started by test_holdings on four ranks: every element of a model knows where it was, and holdings must say so."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.launch.progress import report_progress, send_message
from autopar.runtime.launch.worker import joined
from autopar.runtime.parallel.holdings import Holding
from autopar.runtime.parallel.tensor_parallel import local_tensor

# 18, 22 and 27 leave a rest on 4 ranks, and some ranks get nothing of two positions.
UNEVEN = ModelSpec(
    name="uneven", num_layers=4, hidden_size=18, num_heads=2, num_kv_heads=2, ffn_size=22, vocab_size=27,
    max_seq_len=2, fused_qkv=False,
)  # fmt: skip
# Three experts of each of two ranks leave a rest on two more.
EXPERTS = dataclasses.replace(UNEVEN, name="experts", num_experts=6, top_k=2, expert_ffn_size=22)
FUSED = dataclasses.replace(
    UNEVEN, name="fused", hidden_size=20, num_heads=4, num_kv_heads=2, fused_qkv=True, vocab_size=28
)
TIED = dataclasses.replace(FUSED, name="tied", tied_embeddings=True)
MODELS = {model.name: model for model in (UNEVEN, EXPERTS, FUSED, TIED)}


def numbered(module: nn.Module) -> nn.Module:
    """Every parameter filled with 0, 1, 2, ..."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape))
    return module


def expected(holding: Holding, like: torch.Tensor) -> torch.Tensor:
    """The local tensor that the pieces of a holding describe; -1 where no piece is."""
    whole = torch.arange(math.prod(holding.shape), dtype=like.dtype).view(holding.shape)
    local = torch.full_like(like, -1)
    for piece in holding.pieces:
        there, here = (
            tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))
            for start in (piece.offset, piece.local)
        )
        local[here] = whole[there]
    return local


def check(slug: str, module: nn.Module) -> dict[str, object]:
    """What every rank holds under a plan is what it says, and the first ones hold everything once."""
    plan = parse_slug(slug)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    model = autopar.parallelize(
        module, plan, loss_fn=language_model_loss, num_microbatches=plan.layout.pp, device="cpu"
    )
    empty, several = 0, 0
    for (_, parameter), holding in zip(model.owned, model.holdings, strict=True):
        local = local_tensor(parameter.detach())
        assert torch.equal(local, expected(holding, local)), (slug, holding.name)
        assert holding.shape == shapes[holding.name], holding
        empty += not holding.pieces
        several += len(holding.pieces) > 1
    everyone: list[tuple[Holding, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, model.holdings)
    holdings = [holding for rank in everyone for holding in rank]
    firsts = [holding for holding in holdings if holding.first]
    sizes: Counter[str] = Counter()
    for holding in firsts:
        sizes[holding.name] += sum(math.prod(piece.shape) for piece in holding.pieces)
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    for piece, name in ((piece, holding.name) for holding in firsts for piece in holding.pieces):
        covered[name][tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))] += 1
    assert all(bool((count == 1).all()) for count in covered.values()), slug
    equal = Counter((holding.name, holding.pieces) for holding in holdings)
    assert all(holding.copies == equal[holding.name, holding.pieces] for holding in holdings), slug
    return {"slug": slug, "empty": empty, "several": several, "copies": sorted({h.copies for h in model.holdings})}


def main() -> None:
    """Check the plans that the job names."""
    plans = json.loads(Path(sys.argv[1]).read_text())["plans"]
    with report_progress() as progress, joined("cpu"):
        for model, slug in plans:
            progress.update(plan=slug)
            found = check(slug, numbered(build(MODELS[model])))
            everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            if dist.get_rank() == 0:
                send_message({"ranks": everyone})


if __name__ == "__main__":
    main()
