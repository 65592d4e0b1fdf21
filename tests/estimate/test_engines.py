"""What engines do to time and memory: published formulas of activations, launches, experts, recomputation, shards."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autopar.estimate import Setting, estimate, to_arrays
from autopar.estimate.kept import section_kept_bytes
from autopar.estimate.pieces import combinations, sections
from autopar.estimate.stages import engine_split, launch_stall_seconds
from autopar.estimate.step import transfer_seconds
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from autopar.plan import parse_slug
from autopar.shard import EXPERT_SPLITS, Degrees, expert_collectives, local_matmul, local_parameters
from autopar.workload import Precision, Workload
from costmodels.errors import InputError
from costmodels.hardware import load_cluster
from costmodels.shipped import read_shipped
from costmodels.stack import Stack, load_stack, stack_names, stack_variants

GPT = ModelSpec(
    name="gpt", num_layers=8, hidden_size=1024, num_heads=16, num_kv_heads=16, ffn_size=4096, vocab_size=51200,
    max_seq_len=2048, dropout=True,
)  # fmt: skip


def setting_of(
    spec: ModelSpec = GPT, stack: Stack | str = "megatron-2022", cluster: str = "a100-80g:1x8", batch: int = 64,
    seq_len: int = 2048, precision: Precision = Precision.FP16,
) -> Setting:  # fmt: skip
    return Setting(
        graph=build_graph(spec, seq_len=seq_len, precision=precision),
        workload=Workload(global_batch=batch, seq_len=seq_len, precision=precision),
        cluster=load_cluster(cluster),
        stack=load_stack(stack) if isinstance(stack, str) else stack,
    )


def block_activations(setting: Setting, slug: str) -> float:
    degrees, _ = combinations(to_arrays([parse_slug(slug)]))
    block = next(part for part in sections(setting.graph) if part.is_block(setting.graph))
    return float(section_kept_bytes(block.ops, setting, degrees)[0])


@pytest.mark.parametrize(
    ("slug", "words"),
    [
        ("dp8.mb2", lambda t, scores: 34 + 5 * scores),
        ("tp4.dp2.mb2", lambda t, scores: 10 + 24 / t + 5 * scores / t),
        ("tp4.dp2.mb2.sp", lambda t, scores: 34 / t + 5 * scores / t),
    ],
)
def test_activations_of_a_block_are_those_of_korthikanti(slug: str, words) -> None:
    """Korthikanti et al. 2022, table 2: bytes in units of s b h; scores = a s / h."""
    setting, tp = setting_of(), parse_slug(slug).layout.tp
    s, b, h, a = 2048, 2, GPT.hidden_size, GPT.num_heads
    # Statistics of norms, two numbers a token, are not in the paper's table.
    assert block_activations(setting, slug) == pytest.approx(s * b * h * words(tp, a * s / h), rel=4e-3)


def test_selective_recomputation_frees_the_scores_and_costs_attention_again() -> None:
    setting = setting_of(batch=2)
    whole, again = (estimate(setting, parse_slug(f"tp8.mb2.sp.ac-{kind}")) for kind in ("none", "selective"))
    scores = 5 * 2 * GPT.num_heads * 2048 * 2048 / 8 * GPT.num_layers
    assert whole.memory["activations"] - again.memory["activations"] == pytest.approx(scores)
    assert again.breakdown["recompute"] > 0 == whole.breakdown["recompute"]
    assert again.breakdown["forward"] == whole.breakdown["forward"]


def test_full_recomputation_of_some_layers_lies_between_none_and_all() -> None:
    setting = setting_of()
    results = [
        estimate(setting, parse_slug(f"pp2.dp4.mb2.ac-{kind}")) for kind in ("none", "full1", "full2", "full4", "full")
    ]
    again = [result.breakdown["recompute"] for result in results]
    assert again == sorted(again)
    assert again[1] == pytest.approx(again[4] / 4)
    assert again[3] == again[4]
    kept = [result.memory["activations"] for result in results]
    assert kept[0] > kept[1] > kept[2] > kept[3] == kept[4]


def test_recomputing_a_module_frees_only_what_it_made() -> None:
    setting = setting_of(load_preset("deepseek-v3"), "megatron-core", "h800:32x8", 2048, 4096, Precision.BF16)

    def held(kind: str) -> tuple[float, float]:
        found = estimate(setting, parse_slug(f"pp16.ep16.dp16.z1.mb1.ac-{kind}"))
        return found.memory["activations"], found.breakdown["recompute"]

    nothing = held("none")
    modules = {name: held(f"selective+{name}") for name in ("layernorm", "mla_up_proj", "moe_act")}
    both = held("selective+layernorm+mla_up_proj")
    for name, (memory, seconds) in modules.items():
        assert memory < nothing[0], name
        assert seconds > 0, name
    freed = {name: nothing[0] - memory for name, (memory, _) in modules.items()}
    assert nothing[0] - both[0] == pytest.approx(freed["layernorm"] + freed["mla_up_proj"])


@pytest.mark.parametrize("exponent", [1.0, 3.5, 40.0])
def test_launches_stall_the_device(exponent: float) -> None:
    device, host = np.asarray([1.0, 2.0, 3.0]), np.asarray([0.0, 2.0, 1.0])
    found = launch_stall_seconds(device, host, exponent)
    assert found[0] == 0
    assert found == pytest.approx((device**exponent + host**exponent) ** (1 / exponent) - device)
    if exponent == 1.0:
        assert found == pytest.approx(host)
    if exponent == 40.0:
        assert found == pytest.approx(np.maximum(host - device, 0), abs=0.04)


@pytest.mark.parametrize("slug", ["mb2.tp8.ac-none", "mb2.tp8.ac-full"])
def test_waiting_by_blocks_lets_no_block_hide_the_launches_of_another(slug: str) -> None:
    """Of a block alone both ways agree; the head, busy on the device, hides launches of blocks where passes wait."""

    def stall(spec: ModelSpec, by_block: bool, launch: float) -> float:
        stack = load_stack("megatron-2021")
        host = dataclasses.replace(stack.host, launch_seconds=launch, exponent=4.0, waits_for_blocks=by_block)
        setting = setting_of(spec, dataclasses.replace(stack, host=host), batch=2)
        return estimate(setting, parse_slug(slug)).breakdown["launch_bound"]

    assert stall(GPT, True, 100e-6) > 1.02 * stall(GPT, False, 100e-6)
    additive = [
        estimate(
            setting_of(
                GPT, dataclasses.replace(s, host=dataclasses.replace(s.host, exponent=1.0, waits_for_blocks=w)), batch=2
            ),
            parse_slug(slug),
        ).step_s
        for s in [load_stack("megatron-2021")]
        for w in (False, True)
    ]
    assert additive[0] == pytest.approx(additive[1])
    assert stall(GPT, True, 0.0) == 0.0


@pytest.mark.parametrize(("tp", "rows"), [(1, 50304), (2, 25216), (8, 6400)])
def test_megatron_pads_the_head_of_every_rank(tp: int, rows: int) -> None:
    graph = build_graph(load_preset("gpt2-xl"), seq_len=1024, precision=Precision.FP16)
    head = next(op for op in graph.ops if op.name == "head")
    degrees = Degrees(tp=tp, cp=1, sp=False, microbatch=1)
    assert local_matmul(head, graph, degrees, load_stack("megatron-2022"))[1] == rows
    assert local_matmul(head, graph, degrees, load_stack("torchtitan"))[1] == 50257 / tp


def test_a_send_inside_a_node_reaches_a_share_of_its_links() -> None:
    stack = load_stack("megatron-2021")
    tenth = dataclasses.replace(stack, pipeline=dataclasses.replace(stack.pipeline, node_share=0.1, scatters=False))
    whole = dataclasses.replace(stack, pipeline=dataclasses.replace(stack.pipeline, scatters=False))
    for slug, inside in (("pp4.dp2.mb2", True), ("pp2.tp8.mb2", False)):
        plans, cluster = to_arrays([parse_slug(slug)]), "a100-80g:1x8" if inside else "a100-80g:2x8"
        size = np.asarray([64e6])
        slow, fast = (
            float(transfer_seconds(setting_of(stack=s, cluster=cluster), plans, size)[0]) for s in (tenth, whole)
        )
        latency = load_cluster(cluster).node_link.latency
        assert slow == pytest.approx(10 * (fast - latency) + latency if inside else fast)


def test_graphs_of_kernels_take_launches_away() -> None:
    plan = parse_slug("dp8.z1.mb1")
    steps = [
        estimate(setting_of(load_preset("qwen3-30b-a3b"), stack, "h100:1x8", 16, 1024, Precision.BF16), plan)
        for stack in ("megatron-bridge", "megatron-bridge+cuda-graph-partial", "megatron-bridge+cuda-graph-full")
    ]
    stalls = [step.breakdown["launch_bound"] for step in steps]
    assert stalls[0] > stalls[1] > stalls[2] == 0


@pytest.mark.parametrize("slug", ["ep8.dp8.mb1", "tp2.ep4.dp4.mb1.sp", "tp4.ep2.etp4.dp2.mb1.sp"])
def test_experts_are_divided_and_tokens_exchanged(slug: str) -> None:
    spec = load_preset("mixtral-8x7b")
    graph = build_graph(spec, seq_len=4096)
    plan = parse_slug(slug)
    degrees, _ = combinations(to_arrays([plan]))
    stack = load_stack("megatron-core")
    block = graph.block_ops(0)
    experts = [op for op in block if op.split in EXPERT_SPLITS]
    total = 3 * spec.num_experts * spec.hidden_size * spec.expert_ffn_size
    local = local_parameters(experts, degrees, stack)[0]
    assert local == total / (plan.layout.ep * plan.layout.etp)
    sent = [found for found in expert_collectives(block, graph, degrees) if found.axis == "ep"]
    rows = 4096 * spec.top_k / plan.layout.tp
    assert [found.num_bytes[0] for found in sent] == [rows * spec.hidden_size * 2] * 4
    assert {found.kind for found in sent} == {"all_to_all"}
    alone, _ = combinations(to_arrays([parse_slug("dp8.mb1")]))
    assert not any(found.num_bytes.any() for found in expert_collectives(block, graph, alone))


def test_sharding_everything_over_fp32_shards_takes_16_bytes_a_weight() -> None:
    setting = setting_of(stack="torchtitan", cluster="h100:8x8", precision=Precision.BF16, batch=64)
    found = estimate(setting, parse_slug("dp64.z3.mb1")).memory
    states = found["parameters"] + found["gradients"] + found["optimizer"]
    assert states == pytest.approx(16 * setting.graph.num_parameters / 64)


def test_narrow_products_leave_attention_and_the_head_alone() -> None:
    spec = dataclasses.replace(GPT, hidden_size=8192, head_size=512, ffn_size=32768, dropout=False)
    plan = parse_slug("dp8.z1.mb1")
    wide, narrow = (
        estimate(setting_of(spec, "megatron-core", "h100:1x8", 8, 2048, precision), plan).breakdown["forward"]
        for precision in (Precision.BF16, Precision.FP8)
    )
    assert 0.5 * wide < narrow < 0.8 * wide


def test_stages_that_count_their_ends() -> None:
    stack = load_stack("megatron-deepspeed+balanced-ends")
    assert engine_split(70, 12, stack) == (5, *(6,) * 10, 5)
    assert engine_split(70, 1, stack) == (70,)
    assert engine_split(70, 12, load_stack("megatron-deepspeed")) == (*(6,) * 10, 5, 5)


def test_every_stack_and_variant_loads_and_names_its_origins() -> None:
    for name in stack_names():
        for variant in ("", *(f"+{variant}" for variant in stack_variants(name))):
            stack = load_stack(name + variant)
            assert stack.name == name + variant
            assert stack.origins
    with pytest.raises(InputError, match=r"no variant 'cuda-graph-ful'.*cuda-graph-full"):
        load_stack("megatron-core+cuda-graph-ful")
    with pytest.raises(InputError, match="unknown stack 'megatron-cor'"):
        load_stack("megatron-cor")


def test_a_variant_changes_only_what_it_names() -> None:
    base, varied = load_stack("megatron-core"), load_stack("megatron-core+async-tp")
    assert varied.tensor.exposed < base.tensor.exposed
    same = dataclasses.replace(varied, name=base.name, tensor=base.tensor)
    assert same == base


def test_origins_speak_of_what_a_stack_has() -> None:
    """No origin outlives its number."""
    for name in stack_names():
        plain = {**read_shipped("stacks", name)}
        for origin in plain["origins"]:
            stack, keys = load_stack(name), origin.split(".")
            if keys[0] == "variants":
                assert keys[1] in stack_variants(name), f"{name}: {origin}"
                continue
            place = getattr(stack, keys[0])
            if len(keys) > 1:
                rest = ".".join(keys[1:])
                while rest and hasattr(place, rest.split(".")[0]):
                    head, _, rest = rest.partition(".")
                    place = getattr(place, head)
                assert not rest or rest in place, f"{name}: {origin}"
