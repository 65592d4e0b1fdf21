"""Modules from Hugging Face configurations and a user's function, and what encoders learn: masked tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import InputError, PlanError
from autopar.model.huggingface import load_config
from autopar.model.spec import ModelSpec
from autopar.model.transformer import Transformer, build, language_model_loss
from autopar.plan import parse_slug
from autopar.runtime.launch.launcher import launch
from autopar.runtime.launch.nodes import Node
from autopar.runtime.models.module import build_module, objective_of
from autopar.runtime.models.objective import IGNORED, MaskedTokens, NextToken
from autopar.runtime.parallel.parts import boundaries, skeleton
from autopar.runtime.sources import unsupported_source
from autopar.runtime.support import unsupported

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")

LLAMA: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BERT: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32},
    "bert": {**BERT, "tie_word_embeddings": False},
}
PLANS = {
    "llama": ("dp2.z3.mb2.ac-full", "tp2.mb4", "pp2.mb2"),
    "qwen3": ("tp2.mb4", "pp2.mb2.ac-full"),
    "mixtral": ("dp2.mb2", "pp2.mb2", "tp2.mb4"),
    "gpt2": ("dp2.z2.mb2.ac-full",),
    "bert": ("dp2.z3.mb2", "tp2.mb4", "pp2.mb2.ac-full"),
}
ENCODER = ModelSpec(
    name="encoder", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=64, vocab_size=60,
    max_seq_len=32, fused_qkv=False, causal=False,
)  # fmt: skip
ENCODER_PLANS = ("dp2.mb2", "tp2.sp.mb4", "cp2.mb2", "pp2.mb2")
BATCH, SEQ = 8, 32


def config_file(folder: Path, kind: str, **changes: Any) -> Path:
    path = folder / kind / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": None, "eos_token_id": None} if kind != "bert" else {}
    path.write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **special, **changes}))
    return path


def text(start: int, count: int, length: int = SEQ) -> np.ndarray:
    """Samples that follow from their index alone, without the last token, which is the mask."""
    rows = [np.random.default_rng(index).integers(0, 59, length + 1) for index in range(start, start + count)]
    return np.stack(rows).astype(np.int64)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_chain_is_the_class(tmp_path: Path, kind: str) -> None:
    """Equal logits, names and gradients; shapes without values; the numbers of its ModelSpec."""
    path = config_file(tmp_path, kind)
    spec = load_config(path)
    chain = build_module(spec, str(path), seed=4)
    config = transformers.AutoConfig.for_model(**json.loads(path.read_text()))
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(4)
    whole = auto.from_config(config, dtype=torch.float32).eval()
    tokens = torch.from_numpy(text(0, 3))[:, :-1]
    found, expected = chain(tokens), whole(input_ids=tokens).logits
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert {name for name, _ in chain.named_parameters()} == set(gradients)
    for name, parameter in chain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda m, n=name: f"{n}: {m}")
    assert boundaries([skeleton(chain)], tokens)[-1].shape == (3, SEQ, spec.vocab_size)
    assert len(chain.pipeline_parts()[1]) == spec.num_layers
    other = build_module(spec, str(path), seed=5)
    assert not torch.equal(other(tokens), expected)


def test_dropout_of_a_configuration_is_off(tmp_path: Path) -> None:
    tokens = torch.from_numpy(text(0, 2))[:, :-1]
    for kind in ("gpt2", "bert"):
        path = config_file(tmp_path, kind)
        chain = build_module(load_config(path), str(path), seed=0).train()
        assert torch.equal(chain(tokens), chain(tokens)), "the classes' default is 0.1"


def test_a_causal_chain_sees_only_earlier_tokens(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2", "mixtral", "bert"):
        path = config_file(tmp_path, kind)
        chain = build_module(load_config(path), str(path), seed=0)
        tokens = torch.from_numpy(text(0, 2))[:, :-1]
        changed = tokens.clone()
        changed[:, 20:] = 7
        same = torch.allclose(chain(tokens)[:, :20], chain(changed)[:, :20], atol=1e-6)
        assert same == (kind != "bert"), kind


def small(spec: ModelSpec) -> nn.Module:
    return nn.Embedding(spec.vocab_size, spec.hidden_size)


def not_a_module(spec: ModelSpec) -> str:
    return spec.name


def test_a_function_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    left, right = (build_module(ENCODER, "test_model_sources:small", seed) for seed in (1, 1))
    assert torch.equal(left.weight, right.weight) and left.weight.shape == (60, 32)
    for source, message in (
        ("test_model_sources:absent", "has no function 'absent'"),
        ("no_such_package:f", "No module named"),
        ("test_model_sources:not_a_module", "returned str"),
    ):
        with pytest.raises(InputError, match=message):
            build_module(ENCODER, source, 0)
    assert isinstance(build_module(ENCODER, "", 0), Transformer)


@pytest.mark.parametrize(
    ("kind", "slug", "message"),
    [
        ("llama", "cp2.mb1", "cp=2: attention in transformers"),
        ("llama", "tp2.sp.mb1", "drop sp"),
        ("mixtral", "dp2.ep2.mb1", "experts in transformers stay on every rank"),
        ("gpt2", "tp2.mb1", "fused Conv1D"),
    ],
)
def test_what_a_class_cannot_do_is_refused(tmp_path: Path, kind: str, slug: str, message: str) -> None:
    path = config_file(tmp_path, kind)
    plan = parse_slug(slug)
    details = [found.detail for found in unsupported_source(plan, str(path))]
    assert len(details) == 1 and message in details[0]
    chain = build_module(load_config(path), str(path), seed=0)
    with pytest.raises(PlanError, match="cannot be run here"):
        autopar.parallelize(chain, plan, loss_fn=language_model_loss, num_microbatches=1, device="cpu")


def test_limits_of_the_own_module_are_not_those_of_a_class(tmp_path: Path) -> None:
    """Qwen3 normalises queries and keys, which the project's own module does not."""
    path = config_file(tmp_path, "qwen3")
    spec = load_config(path)
    assert unsupported(parse_slug("dp2.mb1"), spec) and not unsupported(parse_slug("dp2.mb1"), spec, source=str(path))
    assert [r.reason for r in unsupported(parse_slug("tp4.mb1"), spec, source=str(path))] == ["key-value heads"]


def test_configurations_that_are_refused(tmp_path: Path) -> None:
    path = config_file(tmp_path, "mistral", sliding_window=8)
    with pytest.raises(InputError, match="sliding_window=8 is shorter"):
        build_module(load_config(path), str(path), seed=0)
    path.write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(InputError, match="model_type 'bloom' cannot be run"):
        unsupported_source(parse_slug("mb1"), str(path))


def masked(seed: int = 0) -> MaskedTokens:
    return MaskedTokens(seq_len=SEQ, vocab_size=60, seed=seed)


def test_masked_tokens_follow_from_the_global_index() -> None:
    rows = masked().rows(text)
    assert np.array_equal(rows(0, 6)[4:], rows(4, 2)) and not np.array_equal(rows(0, 6), masked(1).rows(text)(0, 6))
    inputs, targets = masked().split(torch.from_numpy(rows(0, 2000)))
    original, chosen = torch.from_numpy(text(0, 2000))[:, :-1], targets != IGNORED
    assert (chosen.sum(1) == 5).all(), "15 percent of 32"
    assert torch.equal(targets[chosen], original[chosen]) and torch.equal(inputs[~chosen], original[~chosen])
    shown = inputs[chosen]
    assert (shown == 59).float().mean().item() == pytest.approx(0.8, abs=0.015)
    assert (shown == targets[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 59, abs=0.015)
    assert shown.min() >= 0 and shown.max() == 59
    assert chosen.float().mean(0).max() < 0.2, "every place alike"


def test_means_of_parts_are_the_mean_of_the_whole() -> None:
    """Parts of the batch, and of the sequences, which may have unequal numbers of chosen tokens."""
    objective = masked()
    _, targets = objective.split(torch.from_numpy(objective.rows(text)(0, BATCH)))
    logits = torch.randn(BATCH, SEQ, 60, generator=torch.Generator().manual_seed(1))
    whole = objective.loss(logits, targets)
    chosen = targets != IGNORED
    torch.testing.assert_close(whole, nn.functional.cross_entropy(logits[chosen], targets[chosen]))
    for dim in (0, 1):
        parts = [objective.loss(*part) for part in zip(logits.chunk(4, dim), targets.chunk(4, dim), strict=True)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
    usual = [nn.functional.cross_entropy(*(x.flatten(0, 1) for x in part)) for part in
             zip(logits.chunk(4, 1), targets.chunk(4, 1), strict=True)]  # fmt: skip
    assert not torch.allclose(torch.stack(usual).mean(), whole), "a mean over what each part has is another"


def test_what_is_learnt_follows_from_the_spec() -> None:
    causal = dataclasses.replace(ENCODER, causal=True)
    assert isinstance(objective_of(ENCODER, seq_len=SEQ), MaskedTokens)
    batch = torch.from_numpy(text(0, 2))
    inputs, targets = objective_of(causal, seq_len=SEQ).split(batch)
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and NextToken().rows(text) is text
    with pytest.raises(InputError, match="room for one more"):
        dataclasses.replace(masked(), vocab_size=40).rows(text)(0, 4)


def test_an_encoder_learns() -> None:
    objective, model, losses = masked(), build(ENCODER), []
    same: Tensor = torch.from_numpy(objective.rows(text)(0, BATCH))
    update = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        inputs, targets = objective.split(same)
        loss = objective.loss(model(inputs), targets)
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(60), abs=0.2) and losses[-1] < losses[0] - 1


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_classes_and_encoders_on_two_ranks(tmp_path: Path) -> None:
    """Losses and gradients of every class under its plans equal those of one process."""
    for kind in PLANS:
        config_file(tmp_path, kind)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"folder": str(tmp_path)}))
    heard: list[str] = []
    launch(
        "worker_sources", job, nodes=[Node(index=0, address="127.0.0.1", env={"PYTHONPATH": path})], ranks_per_node=2,
        out_dir=tmp_path, stall_timeout_s=120, on_message=lambda message: heard.append(message["checked"]),
    )  # fmt: skip
    expected = [f"{kind} {slug}" for kind, slugs in PLANS.items() for slug in slugs]
    assert heard == [*expected, *(f"encoder {slug}" for slug in ENCODER_PLANS)]
