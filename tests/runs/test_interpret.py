"""Published runs, and rows made from them, as cases."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest

from autopar.model.build import build_graph
from autopar.model.spec import Position
from autopar.plan import Recompute, ScheduleName, check_plan, parse_slug
from autopar.runs import RunCase, RunRow, Unsupported, coverage, interpret, read_runs
from autopar.workload import Precision
from costmodels.stack import load_stack

DATA = Path(__file__).parent / "data"
PUBLISHED = {row.id: row for row in read_runs(DATA / "published.csv")}
# Tables of published runs on the developer's machine; see the file formats in the documentation of runs.
TABLES = Path(os.environ.get("AUTOPAR_RUNS", Path(__file__).parents[3] / "shared" / "measurements"))


def _case(row: RunRow | str, **changes: Any) -> RunCase:
    found = interpret(dataclasses.replace(PUBLISHED[row] if isinstance(row, str) else row, **changes))
    assert isinstance(found, RunCase), found
    return found


def _refused(row: str, **changes: Any) -> str:
    found = interpret(dataclasses.replace(PUBLISHED[row], **changes))
    assert isinstance(found, Unsupported), found
    return found.reason


# Layout, stack, precision and cluster as the sources state them.
CASES = [
    ("llmfoundry-001", "tp1.pp1.vp1.cp1.dp512.z3.mb8.ac-full", "llm-foundry", "bf16", "h100", 64),
    ("llmfoundry-190", "tp1.pp1.vp1.cp1.dp32.z3.mb12.ac-none", "llm-foundry+pure-gradients", "bf16", "a100-40g", 4),
    ("megatron_2020-001", "tp1.pp1.vp1.cp1.dp1.z0.mb8.ac-full", "megatron-2020", "fp16", "v100-dgx2", 1),
    ("sc21_megatron-009", "tp8.pp35.vp3.cp1.dp9.z0.mb1.ac-full", "megatron-2021", "fp16", "a100-80g", 315),
    ("korthikanti22-004", "tp8.pp8.vp3.cp1.dp1.z0.mb1.ac-selective.sp", "megatron-2022", "fp16", "a100-80g", 8),
    ("bloom_prequel-040", "tp8.pp12.vp1.cp1.dp4.z0.mb2.ac-full", "megatron-deepspeed+blocking-launches", "fp16",
     "a100-80g", 48),
    ("internevo-026", "tp2.pp1.vp1.cp1.dp8.z1.mb4.ac-none.rep2", "internevo", "bf16", "a100-80g", 2),
    ("internevo-034", "tp1.pp1.vp1.cp1.dp16.z1.mb8.ac-full.rep2", "internevo", "bf16", "a100-80g", 2),
    ("torchtitan-029", "tp8.pp1.vp1.cp1.dp8.z3.mb12.ac-selective+op_level.sp", "torchtitan+fp8-rowwise", "fp8",
     "h100-500w", 8),
    ("mlperf-015", "tp4.pp6.vp8.cp1.dp448.z1.mb1.ac-none.sp", "nemo-2024+cuda-graph-partial", "fp8", "h100", 1344),
    ("megatron_bridge-260", "tp1.pp1.vp1.cp1.dp8.z3.mb1.ac-full5", "megatron-bridge", "fp8", "h100", 1),
    ("bridge_memory_studies-004", "tp2.pp1.vp1.cp1.ep8.dp4.z1.mb1.ac-selective+mlp+mla_up_proj.sp",
     "megatron-bridge+narrow-states", "bf16", "h100", 1),
    ("simumax_b200-007", "tp1.pp1.vp1.cp1.ep8.dp8.z1.mb1.ac-none", "megatron-core+slow-products", "bf16", "b200", 1),
    ("automodel-010", "tp1.pp1.vp1.cp2.dp32.z3.mb1.ac-none", "automodel", "bf16", "h100", 8),
    ("nemo_2407-009", "tp2.pp4.vp10.cp1.dp8.z1.mb2.ac-none.sp", "nemo-2024", "fp8", "h100", 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "slug", "stack", "precision", "device", "nodes"), CASES)
def test_published_runs(name: str, slug: str, stack: str, precision: str, device: str, nodes: int) -> None:
    case = _case(name)
    assert case.plan == parse_slug(slug)
    assert (case.stack, case.workload.precision.value) == (stack, precision)
    assert (case.cluster.device.name, case.cluster.num_nodes) == (device, nodes)
    assert case.measured_s is not None
    assert case.cluster.world_size == PUBLISHED[name].n_gpus


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_case_is_a_legal_plan_on_an_existing_stack(name: str) -> None:
    found = interpret(PUBLISHED[name])
    if isinstance(found, Unsupported):
        assert name in ("mlperf-042", "alpa_osdi22-002")
        return
    graph = build_graph(found.spec, seq_len=found.workload.seq_len, precision=found.workload.precision)
    check_plan(found.plan, graph, found.workload, found.cluster.world_size)
    load_stack(found.stack)
    assert found.cluster.device.peak(found.workload.precision.value) > 0
    stated = PUBLISHED[name].params_b
    if stated:
        weights = sum(p.elements for op in graph.ops for p in op.parameters if not p.shared_with) / 1e9
        assert weights == pytest.approx(stated, rel=0.04)


def test_what_columns_do_not_say_comes_from_the_family_and_numbers_of_the_row_win() -> None:
    deepseek = _case("simumax_b200-007").spec
    assert (deepseek.num_layers, deepseek.dense_layers, deepseek.mtp_layers) == (4, 1, 0)
    assert deepseek.latent is not None
    assert (deepseek.expert_ffn_size, deepseek.shared_ffn_size) == (2048, 2048)
    qwen = _case("megatron_bridge-009").spec
    assert (qwen.head_size, qwen.qk_norm, qwen.expert_ffn_size, qwen.shared_ffn_size) == (128, True, 1536, 0)
    wider = _case("megatron_bridge-009", hidden=5120, notes="moe-ffn-hidden-size=1024").spec
    assert (wider.head_size, wider.expert_ffn_size) == (128, 1024)


def test_dropout_is_of_megatron_until_2022() -> None:
    assert _case("sc21_megatron-009").spec.dropout
    assert _case("bloom_prequel-040").spec.dropout
    assert not _case("mlperf-015").spec.dropout
    assert not _case("internevo-026").spec.dropout


def test_llama_3_2_is_tied_and_mistral_keeps_its_own_vocabulary() -> None:
    assert _case("torchtitan-010", model_name="Llama-3.2-3B", hidden=3072, n_heads=24, n_layers=28).spec.tied_embeddings
    mistral = _case("torchtitan-010", model_name="Mistral-7B", vocab=32000)
    assert (mistral.spec.vocab_size, mistral.spec.position) == (32000, Position.ROTARY)


def test_a_model_known_by_name_needs_no_numbers() -> None:
    empty = {"n_layers": None, "hidden": None, "n_heads": None, "n_kv_heads": None, "ffn_hidden": None, "vocab": None}
    spec = _case("torchtitan-010", model_name="LLAMA3_70B", **empty).spec
    assert (spec.num_layers, spec.hidden_size, spec.num_kv_heads, spec.vocab_size) == (80, 8192, 8, 128256)
    assert "not known" in _refused("torchtitan-010", model_name="Qwen3", **empty)
    assert "not known" in _refused("torchtitan-010", model_name="novel", **empty)


def test_a_missing_vocabulary_is_gpt_2_s_padded_for_tensor_parallelism() -> None:
    assert _case("sc21_megatron-009", vocab=None).spec.vocab_size == 51200
    assert _case("megatron_2020-001", model_name="my own", vocab=None).spec.vocab_size == 50304


def test_vtrain_divides_its_vocabulary_without_padding() -> None:
    """Rows of a rank: 50257, 25128, 12564, 6282."""
    for tp, vocab in ((1, 50257), (2, 50256), (4, 50256), (8, 50256)):
        changes = {"source_ref": "data/ground_truth_single.csv", "vocab": None, "tp": tp, "n_gpus": None, "dp": 1}
        assert _case("sc21_megatron-009", **changes).spec.vocab_size == vocab


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Nemotron_3_Nano", "state-space"), ("mT5-xl", "encoder with a decoder"), ("llava-13b", "besides a language"),
     ("Llama3 70B LoRA", "LoRA")],
)  # fmt: skip
def test_models_beyond_the_program_are_refused_with_the_reason(name: str, reason: str) -> None:
    assert reason in _refused("torchtitan-010", model_name=name)


@pytest.mark.parametrize(
    ("dtype", "notes", "gpu", "expected"),
    [
        ("fp8", "precision label MXFP8", "B200", Precision.MXFP8),
        ("fp8", "precision label FP8; recipe LLAMA31_405B_PRETRAIN_CONFIG_GB200_FP8_MX_V2", "GB200", Precision.MXFP8),
        ("fp8", "precision label FP8 (per-tensor/CS; table does not state)", "B200", Precision.FP8),
        ("nvfp4", "precision label NVFP4", "GB300", Precision.NVFP4),
        ("fp8", "blockwise scaling", "H100-80GB", Precision.FP8_BLOCK),
        ("mxfp8", "", "H100-80GB", Precision.FP8),
        ("bfloat16", "", "H100-80GB", Precision.BF16),
        ("bf16", "", "V100-32GB", Precision.FP16),
    ],
)
def test_precision(dtype: str, notes: str, gpu: str, expected: Precision) -> None:
    case = _case("torchtitan-010", dtype=dtype, notes=notes, gpu=gpu)
    assert case.workload.precision is expected


def test_devices_memory_and_domains() -> None:
    assert _case("torchtitan-010", gpu="V100-16GB", dtype="fp16").cluster.device.memory_bytes == 16 * 2**30
    hopper = _case("torchtitan-010", gpu="NVIDIA H20", dtype="bf16")
    assert hopper.cluster.device.peak("bf16") == pytest.approx(148e12)
    assert any("taken as h100" in text for text in hopper.assumptions)
    assert "no numbers of device" in _refused("torchtitan-010", gpu="TPU v4")
    rack = _case("megatron_bridge-009")
    assert (rack.cluster.domain, rack.cluster.devices_per_node) == (72, 4)


@pytest.mark.parametrize(
    ("framework", "year", "stack"),
    [
        ("Megatron-LM", 2019, "megatron-2020"), ("Megatron-LM", 2021, "megatron-2021"),
        ("Megatron-LM", 2022, "megatron-2022"), ("Megatron-LM", 2025, "megatron-core"),
        ("Megatron-LM 0.14", 2022, "megatron-core"), ("NeMo 24.07", 2024, "nemo-2024"), ("NeMo", 2023, "nemo-2023"),
        ("NeMo AutoModel (PyTorch)", 2025, "automodel"), ("Megatron-Bridge / NeMo 26.02", 2026, "megatron-bridge"),
        ("Hugging Face accelerate", 2023, "deepspeed"), ("my own", 2026, "torchtitan"),
    ],
)  # fmt: skip
def test_engines_by_name_and_year(framework: str, year: int, stack: str) -> None:
    assert _case("torchtitan-010", framework=framework, year=year, notes="").stack == stack


@pytest.mark.parametrize(
    ("notes", "stack"),
    [
        ("recipe A: cuda_graph=full_iteration:[]; moe_a2a_overlap", "megatron-bridge+cuda-graph-full+a2a-overlap"),
        ("recipe A: cuda_graph=local:full_iteration", "megatron-bridge+cuda-graph-full"),
        ("recipe A: cuda_graph=none:full_iteration", "megatron-bridge"),
        ("recipe A: cuda_graph=transformer_engine:['attn', 'moe_router']", "megatron-bridge+cuda-graph-partial"),
        ("", "megatron-bridge+hybridep+cuda-graph-partial"),
        ("NeMo container 25.09", "megatron-bridge"),
        ("dispatcher=deepep", "megatron-bridge+deepep"),
        ("dispatcher=hybridep", "megatron-bridge+hybridep"),
        ("alltoall fallback dispatcher, no permute fusion", "megatron-bridge+plain-dispatcher"),
    ],
)
def test_settings_of_an_engine(notes: str, stack: str) -> None:
    assert _case("megatron_bridge-009", notes=notes).stack == stack


@pytest.mark.parametrize(
    ("notes", "stack"),
    [
        ("NeMo container 25.09", "megatron-bridge+narrow-states+deepep+a2a-overlap"),
        ("NeMo container 25.11", "megatron-bridge+narrow-states+hybridep"),
        ("NeMo container 25.11; dispatcher=deepep", "megatron-bridge+deepep+narrow-states"),
    ],
)
def test_recipes_of_an_expert_model_by_release(notes: str, stack: str) -> None:
    assert _case("megatron_bridge-001", gpu="H100-80GB", gpus_per_node=8, notes=notes).stack == stack


def test_settings_of_a_tuned_recipe_outside_its_tables() -> None:
    here: dict[str, Any] = {"source_ref": "skills/SKILL.md", "gpu": "H100-80GB", "gpus_per_node": 8}
    assert _case("megatron_bridge-009", **here, notes="mock data").stack == "megatron-bridge"
    assert _case("megatron_bridge-009", **here, notes="EP overlap off; mock data").stack == "megatron-bridge+hybridep"


def test_deterministic_kernels_of_megatron_core() -> None:
    case = _case("simumax_b200-007", source=None, notes="flags: deterministic-mode, overlap-grad-reduce")
    assert "deterministic" in case.stack.split("+")


def test_a_recipe_with_an_empty_list_of_modules_recomputes_nothing() -> None:
    case = _case("megatron_bridge-001")
    assert case.plan.recompute is Recompute.NONE
    assert any("nothing is recomputed" in text for text in case.assumptions)


def test_a_setting_that_the_engine_does_not_have_is_left_out_and_said() -> None:
    case = _case("internevo-026", notes="float8 rowwise")
    assert case.stack == "internevo"
    assert "internevo has no setting 'fp8-rowwise': left out" in case.assumptions


@pytest.mark.parametrize(
    ("text", "stage", "shard"),
    [
        ("ZeRO-1 within 8 GPUs", 1, 4), ("ZeRO-1 within 4 DP ranks", 1, 4), ("FSDP SHARD_GRAD_OP", 2, 8),
        ("FSDP2", 3, 8), ("HSDP replicate=2 shard=4", 3, 4), ("none (plain DP)", 0, 1),
        ("distributed optimizer (ZeRO-1)", 1, 8), ("ZeRO-0", 0, 1),
    ],
)  # fmt: skip
def test_sharding(text: str, stage: int, shard: int) -> None:
    plan = _case("internevo-026", zero_or_fsdp=text).plan
    assert (plan.zero_stage, plan.layout.dp_shard, plan.layout.dp) == (stage, shard, 8)


def test_sharding_within_more_gpus_than_there_are() -> None:
    assert _case("internevo-026", zero_or_fsdp="ZeRO-1 within 64 GPUs").plan.layout.dp_shard == 8


def test_recomputation() -> None:
    every = _case("torchtitan-010", notes="selective layer AC (every 2nd layer)").plan
    assert (every.recompute, every.recompute_layers) == (Recompute.FULL, 16)
    uniform = _case("torchtitan-010", recompute="full", notes="recompute-method=uniform, recompute-num-layers=1").plan
    assert (uniform.recompute, uniform.recompute_layers) == (Recompute.FULL, 0)
    listed = _case("megatron_bridge-001", notes="flags: recompute-modules=[layernorm mla_up_proj shared_experts]")
    assert listed.plan.recompute_modules == ("layernorm", "mla_up_proj")
    assert "recomputation of shared_experts left out" in listed.assumptions
    assert _case("megatron_bridge-001", recompute=None, notes="").plan.recompute is Recompute.SELECTIVE
    assert _case("megatron_bridge-009", recompute=None, notes="").plan.recompute is Recompute.NONE


def test_a_stated_pipeline_layout_divides_the_blocks() -> None:
    case = _case("megatron_bridge-001")
    assert case.plan.stage_blocks == (*[4] * 15, 1)
    assert case.spec.mtp_layers == 1
    other = _case("mcore_ci-020")
    assert (other.plan.stage_blocks, other.plan.layout.vp) == ((2, 2, 2, 2, 2, 2, 1, 1), 2)


def test_uneven_blocks_count_embedding_and_head() -> None:
    case = _case("megatron_bridge-194")  # 94 blocks on 8 ranks of 4 virtual stages
    assert case.plan.stage_blocks == (2, *[3] * 30, 2)
    assert any("embedding and head as a block each" in text for text in case.assumptions)
    # 126 blocks on 16 ranks of 8: the first and the last stage have none
    case = _case("megatron_bridge-037")
    layout, split = case.plan.layout, case.plan.blocks_of_stages(126)
    assert (layout.vp, split[0], split[-1]) == (8, 0, 0)
    ranks = [sum(split[rank :: layout.pp]) for rank in range(layout.pp)]
    assert ranks == [7, *[8] * 14, 7]


def test_balanced_ends_are_the_engine_s_own() -> None:
    case = _case("bloom_prequel-127")
    assert case.stack.split("+")[1:] == ["bf16-master-gradients", "balanced-ends", "blocking-launches"]
    assert case.plan.stage_blocks == ()


def test_schedules() -> None:
    assert _case("nemo_2407-009").plan.schedule is ScheduleName.INTERLEAVED
    assert _case("bloom_prequel-040", notes="schedule GPipe").plan.schedule is ScheduleName.GPIPE
    assert _case("bloom_prequel-040", notes="zb-h1").plan.schedule is ScheduleName.ZB_H1


def test_degrees_that_do_not_multiply_out_are_repaired_or_refused() -> None:
    case = _case("nemo_2407-061")  # tp2 cp4 on 128 devices, dp said to be 4
    assert case.plan.layout.dp == 16
    assert any("does not multiply out" in text for text in case.assumptions)
    assert any("inconsistent at the source" in text for text in case.caveats)
    assert "does not divide" in _refused("nemo_2407-009", tp=3)
    assert "layout is not stated" in _refused("alpa_osdi22-002")
    assert _case("nemo_2407-009", dp=None).plan.layout.dp == 8
    assert _case("nemo_2407-009", tp=None, dp=8, notes="").plan.layout.tp == 2
    assert _case("llmfoundry-001", tp=None, pp=None, dp=None).plan.layout.dp == 512


def test_batches_that_are_missing_or_do_not_divide() -> None:
    case = _case("automodel-010", micro_batch=None, notes="local batch 2, GA 2")
    assert (case.plan.microbatch_size, case.workload.global_batch) == (2, 128)
    case = _case("automodel-010", global_batch=None, micro_batch=1, notes="GA 4")
    assert case.workload.global_batch == 128
    assert case.measured_s == pytest.approx(18.9)
    case = _case("automodel-010", micro_batch=3)
    assert case.plan.microbatch_size == 1
    guessed = _case("automodel-010", global_batch=None, notes="")
    assert guessed.measured_s == pytest.approx(guessed.workload.tokens / (866.77 * 64))
    assert _case("automodel-010", global_batch=None, notes="", tokens_per_s_per_gpu=None).measured_s is None


def test_times_from_tokens_per_second() -> None:
    row = PUBLISHED["torchtitan-010"]
    case = _case("torchtitan-010", iter_time_s=None)
    assert case.measured_s == pytest.approx(row.iter_time_s, rel=1e-3)


def test_memory_says_how_it_was_measured() -> None:
    def basis(name: str) -> tuple[float | None, str, str]:
        case = _case(name)
        return case.measured_memory_gib, case.memory_basis, case.memory_rank

    assert basis("torchtitan-010") == (61.8, "reserved", "max")
    assert basis("bloom_prequel-127") == (40.0, "device", "ends")
    # State divided over an unknown number of ranks cannot be compared.
    assert basis("mcore_ci-020") == (None, "allocated", "last")
    known = _case("mcore_ci-020", n_gpus=128)
    assert (known.measured_memory_gib, known.memory_basis, known.memory_rank) == (48.2471, "allocated", "last")
    assert basis("korthikanti22-012")[0] is None  # computed, not measured
    assert _case("mcore_ci-020").measured_s is None  # on an unknown number of devices


def test_logs_of_megatron_bridge_are_decimal_and_of_the_last_rank() -> None:
    case = _case("bridge_memory_studies-004")
    assert case.measured_memory_gib == pytest.approx(35.917e9 / 2**30)
    assert (case.memory_basis, case.memory_rank) == ("allocated", "last")
    stated = _case("bridge_memory_studies-004", mem_basis="", notes="rank-0 peak GiB")
    assert (stated.measured_memory_gib, stated.memory_basis, stated.memory_rank) == (35.917, "allocated", "first")
    other = _case("bridge_memory_studies-004", framework="Megatron-Core 0.12")
    assert (other.measured_memory_gib, other.memory_rank) == (35.917, "max")


def test_what_a_row_leaves_out_follows_the_engine_s_defaults() -> None:
    """Megatron-LM's command line fuses no loss unless told; torchtitan compiles its loss since 2025."""
    flags = "flags: transformer-impl=transformer_engine"
    assert "unfused-loss" in _case("mcore_ci-020", notes=flags).stack
    assert "unfused-loss" not in _case("mcore_ci-020", notes=f"{flags}, cross-entropy-loss-fusion").stack
    assert "unfused-attention" in _case("mcore_ci-020", notes=f"{flags}, attention-backend=unfused").stack
    assert "unfused-attention" not in _case("mcore_ci-020", notes=f"{flags}, attention-backend=flash").stack
    assert _case("torchtitan-010", year=2024).stack == "torchtitan+uncompiled-loss"
    assert _case("torchtitan-010", year=2026).stack == "torchtitan"
    assert "narrow-states" not in _case("megatron_bridge-260").stack  # no latent attention


def test_last_blocks_in_bf16() -> None:
    notes = "NVFP4 layers 0-26, bf16 tail; peak reserved GiB"
    assert _case("torchtitan-010", n_layers=32, notes=notes).spec.wide_blocks == 5
    assert _case("torchtitan-010", n_layers=32, notes="layers 0-26 on the first stage").spec.wide_blocks == 0


def test_what_a_prediction_does_not_know_of_is_said() -> None:
    oom = _case("bloom_prequel-127", notes="OOM on 80 GB", iter_time_s=None, tokens_per_s_per_gpu=None)
    assert (oom.measured_s, oom.measured_memory_gib, oom.caveats) == (None, None, ("ran out of memory",))
    assert "offloads to the host" in _case("megatron_bridge-037", notes="CPU activation offload 20 layers").caveats
    assert _case("llmfoundry-001").caveats == ()


def test_experts_in_tensor_parallel_ranks_by_megatron_s_default() -> None:
    stated = _case("mcore_ci-020").plan.layout
    assert (stated.tp, stated.ep, stated.etp) == (2, 16, 1)
    default = _case("mcore_ci-020", model_name="deepseekv3_proxy", n_gpus=128).plan.layout
    assert (default.ep, default.etp) == (16, 2)


def test_coverage_counts_sources_reasons_and_assumptions() -> None:
    found = coverage(interpret(row) for row in PUBLISHED.values())
    assert found.sources["megatron_bridge"] == (5, 5, 5, 0)
    assert found.reasons == {"LoRA trains few of the weights": 1, "the layout is not stated (tp, pp)": 1}
    assert all(count > 0 for count in found.assumptions.values())


@pytest.mark.parametrize("seed", range(5))
def test_rows_with_missing_or_senseless_cells_are_read_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    names = [field.name for field in dataclasses.fields(RunRow) if field.name != "id"]
    texts = ["", "???", "NVLink + 4x", "hsdp", "layout=E|t", "within 0", "grad accum 0", "0 Gb/s RoCE", "etp=3 ep7"]
    for _ in range(60):
        row = chance.choice(list(PUBLISHED.values()))
        changes: dict[str, Any] = {}
        for name in chance.sample(names, 3):
            value = getattr(row, name)
            if isinstance(value, str):
                changes[name] = chance.choice([None, *texts])
            elif value is not None:
                changes[name] = chance.choice([None, -1, 0, 1, 3, 7, value * 2])
        found = interpret(dataclasses.replace(row, **changes))
        if isinstance(found, RunCase):
            layout = found.plan.layout
            assert found.cluster.world_size == layout.world_size
            assert found.workload.global_batch % (layout.dp * found.plan.microbatch_size) == 0
            assert found.measured_s is None or found.measured_s > 0
        else:
            assert found.reason


@pytest.mark.skipif(not (TABLES / "validation_core.csv").exists(), reason="tables of published runs are not here")
def test_every_table_on_this_machine_is_read() -> None:
    assert not [found for row in read_runs(TABLES / "validation_core.csv")
                if isinstance(found := interpret(row), Unsupported)]  # fmt: skip
    for path in sorted(TABLES.glob("*.csv")):
        with path.open() as file:
            if {"id", "model_name", "n_gpus", "tp"} <= set(file.readline().strip().split(",")):
                found = [interpret(row) for row in read_runs(path)]
                assert sum(isinstance(case, RunCase) for case in found) > 0.7 * len(found)
