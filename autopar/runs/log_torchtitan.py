"""What torchtitan prints (2024 to 2026) -> RunRow.

Read are the lines of its start (device, mesh, model, batch, what was applied; ``Running with args`` where it is
printed) and of its steps: ``step: 10  loss: ...  memory: 2.66GiB(2.80%)  tps: 7,110  tflops: ...  mfu: ...``. tps is
tokens per second and device; memory is the peak that the allocator reserved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from autopar.errors import InputError
from autopar.runs.log_text import number, steady_median, without_colours
from autopar.runs.rows import RunRow

_STEP = re.compile(
    r"step:\s*(?P<step>\d+)\s.*?memory:\s*(?P<memory>[\d.]+)GiB.*?\s(?:tps|wps):\s*(?P<tps>[\d,.]+)"
    r"(?:.*?tflops:\s*(?P<tflops>[\d,.]+))?(?:.*?mfu:\s*(?P<mfu>[\d.]+)%)?"
)
_MESH = re.compile(r"device mesh with \[(?P<names>[^\]]+)\], \[(?P<degrees>[^\]]+)\]")
_DEGREES = re.compile(r"device mesh with parallelism: (?P<pairs>[\w=, ]+)")
_MODEL = re.compile(r"Building (?P<name>\w+) (?P<flavor>[\w.-]+) with \w+\((?P<args>[^\n]*)\)")
_BATCH = re.compile(r"local batch size (?P<local>\d+), global batch size (?P<total>\d+)")
_SEQ = re.compile(r"sequence length (\d+)")
_DEVICE = re.compile(r"CUDA capacity: (?P<name>.+?) with (?P<memory>[\d.]+)GiB")
_CHECKPOINT = re.compile(r"Applied (?P<mode>\w+) activation checkpointing|Applied (?P<kind>Full|Selective)AC", re.I)


def read_torchtitan_log(text: str, *, run_id: str = "torchtitan-001", gpus_per_node: int = 8) -> RunRow:
    """Read the log of one run; several ranks may have written it.

    Raises:
        InputError: no line of a step, or no line that names the layout.
    """
    text = without_colours(text)
    steps = list(_STEP.finditer(text))
    if not steps:
        raise InputError("no line of a torchtitan step ('step: 10  loss: ...  memory: ...GiB  tps: ...') in the log")
    config = _config(text)
    degrees = _degrees(text, config)
    if not degrees:
        raise InputError("no line of torchtitan's device mesh, nor 'Running with args', in the log: start it from INFO")
    tp, pp, cp = (degrees.get(axis, 1) for axis in ("tp", "pp", "cp"))
    replicate, shard = degrees.get("dp_replicate", 1), degrees.get("dp_shard", 1)
    model = _model(text)
    batch, seq, device = _BATCH.search(text), _SEQ.search(text), _DEVICE.search(text)
    rate = _median(steps, "tps")
    dp, devices = replicate * shard, tp * pp * cp * replicate * shard
    total = int(batch["total"]) if batch else None
    seq_len = int(seq[1]) if seq else _find(config, "training", "seq_len")
    return RunRow(
        id=run_id, source="torchtitan log", framework="torchtitan", year=_year(text), gpu=_gpu(device), n_gpus=devices,
        gpus_per_node=min(gpus_per_node, devices), tp=tp, pp=pp, cp=cp, dp=dp, ep=degrees.get("ep"),
        micro_batch=_micro_batch(batch, config, pp), global_batch=total, seq_len=seq_len,
        zero_or_fsdp=f"HSDP replicate={replicate} shard={shard}" if replicate > 1 and shard > 1
        else "FSDP2 (full shard)" if shard * cp > 1 else "none (plain DP)",
        sequence_parallel=tp > 1, recompute=_recompute(text, config), dtype=_dtype(text, config),
        iter_time_s=total * seq_len / (rate * devices) if rate and total and seq_len else None,
        tokens_per_s_per_gpu=rate, tflops_per_gpu=_median(steps, "tflops"), mfu=_share(_median(steps, "mfu")),
        mem_gb_per_gpu=max(number(step["memory"]) for step in steps),
        mem_basis="peak reserved GiB (max over ranks)", notes=_notes(text, config), **model,
    )  # fmt: skip


def _median(steps: list[re.Match[str]], name: str) -> float | None:
    return steady_median([number(step[name]) for step in steps if step[name]])


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _year(text: str) -> int | None:
    match = re.search(r"\b(20[2-9]\d)-\d\d-\d\d \d\d:\d\d", text)
    return int(match[1]) if match else None


def _gpu(device: re.Match[str] | None) -> str | None:
    return f"{device['name']} {float(device['memory']):.0f}GiB" if device else None


def _config(text: str) -> Mapping[str, Any]:
    """The configuration after ``Running with args:``, empty where it is not printed."""
    start = text.find("Running with args: {")
    if start < 0:
        return {}
    # Each printed line may carry its rank in front.
    body = re.sub(r"^\[\w*rank\w*\d*\]:", "", text[text.index("{", start) :], flags=re.MULTILINE)
    try:
        found, _ = json.JSONDecoder().raw_decode(body)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _find(config: Mapping[str, Any], table: str, key: str) -> Any:
    section = config.get(table)
    return section.get(key) if isinstance(section, dict) else None


def _degrees(text: str, config: Mapping[str, Any]) -> dict[str, int]:
    pairs = _DEGREES.search(text)
    if pairs:
        return {name: int(degree) for name, degree in re.findall(r"(\w+)=(\d+)", pairs["pairs"])}
    mesh = _MESH.search(text)
    if mesh:
        names = re.findall(r"\w+", mesh["names"])
        degrees = dict(zip(names, map(int, re.findall(r"\d+", mesh["degrees"])), strict=False))
        inside = degrees.pop("dp_shard_in_ep", None)
        if inside is not None:  # experts divide the ranks of the sharded axis
            degrees["dp_shard"] = inside * degrees.pop("dp_shard_mod_ep", 1)
            degrees["ep"] = inside * degrees.get("cp", 1)
        return degrees
    return dict(_configured(config))


def _configured(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    keys = {
        "tp": "tensor_parallel_degree", "pp": "pipeline_parallel_degree", "cp": "context_parallel_degree",
        "dp_replicate": "data_parallel_replicate_degree", "dp_shard": "data_parallel_shard_degree",
        "ep": "expert_parallel_degree",
    }  # fmt: skip
    for axis, key in keys.items():
        degree = _find(config, "parallelism", key)
        if isinstance(degree, int) and degree > 0:
            yield axis, degree


def _model(text: str) -> dict[str, Any]:
    """Fields of RunRow from ``Building llama3 8B with TransformerModelArgs(dim=4096, ...)``."""
    named = re.search(r"Model (\w+) ([\w.-]+) size: ([\d,]+) total parameters", text)
    built = _MODEL.search(text)
    found: dict[str, Any] = {}
    if named:
        found = {"model_name": f"{named[1]}-{named[2].lower()}", "params_b": number(named[3]) / 1e9}
    if not built:
        return found
    found.setdefault("model_name", f"{built['name']}-{built['flavor'].lower()}")
    numbers = {name: float(value) for name, value in re.findall(r"\b(\w+)=(-?[\d.]+)\b", built["args"])}
    columns = (("n_layers", "n_layers"), ("dim", "hidden"), ("n_heads", "n_heads"), ("n_kv_heads", "n_kv_heads"),
               ("vocab_size", "vocab"), ("num_experts", "n_experts"), ("top_k", "top_k"))  # fmt: skip
    found |= {column: int(numbers[name]) for name, column in columns if numbers.get(name, 0) > 0}
    width = _ffn_width(numbers)
    return found | ({"ffn_hidden": width, "gated_mlp": True} if width else {})


def _ffn_width(numbers: Mapping[str, float]) -> int | None:
    """Width of torchtitan's Llama feed-forward: 8/3 dim, times a factor, up to a multiple."""
    for name in ("hidden_dim", "inter_dim", "ffn_dim", "intermediate_size"):
        if numbers.get(name, 0) > 0:
            return int(numbers[name])
    if "dim" not in numbers or "multiple_of" not in numbers:
        return None
    width, step = int(8 * numbers["dim"] / 3), int(numbers["multiple_of"])
    width = int(numbers.get("ffn_dim_multiplier", 1.0) * width)
    return -(-width // step) * step


def _micro_batch(batch: re.Match[str] | None, config: Mapping[str, Any], pp: int) -> int | None:
    """The local batch, which a pipeline divides into microbatches of its own size."""
    divided = _find(config, "parallelism", "pipeline_parallel_microbatch_size")
    if pp > 1:
        return divided if isinstance(divided, int) else 1
    return int(batch["local"]) if batch else _find(config, "training", "local_batch_size")


def _recompute(text: str, config: Mapping[str, Any]) -> str | None:
    applied = _CHECKPOINT.search(text)
    if applied:
        return "selective" if (applied["mode"] or applied["kind"]).lower().startswith("sel") else "full"
    mode = _find(config, "activation_checkpoint", "mode")
    return str(mode) if mode else None


def _dtype(text: str, config: Mapping[str, Any]) -> str:
    words = f"{text} {_find(config, 'model', 'converters') or ''}".lower()
    for pattern, dtype in (
        (r"nvfp4", "nvfp4"),
        (r"mxfp8|mx training active", "fp8"),
        (r"float8 training active", "fp8"),
    ):
        if re.search(pattern, words):
            return dtype
    return "fp32" if _find(config, "training", "mixed_precision_param") == "float32" else "bf16"


def _notes(text: str, config: Mapping[str, Any]) -> str:
    """What interpreting needs beside the columns, in the words of the published tables."""
    compiled = re.search(r"compiling each|torch\.compile", text, re.I) or _find(config, "compile", "enable")
    option = str(_find(config, "activation_checkpoint", "selective_ac_option") or "op")
    layers = f"selective layer AC (every {option} layer)" if option.isdigit() else ""
    asynchronous = _find(config, "parallelism", "enable_async_tensor_parallel")
    asynchronous = asynchronous or re.search(r"async (tp|tensor)", text, re.I)
    words = (
        "torch.compile" if compiled else "no compile", layers if _recompute(text, config) == "selective" else "",
        "async TP" if asynchronous else "", "MXFP8" if re.search(r"mxfp8|mx training active", text, re.I) else "",
        "float8 rowwise" if re.search(r"rowwise", text, re.I) else "",
    )  # fmt: skip
    schedule = _find(config, "parallelism", "pipeline_parallel_schedule")
    return "; ".join(word for word in (*words, f"schedule {schedule}" if schedule else "") if word)
