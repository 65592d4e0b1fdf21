"""Plans that an engine's makers publish as their best, as rows of runs: model, machine, batch and layout -> RunRow.

``published_plans.csv`` holds one plan a row as its source prints it, with what the source's recipe files add in the
column ``recipe``. Whatever the program has no model, device or engine for is left out with a reason that is counted.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.model.presets import load_preset
from autopar.runs.models import normal_name
from autopar.runs.reading import CannotRead, find_int, has
from autopar.runs.rows import RunRow

REQUIRED = ("id", "model", "hardware", "n_gpus", "global_batch", "seq_len", "tp", "pp", "notes", "source")

# (pattern of model and notes, why the row is none of ours); the first match counts.
LEFT_OUT: tuple[tuple[str, str], ...] = (
    (r"\blora\b", "LoRA trains few of the weights"),
    (r"vlm|(?<!r)\dvl-|qwen\d*vl|neva", "a vision-language model"),
    (r"\bsft\b|finetune", "fine-tuning on packed sequences, whose lengths are not published"),
    (r"flux", "a diffusion model"),
    (r"nemotronh|nemotron-3(-5)?-(nano|super|ultra|lightning)", "a hybrid of Mamba and attention, without a preset"),
)

# (pattern of the model's name, preset); none where a name is known but no preset has its numbers.
PRESETS: tuple[tuple[str, str], ...] = (
    (r"llama-?3\.?1?-405b", "llama3.1-405b"), (r"llama-?3\.1-8b", "llama3.1-8b"), (r"llama-?3-8b", "llama3-8b"),
    (r"llama-?3-70b", "llama3-70b"), (r"llama4-e16", "llama4-scout"), (r"deepseek-?v3", "deepseek-v3"),
    (r"gpt3-175b", "gpt3-175b"), (r"mixtral-8x7b", "mixtral-8x7b"), (r"mixtral-8x22b", "mixtral-8x22b"),
    (r"nemotron3-8b", "nemotron-8b"), (r"nemotron3-22b", "nemotron-22b"), (r"nemotron4-15b", "nemotron-4-15b"),
    (r"nemotron4-340b", "nemotron-4-340b"), (r"qwen3-30b", "qwen3-30b-a3b"), (r"qwen3-235b", "qwen3-235b-a22b"),
    (r"gpt-oss-120b", "gpt-oss-120b"), (r"^gpt-1\.7b", "megatron-1.7b"), (r"^gpt-3\.6b", "megatron-3.6b"),
    (r"^gpt-7\.5b", "megatron-7.5b"), (r"^gpt-18", "megatron-18b"), (r"^gpt-39", "megatron-39b"),
    (r"^gpt-76", "megatron-76b"), (r"^gpt-145", "megatron-145b"), (r"^gpt-310", "megatron-310b"),
    (r"^gpt-529", "megatron-530b"), (r"^gpt-1008", "megatron-1t"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Who published a row, in the words of a run's columns."""

    pattern: str
    framework: str
    year: int
    gpu: str = ""
    interconnect: str = ""
    dtype: str = "bf16"


ORIGINS: tuple[Origin, ...] = (
    Origin(pattern=r"recommended_model_configs", framework="NeMo 25", year=2025),
    Origin(pattern=r"megatron-bridge", framework="Megatron-Bridge", year=2025),
    Origin(pattern=r"examples/llama", framework="Megatron-Core", year=2025),
    Origin(
        pattern=r"sc'21", framework="Megatron-LM", year=2021, gpu="A100-80GB",
        interconnect="NVSwitch + 8x200Gb HDR IB per node (Selene)", dtype="fp16",
    ),
    Origin(
        pattern=r"torchtitan_?.*|torchtitan", framework="torchtitan", year=2024, gpu="H100-96GB-HBM2e-500W",
        interconnect="NVLink + 400 Gb/s RDMA per GPU (Grand Teton)",
    ),
)  # fmt: skip

# Engines of their own kernels and their own plans, for which there is no stack.
OTHER_ENGINES: tuple[tuple[str, str], ...] = (
    (r"alpa-projects", "Alpa, an engine without a stack here; its operators are divided one by one"),
    (r"aceso", "Aceso, an engine without a stack here; its plan is not published"),
)

# (pattern of the hardware, device, devices of a node, network)
MACHINES: tuple[tuple[str, str, int, str], ...] = (
    (r"gb300", "GB300", 4, "NVL72 NVLink5 + IB"), (r"gb200", "GB200", 4, "NVL72 NVLink5 + IB"),
    (r"b300", "B300", 8, "NVLink5 + IB (DGX)"), (r"b200", "B200", 8, "NVLink5 + IB (DGX)"),
    (r"h100", "H100-80GB", 8, "NVLink4 + IB NDR (DGX)"), (r"a100", "A100-80GB", 8, ""),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedPlan:
    """A row of ``published_plans.csv`` as it is printed: cells by column, ``id`` unique, empty cells left out."""

    id: str
    cells: dict[str, str]

    def text(self, column: str) -> str:
        """A cell, empty where it is missing."""
        return self.cells.get(column, "")

    def count(self, column: str) -> int | None:
        """The first number of a cell: ``2 (4)`` is 2, the plan that the row's first precision ran with."""
        found = re.match(r"\d+(\.0)?(?![\d.])", self.text(column))
        return round(float(found[0])) if found else None

    @property
    def words(self) -> str:
        """Model, notes and recipe in lower case."""
        return f"{normal_name(self.text('model'))}; {self.text('notes')}; {self.text('recipe')}".lower()

    @property
    def group(self) -> str:
        """Rows of one source: the id without its number."""
        return re.sub(r"-\d+$", "", self.id)


def read_published(path: str | Path) -> tuple[PublishedPlan, ...]:
    """Read a CSV of published plans. Raises InputError: no such file, a column missing, an id twice."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}, line 1: column '{missing[0]}' of a CSV of published plans is missing")
            rows = [{name: cell.strip() for name, cell in row.items() if cell and cell.strip()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV of published plans: {error}") from error
    ids = [row.get("id", "") for row in rows]
    for name in ids:
        if not name or ids.count(name) > 1:
            raise InputError(f"{path}: the id '{name}' is empty or given twice: ids are unique")
    return tuple(PublishedPlan(id=name, cells=cells) for name, cells in zip(ids, rows, strict=True))


def as_run(plan: PublishedPlan) -> RunRow:
    """The row as a run's, for ``runs.interpret``. Raises CannotRead with the reason why it is left out."""
    source = plan.text("source").lower()
    if plan.text("contradiction"):
        raise CannotRead("contradicts itself or its own recipe at the source")
    for pattern, reason in OTHER_ENGINES:
        if has(source, pattern):
            raise CannotRead(reason)
    for pattern, reason in LEFT_OUT:
        if has(plan.words, pattern):
            raise CannotRead(reason)
    name = normal_name(plan.text("model"))
    preset = next((preset for pattern, preset in PRESETS if has(name, pattern)), None)
    if preset is None:
        raise CannotRead(f"no preset of {plan.text('model')}")
    origin = next((origin for origin in ORIGINS if has(source, origin.pattern)), None)
    machine = next((machine for machine in MACHINES if has(plan.text("hardware").lower(), machine[0])), None)
    if origin is None or machine is None:
        raise CannotRead(f"no engine of {plan.text('source')}" if origin is None else "no device of the hardware")
    _, gpu, per_node, network = machine
    dtype, label = _precision(plan, origin)
    recompute, more = _recompute(plan)
    words = (plan.text("notes"), f"precision label {label}", plan.text("recipe"), more, plan.text("model"))
    notes = "; ".join(word for word in words if word)
    return RunRow(
        id=plan.id, source=plan.group, source_ref=plan.text("source"), **_architecture(preset),
        seq_len=plan.count("seq_len"), gpu=origin.gpu or gpu, n_gpus=plan.count("n_gpus"), gpus_per_node=per_node,
        interconnect=origin.interconnect or network, global_batch=plan.count("global_batch"),
        micro_batch=plan.count("microbatch"), tp=plan.count("tp"), pp=plan.count("pp"), cp=plan.count("cp"),
        ep=plan.count("ep"), vp=plan.count("vp"), zero_or_fsdp=_sharding(plan), recompute=recompute,
        dtype=dtype, framework=origin.framework, year=_year(plan, origin), notes=notes,
        tokens_per_s_per_gpu=_tokens_per_s(plan),
    )  # fmt: skip


def _architecture(preset: str) -> dict[str, Any]:
    spec = load_preset(preset)
    return {
        "model_name": preset, "n_layers": spec.num_layers, "hidden": spec.hidden_size, "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads, "ffn_hidden": spec.ffn_size, "vocab": spec.vocab_size,
        "gated_mlp": spec.gated_mlp, "n_experts": spec.num_experts or None, "top_k": spec.top_k or None,
    }  # fmt: skip


def _year(plan: PublishedPlan, origin: Origin) -> int:
    """Of the software, from a file's name or a release, else the origin's."""
    year = find_int(plan.text("source"), r"_(20\d\d)")
    release = find_int(plan.text("notes"), r"\b(2[3-9])\.\d\d")
    return year or (2000 + release if release else origin.year)


def _precision(plan: PublishedPlan, origin: Origin) -> tuple[str, str]:
    """(type, label) of the products, of the first plan in a row of two; the origin's unless said.

    A table of Megatron-Bridge 25.09 does not say; its rows are fp8 with a scale per tensor, as in the release's notes.
    """
    words = plan.text("notes").lower()
    label = re.search(r"nvfp4|mxfp8|fp8-mx|fp8-cs|fp8-sc|fp8|bf16", words)
    if label is None:
        unsaid = has(words, r"25\.09 nemo container; ;")
        return ("fp8", "fp8-cs") if unsaid else (origin.dtype, origin.dtype)
    kind = "nvfp4" if label[0] == "nvfp4" else "fp8" if "fp8" in label[0] else "bf16"
    return kind, label[0]


def _sharding(plan: PublishedPlan) -> str | None:
    zero = plan.text("zero")
    if zero.lower() == "fsdp":
        devices = find_int(plan.text("recipe"), r"FSDP within (\d+) devices")
        return f"FSDP within {devices}" if devices else "FSDP"
    return {"dist-opt(1)": "distributed optimizer"}.get(zero, zero or None)


def _recompute(plan: PublishedPlan) -> tuple[str | None, str]:
    """(setting, note with its numbers). The recipe wins over the table's column, which most tables do not have."""
    recipe, column = plan.text("recipe").lower(), plan.text("recompute").lower()
    settings = ((r"recompute_modules=", "selective"), (r"recompute full", "full"), (r"no recompute", "none"))
    for pattern, setting in settings:
        if has(recipe, pattern):
            return setting, ""
    layers = find_int(column, r"layers=(\d+)")
    if layers:
        return "full", f"block num_layers={layers}"
    if has(column, r"^[a-z]+_[a-z_]+(/|$)"):
        return "selective", f"recompute_modules={column.replace('/', ',')}"
    return ("selective" if has(column, r"sac") else column or None), ""


def _tokens_per_s(plan: PublishedPlan) -> float | None:
    if has(plan.text("metric_unit"), r"^tokens/s/GPU"):
        return float(plan.text("metric_value"))
    found = re.search(r"tokens/s/GPU=([\d.]+)", plan.text("notes"))
    return float(found[1]) if found else None
