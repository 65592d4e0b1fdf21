"""What engines keep: closed forms of kept bytes and states, items by pipeline rank, and their bands."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autopar.estimate import Setting, estimate, to_arrays
from autopar.estimate.kept import op_level_kept_bytes, section_kept_bytes
from autopar.estimate.memory import ITEMS
from autopar.estimate.pieces import combinations, sections
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.plan import ScheduleName, parse_slug
from autopar.workload import Precision, Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack
from costmodels.units import GIB

H, F, V, S = 2048, 8192, 64000, 2048
LLAMA = ModelSpec(
    name="llama", num_layers=16, hidden_size=H, num_heads=16, num_kv_heads=16, ffn_size=F, vocab_size=V,
    max_seq_len=S, gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False, fused_qkv=False,
)  # fmt: skip


def setting_of(
    spec: ModelSpec = LLAMA, stack: str = "megatron-core", precision: Precision = Precision.BF16,
    cluster: str = "b200:1x8", batch: int = 64,
) -> Setting:  # fmt: skip
    return Setting(
        graph=build_graph(spec, seq_len=S, precision=precision),
        workload=Workload(global_batch=batch, seq_len=S, precision=precision),
        cluster=load_cluster(cluster), stack=load_stack(stack),
    )  # fmt: skip


def kept(setting: Setting, function: Any = section_kept_bytes, last: bool = False) -> float:
    """Bytes per token that a block keeps on one device; of the last unlike block if ``last``."""
    degrees, _ = combinations(to_arrays([parse_slug("dp8.z1.mb1")]))
    blocks = [part for part in sections(setting.graph) if part.is_block(setting.graph)]
    return float(function(blocks[-1 if last else 0].ops, setting, degrees)[0]) / S


def memory(setting: Setting, slug: str) -> dict[str, float]:
    return dict(estimate(setting, parse_slug(slug)).memory)


def test_quantized_products_keep_inputs_of_a_byte() -> None:
    """Inputs of qkv, of the two up products and of down: h + h + f elements; attention's result is kept twice."""
    wide, narrow = kept(setting_of()), kept(setting_of(precision=Precision.FP8))
    assert wide - narrow == pytest.approx((2 - 1) * (2 * H + F) - 1 * H)
    mx = kept(setting_of(precision=Precision.MXFP8))
    assert mx - narrow == pytest.approx((3 * H + F) / 32)
    # torchtitan keeps what autograd sees, in bf16.
    assert kept(setting_of(stack="torchtitan", precision=Precision.FP8)) == kept(setting_of(stack="torchtitan"))


def test_blocks_left_in_bf16_keep_what_bf16_keeps() -> None:
    spec = dataclasses.replace(LLAMA, wide_blocks=3)
    narrow = setting_of(spec, precision=Precision.FP8)
    counts = [len(part.blocks) for part in sections(narrow.graph) if part.is_block(narrow.graph)]
    assert counts[0] == 13 and sum(counts) == LLAMA.num_layers
    assert kept(narrow) == kept(setting_of(precision=Precision.FP8))
    assert kept(narrow, last=True) == kept(setting_of())


def test_recomputing_operations_does_not_know_nvfp4_products() -> None:
    """What is left: the block's input and attention's result with its statistics."""
    titan = setting_of(dataclasses.replace(LLAMA, wide_blocks=3), "torchtitan", Precision.NVFP4)
    assert kept(titan, op_level_kept_bytes) == pytest.approx(2 * H + 2 * H + 4 * LLAMA.num_heads)
    known = setting_of(stack="torchtitan")
    assert kept(titan, op_level_kept_bytes, last=True) == kept(known, op_level_kept_bytes) > 8 * H


def test_fp8_weights_take_a_byte_but_for_embedding_and_head() -> None:
    wide = memory(setting_of(stack="megatron-bridge"), "dp8.z1.mb1")["parameters"]
    narrow = memory(setting_of(stack="megatron-bridge", precision=Precision.FP8), "dp8.z1.mb1")["parameters"]
    graph = setting_of().graph
    assert wide == 2 * graph.num_parameters
    assert narrow == graph.num_parameters + 2 * V * H
    assert memory(setting_of(precision=Precision.FP8), "dp8.z1.mb1")["parameters"] == wide


def test_narrow_states() -> None:
    plain = memory(setting_of(stack="megatron-bridge"), "dp8.z1.mb1")["optimizer"]
    narrow = memory(setting_of(stack="megatron-bridge+narrow-states"), "dp8.z1.mb1")["optimizer"]
    assert narrow / plain == pytest.approx(8 / 12)


def test_results_of_experts_are_not_kept_where_weights_enter_the_activation() -> None:
    spec = load_preset("qwen3-30b-a3b")
    core, bridge = kept(setting_of(spec)), kept(setting_of(spec, "megatron-bridge"))
    assert core - bridge == pytest.approx(2 * spec.top_k * spec.hidden_size)


def test_deepspeed_steps_on_fp32_gradients() -> None:
    """Of a rank's part under ZeRO-1, for the step; without ZeRO of everything, and they stay."""
    setting = setting_of(stack="megatron-deepspeed", precision=Precision.FP16, cluster="a100-80g:1x8", batch=8)
    weights = setting.graph.num_parameters
    assert memory(setting, "dp8.z0.mb1.ac-full")["optimizer"] == (12 + 4) * weights
    sharded = memory(setting, "dp8.z1.mb1.ac-full")
    assert sharded["optimizer"] == 12 * weights / 8
    alone = dataclasses.replace(setting, cluster=load_cluster("a100-80g:1x1"))
    found = memory(alone, "dp1.z1.mb1.ac-full")
    assert (found["activations"], found["working"]) == (0.0, 4.0 * weights)


def test_the_end_of_the_model_is_held_once_in_interleaved_schedules() -> None:
    """A larger vocabulary adds one microbatch's logits to the last rank, not one for every microbatch in flight."""
    larger = dataclasses.replace(LLAMA, vocab_size=2 * V)
    slug = "pp4.vp4.dp2.z1.mb1"
    small, large = (
        estimate(setting_of(spec), parse_slug(slug)).memory_items_per_rank[-1]["activations"]
        for spec in (LLAMA, larger)
    )
    assert large - small == pytest.approx(2 * S * V)
    # All forwards first: the logits of all 4 microbatches of 8 sequences wait.
    plan = dataclasses.replace(parse_slug("pp4.dp2.z1.mb8"), schedule=ScheduleName.GPIPE)
    small, large = (
        estimate(setting_of(spec), plan).memory_items_per_rank[-1]["activations"] for spec in (LLAMA, larger)
    )
    assert large - small == pytest.approx(4 * 8 * 2 * S * V)


@pytest.mark.parametrize("slug", ["dp8.z1.mb1", "pp4.vp4.dp2.z1.mb1", "tp2.pp4.z1.mb2.ac-full.sp"])
def test_items_of_every_rank_add_up(slug: str) -> None:
    found = estimate(setting_of(), parse_slug(slug))
    sums = [sum(items.values()) for items in found.memory_items_per_rank]
    assert sums == pytest.approx(found.memory_per_rank)
    assert all(tuple(items) == ITEMS for items in found.memory_items_per_rank)
    assert found.memory in found.memory_items_per_rank
    for items, bands in zip(found.memory_items_per_rank, found.memory_bands_per_rank, strict=True):
        assert set(bands) == {*ITEMS, "total"}
        assert all(bands[name].low <= size <= bands[name].high for name, size in items.items())
        assert bands["total"].low < sum(items.values()) < bands["total"].high
    assert found.memory_bands == found.memory_bands_per_rank[found.memory_per_rank.index(found.memory_bytes)]
    assert found.memory_bytes > GIB


def test_unknown_engines_are_less_certain() -> None:
    fitted, unknown = (
        estimate(setting_of(stack=stack), parse_slug("dp8.z1.mb1")) for stack in ("torchtitan", "llm-foundry")
    )
    for found, counted in ((fitted, 0.005), (unknown, 0.05)):
        band = found.memory_bands["optimizer"]
        assert band.high / found.memory["optimizer"] == pytest.approx(1 + counted)
