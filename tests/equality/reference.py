"""The same training in one process, with nothing of the executor: the numbers that every layout must give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from cases import BATCH, CLIP, MODELS, MOMENTUM, RATE, SEQ, STEPS
from safetensors.torch import save_file
from torch import Tensor

from autopar.model.transformer import build, language_model_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Loss and gradient norm of each step; the weights at the end lie in a file."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: Path


def batch(model: str, step: int) -> Tensor:
    """Tokens of a step: int64 [BATCH, SEQ + 1]. A few repeat often, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    vocabulary = MODELS[model].vocab_size
    return (torch.rand(BATCH, SEQ + 1, generator=generator) ** 2 * vocabulary).long()


def train(model: str, folder: Path, *, scale: float = 1.0, seed: int = 0) -> Reference:
    """Plain training on one process; ``scale`` multiplies gradients, for controls that must be noticed."""
    module, losses, norms = build(MODELS[model], seed), [], []
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    for step in range(STEPS):
        tokens = batch(model, step)
        loss = language_model_loss(module(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad *= scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    path = folder / f"{model}-{scale:g}-{seed}.safetensors"
    named = dict(module.named_parameters())
    save_file({name: parameter.detach().contiguous() for name, parameter in named.items()}, path)
    return Reference(losses=tuple(losses), norms=tuple(norms), weights=path)
