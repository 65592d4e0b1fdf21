"""The transformer module: names, initial values, and what attention must obey."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import InputError
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.model.transformer import Rotary, Transformer, build, language_model_loss

GPT = ModelSpec(
    name="gpt", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=4, ffn_size=96, vocab_size=50, max_seq_len=16,
    fused_qkv=False,
)  # fmt: skip
LLAMA = ModelSpec(
    name="llama", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=80, vocab_size=50, max_seq_len=16,
    fused_qkv=False, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False,
)  # fmt: skip
FUSED = ModelSpec(
    name="fused", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=96, vocab_size=50, max_seq_len=16,
    tied_embeddings=True,
)  # fmt: skip
SPECS = (GPT, LLAMA, FUSED)


def tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_parameters_are_those_of_the_analytic_graph(spec: ModelSpec) -> None:
    expected = {p.name: p.elements for p in build_graph(spec, seq_len=16).parameters()}
    assert {name: p.numel() for name, p in build(spec).named_parameters()} == expected


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_token_sees_only_earlier_ones(spec: ModelSpec) -> None:
    model, x = build(spec), tokens()
    changed = x.clone()
    changed[:, 9:] = 7
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_an_encoder_sees_all_tokens() -> None:
    model, x = build(ModelSpec(**{**spec_fields(GPT), "causal": False})), tokens()
    changed = x.clone()
    changed[:, 9:] = 7
    assert not torch.allclose(model(x)[:, :9], model(changed)[:, :9])


def spec_fields(spec: ModelSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def test_grouped_query_attention_repeats_keys_and_values() -> None:
    """Equal to a model with as many key-value heads whose weights are repeated."""
    whole = ModelSpec(**{**spec_fields(LLAMA), "num_kv_heads": 4})
    grouped, repeated = build(LLAMA), build(whole)
    state = grouped.state_dict()
    for name, value in state.items():
        if ".key." in name or ".value." in name:
            heads = value.view(2, LLAMA.head_size, -1)
            state[name] = heads.repeat_interleave(2, dim=0).reshape(4 * LLAMA.head_size, -1)
    repeated.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), repeated(tokens()))


def test_a_fused_projection_equals_separate_ones() -> None:
    separate = ModelSpec(**{**spec_fields(FUSED), "fused_qkv": False})
    left, right = build(FUSED), build(separate)
    state = dict(right.state_dict())
    for kind in ("weight", "bias"):
        for block in range(2):
            prefix = f"blocks.{block}.attention"
            parts = [state.pop(f"{prefix}.{name}.{kind}") for name in ("query", "key", "value")]
            state[f"{prefix}.qkv.{kind}"] = torch.cat(parts)
    left.load_state_dict(state)
    torch.testing.assert_close(left(tokens()), right(tokens()))


def test_rotary_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 12, 1, 16) for _ in range(2))
    turned_query, turned_key = Rotary()(query, key)
    scores = turned_query[0, :, 0] @ turned_key[0, :, 0].T
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0], scores[0, 3])


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    deeper = ModelSpec(**{**spec_fields(GPT), "num_layers": 3})
    small, same, other, deep = build(GPT, 3), build(GPT, 3), build(GPT, 4), build(deeper, 3)
    for name, value in small.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
        if name.endswith("query.weight"):
            assert torch.equal(value, deep.state_dict()[name]), name
            assert not torch.equal(value, other.state_dict()[name]), name
    names = ("blocks.0.attention.query.weight", "blocks.1.attention.query.weight")
    assert not torch.equal(*(small.state_dict()[name] for name in names))


def test_the_first_loss_is_that_of_guessing() -> None:
    loss = language_model_loss(build(GPT)(tokens()), tokens())
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)


def test_tied_embeddings_share_storage() -> None:
    model = build(FUSED)
    assert model.head.weight is model.embedding.token.weight


def test_meta_device_builds_without_memory() -> None:
    with torch.device("meta"):
        model = build(GPT)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_declarations_name_real_modules() -> None:
    for spec in SPECS:
        model: Transformer = build(spec)
        first, blocks, last = model.pipeline_parts()
        x = tokens()
        for name in (*first, *blocks, *last):
            x = model.get_submodule(name)(x)
        assert torch.equal(x, model(tokens()))
        for pattern in model.tensor_parallel_plan:
            assert isinstance(model.get_submodule(pattern.replace("*", "0")), torch.nn.Linear | torch.nn.Embedding)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="17 tokens is longer than the model's 16 positions"):
        build(GPT)(tokens(length=17))
