"""The module that a source names (see ``autopar.runtime.sources``), and what it learns."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn

from autopar.errors import InputError
from autopar.model.spec import ModelSpec
from autopar.model.transformer import build
from autopar.runtime.models.huggingface import build_from_config
from autopar.runtime.models.objective import MaskedTokens, NextToken, Objective
from autopar.runtime.sources import config_path


def build_module(spec: ModelSpec, source: str, seed: int) -> nn.Module:
    """Build a module in fp32 with initial weights that depend on ``seed`` alone, equal on all ranks.

    A function of a user's own is called with the spec, after torch's generator has been set.

    Raises:
        InputError: the source names nothing that can be built.
    """
    if not source:
        return build(spec, seed)
    path = config_path(source)
    if path is not None:
        return build_from_config(path, seed)
    make = _function(source)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = make(spec)
    if not isinstance(module, nn.Module):
        raise InputError(f"{source}(spec) returned {type(module).__name__}; it must return an nn.Module")
    return module


def _function(source: str) -> Callable[[ModelSpec], object]:
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"source '{source}': {error}") from error
    if not callable(found):
        raise InputError(f"source '{source}': the module has no function '{name}'")
    function: Callable[[ModelSpec], object] = found
    return function


def objective_of(spec: ModelSpec, *, seq_len: int, seed: int = 0) -> Objective:
    """What a model of these numbers learns: the next token if it is causal, masked tokens if it is an encoder."""
    if spec.causal:
        return NextToken()
    return MaskedTokens(seq_len=seq_len, vocab_size=spec.vocab_size, seed=seed)
