"""Training software of a run: words of the row -> name of a stack (costmodels.stack) with variants, and its habits.

The tables are read from top to bottom, the first match counts. Years are those of the software.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.runs.reading import Read, has
from autopar.runs.rows import RunRow
from costmodels.stack import stack_variants


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A stack and what its users do unless they say otherwise.

    Attributes:
        stack: name for costmodels.stack, without variants.
        zero_stage: data parallel sharding.
        recompute: ``none``, ``selective`` or ``full``.
        sequence_parallel: with tensor parallelism.
        dropout: GPT-like models are trained with dropout.
        multi_token: models that have multi-token prediction are trained with it.
    """

    stack: str
    zero_stage: int = 0
    recompute: str = "none"
    sequence_parallel: bool = True
    dropout: bool = False
    multi_token: bool = True


ENGINES: dict[str, Engine] = {
    engine.stack: engine
    for engine in (
        Engine(stack="megatron-2020", recompute="full", sequence_parallel=False, dropout=True),
        Engine(stack="megatron-2021", recompute="full", sequence_parallel=False, dropout=True),
        Engine(stack="megatron-2022", recompute="full", sequence_parallel=False, dropout=True),
        Engine(stack="megatron-deepspeed", recompute="full", sequence_parallel=False, dropout=True),
        Engine(stack="megatron-core", zero_stage=1),
        Engine(stack="megatron-bridge", zero_stage=1),
        Engine(stack="nemo-2023", zero_stage=1),
        Engine(stack="nemo-2024", zero_stage=1),
        Engine(stack="internevo", zero_stage=1, sequence_parallel=False, multi_token=False),
        Engine(stack="llm-foundry-2023", zero_stage=3, sequence_parallel=False, multi_token=False),
        Engine(stack="llm-foundry", zero_stage=3, sequence_parallel=False, multi_token=False),
        Engine(stack="torchtitan", zero_stage=3, recompute="selective", multi_token=False),
        Engine(stack="automodel", zero_stage=3, multi_token=False),
        Engine(stack="deepspeed", zero_stage=3, sequence_parallel=False, multi_token=False),
        Engine(stack="autopar-nccl", sequence_parallel=False, multi_token=False),
        Engine(stack="autopar-gloo", sequence_parallel=False, multi_token=False),
    )
}

# (pattern of the framework's name, first year, last year, stack, assumption or nothing)
FRAMEWORKS: tuple[tuple[str, int, int, str, str], ...] = (
    (r"autopar.*gloo", 0, 9999, "autopar-gloo", ""),
    (r"autopar", 0, 9999, "autopar-nccl", ""),
    (r"megatron[- ]?bridge", 0, 9999, "megatron-bridge", ""),
    (r"auto ?model", 0, 9999, "automodel", ""),
    (r"megatron[- ]?deepspeed|gpt-?neox", 0, 9999, "megatron-deepspeed", ""),
    (r"megatron[- ]?core|mcore", 0, 9999, "megatron-core", ""),
    (r"megatron(-lm)?[ -]?v?\d+\.\d+", 0, 9999, "megatron-core", ""),
    (r"nemo", 2025, 9999, "megatron-bridge", "NeMo of 2025 and later is taken as Megatron-Bridge"),
    (r"nemo", 0, 2023, "nemo-2023", ""),
    (r"nemo", 2024, 2024, "nemo-2024", ""),
    (r"megatron", 0, 2020, "megatron-2020", ""),
    (r"megatron", 2021, 2021, "megatron-2021", ""),
    (r"megatron", 2022, 2023, "megatron-2022", ""),
    (r"megatron", 2024, 9999, "megatron-core", ""),
    (r"llm-?foundry|mosaic|composer", 0, 2023, "llm-foundry-2023", ""),
    (r"llm-?foundry|mosaic|composer", 2024, 9999, "llm-foundry", ""),
    (r"torch-?titan", 0, 9999, "torchtitan", ""),
    (r"internevo|internlm", 0, 9999, "internevo", ""),
    (r"deepspeed", 0, 9999, "deepspeed", ""),
    (r"alpa", 0, 9999, "megatron-2021", "Alpa is taken as Megatron-LM of 2021"),
    (r"metaseq|fairseq", 0, 9999, "megatron-2021", "metaseq is taken as Megatron-LM of 2021"),
    (r"colossal", 0, 9999, "megatron-2022", "Colossal-AI is taken as Megatron-LM of 2022"),
    (r"nanotron", 0, 9999, "megatron-core", "nanotron is taken as Megatron-Core"),
    (r"flash-?attention", 0, 9999, "llm-foundry-2023", "the FlashAttention repository is taken as llm-foundry of 2023"),
    (r"fsdp2|pytorch|torch ?tune|maxtext|jax|levanter", 2024, 9999, "torchtitan", "taken as torchtitan"),
    (r"fsdp|pytorch|lightning|fairscale", 0, 9999, "llm-foundry-2023", "taken as llm-foundry of 2023"),
    (r"hugging ?face|transformers|accelerate", 0, 9999, "deepspeed", "Hugging Face is taken as DeepSpeed"),
)

BEFORE_FSDP = ("megatron-2020", "megatron-2021", "megatron-2022", "megatron-deepspeed")

LAYER_TRACES = r"ground_truth_single"
"""File of vTrain's single-node runs: put together from traces of layers of its own model, whose embedding and head are
not padded (src/config.py and gpt_modeling.py there give each rank 50257 // tp rows)."""

COMPILED_LOSS_YEAR = 2025
"""First year of torchtitan's compiled loss."""

# (pattern of the row's words, variant); a variant counts where the stack has it.
VARIANTS: tuple[tuple[str, str], ...] = (
    (r"cuda_graph=(?!none)[^;]*full_iteration|full[- ]iteration cuda graph", "cuda-graph-full"),
    (r"cuda_graph=(?!none)(?![^;]*full_iteration)|\bte (scoped )?(cuda )?graphs|cuda graphs on|scoped cuda ?graph"
     r"|config dgx\S+_cg\b", "cuda-graph-partial"),
    (r"a2a_overlap|a2a overlap(?! off)|ep overlap on|a2a_ovlp", "a2a-overlap"),
    (r"dispatcher[=: ]*(alltoall|allgather)|\b(alltoall|allgather) (fallback )?dispatcher", "plain-dispatcher"),
    (r"dispatcher[=: ]*deepep", "deepep"),
    (r"dispatcher[=: ]*hybridep", "hybridep"),
    (r"async[- ]?tp\b|async tensor|tp-comm-overlap", "async-tp"),
    (r"\bno compile|without (torch\.)?compile|\beager(?! \+)", "no-compile"),
    (r"row-?wise", "fp8-rowwise"),
    (r"mp mode pure|mixed_precision[=: ]*pure", "pure-gradients"),
    (r"attention[-_ ]backend[= ]unfused|transformer-impl=local(?!.*use-flash-attn)", "unfused-attention"),
    (r"precision[- ]aware optimizer|bf16 moments", "narrow-states"),
    (r"fused (cross[- ]entropy|loss)|cross[-_]entropy[-_](loss[-_])?fusion|linear cross entropy", "fused-loss"),
    (r"bf16 optimizer|fp32 grad(ient)? accumulation", "bf16-master-gradients"),
    (r"type:transformer\|embedding|account[-_]for[-_](embedding|loss)", "balanced-ends"),
    (r"bigscience|cuda_launch_blocking", "blocking-launches"),
    (r"simumax", "slow-products"),
    (r"deterministic-mode", "deterministic"),
    (r"layer traces", "layer-traces"),
)  # fmt: skip


def read_engine(row: RunRow) -> Read[Engine]:
    """The engine of a run; an unknown one is taken as the nearest by its year and sharding."""
    name, year = row.words("framework"), row.year
    assumed: list[str] = []
    if year is None:
        year = 2024
        if has(name, r"megatron|nemo|foundry"):
            assumed.append("year of the software unknown: 2024 assumed")
    for pattern, first, last, stack, note in FRAMEWORKS:
        if has(name, pattern) and first <= year <= last:
            if stack in BEFORE_FSDP and has(row.words("zero_or_fsdp"), r"zero-?[23]"):
                return ENGINES["deepspeed"], (*assumed, "ZeRO-2 and ZeRO-3 are taken as DeepSpeed's")
            return ENGINES[stack], (*assumed, *((note,) if note else ()))
    stack = _stack_by_sharding(row.words("zero_or_fsdp", "notes"), year)
    return ENGINES[stack], (*assumed, f"framework '{row.framework or 'not stated'}' is taken as {stack}")


def _stack_by_sharding(words: str, year: int) -> str:
    if has(words, r"fsdp|full[_ ]shard"):
        return "torchtitan" if year >= 2024 else "llm-foundry-2023"
    if has(words, r"zero-?[23]|deepspeed"):
        return "deepspeed"
    return "megatron-core" if year >= 2023 else "megatron-2022" if year == 2022 else "megatron-2021"


def read_stack(row: RunRow, engine: Engine, latent: bool = False) -> Read[str]:
    """Name of the stack with the variants that the row's words ask for.

    ``latent`` models of Megatron-Bridge are trained with narrow optimizer states, as its recipes for them say.
    """
    words = row.words("source", "model_name", "framework", "dtype", "notes")
    known = stack_variants(engine.stack)
    asked = [variant for pattern, variant in VARIANTS if has(words, pattern)]
    asked += _unsaid(row, engine, asked, latent)
    assumed = [f"{engine.stack} has no setting '{variant}': left out" for variant in asked if variant not in known]
    chosen = [engine.stack, *(variant for variant in asked if variant in known)]
    if engine.stack == "megatron-bridge" and row.n_experts:
        usual = [variant for variant in _usual_recipe(row, words) if variant not in chosen]
        chosen += usual
        assumed += [f"recipe not stated: {variant} assumed" for variant in usual]
    if "narrow-states" in chosen and latent:
        assumed.append("optimizer states in bf16, as usual with megatron-bridge and latent attention")
    return "+".join(chosen), tuple(assumed)


def _usual_recipe(row: RunRow, words: str) -> list[str]:
    """What Megatron-Bridge's tuned recipes set where a row of its tables of performance does not say.

    A recipe that is quoted without a dispatcher, and runs outside these tables that name none of its other settings,
    keep the plain one. Source: the workload configurations in its scripts/performance, by release.
    """
    tuned = has(row.words("source_ref"), r"performance") or has(words, r"\bgraphs\b|ep overlap")
    if not tuned or has(words, r"dispatcher|\brecipe\b"):
        return []
    first_release = has(words, r"\b25\.0\d\b")
    if has(row.words("model_name"), "deepseek") and has(row.words("gpu"), "h100"):
        return ["deepep", "a2a-overlap"] if first_release else ["hybridep"]
    if first_release:
        return []
    return ["hybridep", "cuda-graph-partial"] if has(row.words("gpu"), r"\bgb\d") else ["hybridep"]


def _unsaid(row: RunRow, engine: Engine, asked: Sequence[str], latent: bool) -> list[str]:
    """Variants that follow from what a row leaves out: defaults of a command line, of a year, of recipes."""
    found = []
    if has(row.words("source_ref"), LAYER_TRACES):
        found.append("layer-traces")
    if engine.stack == "megatron-core" and has(row.words("notes"), "flags:") and "fused-loss" not in asked:
        found.append("unfused-loss")
    if engine.stack == "torchtitan" and (row.year or 0) in range(1, COMPILED_LOSS_YEAR) and "no-compile" not in asked:
        found.append("uncompiled-loss")
    if engine.stack == "megatron-bridge" and latent and "narrow-states" not in asked:
        found.append("narrow-states")
    return found
