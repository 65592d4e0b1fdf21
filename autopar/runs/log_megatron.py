"""What Megatron-LM and Megatron-Core print -> RunRow.

Read are the dump of arguments (``  tensor_model_parallel_size ...... 2``), the lines of iterations (``elapsed time per
iteration (ms): 5630.1 | throughput per GPU (TFLOP/s/GPU): 231.9``) and of memory (``[Rank 1] (after 1 iterations)
memory (MB) | allocated: ... | max allocated: ...``, in MiB). Megatron does not print the device: the caller names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autopar.errors import InputError
from autopar.runs.log_text import number, steady_median, without_colours
from autopar.runs.rows import RunRow

_ARGUMENT = re.compile(r"^(?:\S*:)?\s*(?P<name>[a-z][a-z0-9_]*) \.{2,} (?P<value>.*?)\s*$", re.MULTILINE)
_TIME = re.compile(r"elapsed time per iteration \(ms\):\s*([\d.]+)")
_RATE = re.compile(r"throughput per GPU \(TFLOP/s/GPU\):\s*([\d.]+)")
_MEMORY = re.compile(r"memory \(MB\) \|.*?max allocated:\s*([\d.]+)")
_VOCAB = re.compile(r"padded vocab .*?\(new size: (\d+)\)")


def read_megatron_log(
    text: str, *, run_id: str = "megatron-001", gpu: str | None = None, gpus_per_node: int = 8, year: int | None = None
) -> RunRow:
    """Read the log of one run; several ranks may have written it.

    ``gpu`` is the device in words (``H100-80GB``). ``year`` is that of the software; without it, the year of the
    iterations' time stamps.

    Raises:
        InputError: no iteration, or no dump of arguments, in the text.
    """
    text = without_colours(text)
    times = [float(value) / 1000 for value in _TIME.findall(text)]
    if not times:
        raise InputError("no line of a Megatron-LM iteration ('elapsed time per iteration (ms): ...') in the log")
    arguments = {match["name"]: match["value"] for match in _ARGUMENT.finditer(text)}
    if "world_size" not in arguments or "num_layers" not in arguments:
        raise InputError("no dump of Megatron-LM's arguments ('  world_size ....... 8') in the log")
    memory = [float(value) / 1024 for value in _MEMORY.findall(text)]
    vocab = _VOCAB.search(text)
    grouped = _on(arguments, "group_query_attention")
    heads, devices = _whole(arguments, "num_attention_heads"), _whole(arguments, "world_size") or 1
    tp, pp, cp = (
        _whole(arguments, f"{name}_parallel_size") or 1 for name in ("tensor_model", "pipeline_model", "context")
    )
    seconds, batch, seq_len = (
        steady_median(times),
        _whole(arguments, "global_batch_size"),
        _whole(arguments, "seq_length"),
    )
    return RunRow(
        id=run_id, source="Megatron-LM log", framework=_framework(arguments), year=year or _year(text),
        model_name=_name(arguments), n_layers=_whole(arguments, "num_layers"), hidden=_whole(arguments, "hidden_size"),
        n_heads=heads, n_kv_heads=_whole(arguments, "num_query_groups") if grouped else heads,
        ffn_hidden=_whole(arguments, "ffn_hidden_size"), seq_len=seq_len, gated_mlp=_on(arguments, "swiglu"),
        vocab=int(vocab[1]) if vocab else _whole(arguments, "padded_vocab_size"),
        n_experts=_whole(arguments, "num_experts"),
        top_k=_whole(arguments, "moe_router_topk") if _whole(arguments, "num_experts") else None,
        gpu=gpu, n_gpus=devices, gpus_per_node=min(gpus_per_node, devices), global_batch=batch,
        micro_batch=_whole(arguments, "micro_batch_size"), tp=tp, pp=pp, cp=cp,
        dp=_whole(arguments, "data_parallel_size") or devices // (tp * pp * cp),
        ep=_whole(arguments, "expert_model_parallel_size"), vp=_virtual(arguments, pp),
        sequence_parallel=_on(arguments, "sequence_parallel"), zero_or_fsdp=_sharding(arguments),
        recompute=_recompute(arguments), dtype=_dtype(arguments), iter_time_s=seconds,
        tokens_per_s_per_gpu=batch * seq_len / (seconds * devices) if batch and seq_len and seconds else None,
        tflops_per_gpu=steady_median([number(value) for value in _RATE.findall(text)]),
        mem_gb_per_gpu=max(memory) if memory else None, mem_basis="max allocated GiB (of the ranks that print it)",
        notes=_notes(arguments),
    )  # fmt: skip


def _year(text: str) -> int | None:
    match = re.search(r"\[(20[1-9]\d)-\d\d-\d\d \d\d:\d\d", text)
    return int(match[1]) if match else None


def _on(arguments: Mapping[str, str], name: str) -> bool:
    return arguments.get(name, "").lower() == "true"


def _whole(arguments: Mapping[str, str], name: str) -> int | None:
    value = arguments.get(name, "")
    return int(value) if re.fullmatch(r"\d+", value) else None


def _stated(arguments: Mapping[str, str], name: str) -> str:
    value = arguments.get(name, "")
    return "" if value in ("None", "[]", "") else value


def _framework(arguments: Mapping[str, str]) -> str:
    if _on(arguments, "deepspeed"):
        return "Megatron-DeepSpeed"
    return "Megatron-Core" if "expert_model_parallel_size" in arguments else "Megatron-LM"


def _name(arguments: Mapping[str, str]) -> str:
    gated = "llama-like" if _on(arguments, "swiglu") else "gpt"
    return f"{gated}-{arguments.get('num_layers')}x{arguments.get('hidden_size')}"


def _virtual(arguments: Mapping[str, str], pp: int) -> int | None:
    """Virtual stages per rank: stated, or from the blocks of one."""
    stated = _whole(arguments, "virtual_pipeline_model_parallel_size")
    per_stage, layers = _whole(arguments, "num_layers_per_virtual_pipeline_stage"), _whole(arguments, "num_layers")
    return stated or (layers // (pp * per_stage) if per_stage and layers and pp > 1 else None)


def _sharding(arguments: Mapping[str, str]) -> str:
    if _on(arguments, "use_torch_fsdp2") or _on(arguments, "use_megatron_fsdp") or _on(arguments, "use_custom_fsdp"):
        return "FSDP"
    stage = _whole(arguments, "zero_stage") if _on(arguments, "deepspeed") else None
    if stage:
        return f"ZeRO-{stage}"
    return "ZeRO-1 (distributed optimizer)" if _on(arguments, "use_distributed_optimizer") else "none (plain DP)"


def _recompute(arguments: Mapping[str, str]) -> str:
    old = _on(arguments, "checkpoint_activations") or _stated(arguments, "activations_checkpoint_method")
    return _stated(arguments, "recompute_granularity") or ("full" if old else "none")


def _dtype(arguments: Mapping[str, str]) -> str:
    if _stated(arguments, "fp4") or _stated(arguments, "fp4_format"):
        return "nvfp4"
    if _stated(arguments, "fp8") or _stated(arguments, "fp8_format"):
        return "fp8"
    return "bf16" if _on(arguments, "bf16") else "fp16" if _on(arguments, "fp16") else "fp32"


def _notes(arguments: Mapping[str, Any]) -> str:
    """Arguments that interpreting needs, as flags of the command line."""
    switches = ("swiglu", "overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap", "qk_layernorm",
                "multi_latent_attention", "moe_grouped_gemm", "cross_entropy_loss_fusion",
                "account_for_embedding_in_pipeline_split")  # fmt: skip
    flags = [name.replace("_", "-") for name in switches if _on(arguments, name)]
    flags += ["disable-bias-linear"] if arguments.get("add_bias_linear") == "False" else []
    flags += ["untie-embeddings-and-output-weights"] if _on(arguments, "untie_embeddings_and_output_weights") else []
    flags += ["position-embedding-type=rope"] if arguments.get("position_embedding_type") == "rope" else []
    flags += ["normalization=rmsnorm"] if arguments.get("normalization") == "RMSNorm" else []
    flags += ["no dropout"] if re.fullmatch(r"0(\.0)?", arguments.get("hidden_dropout", "")) else []
    if _stated(arguments, "recompute_granularity"):
        flags += _values(arguments, "recompute_method", "recompute_num_layers")
        flags += [f"recompute-modules=[{' '.join(re.findall(r'[a-z_]+', arguments.get('recompute_modules', '')))}]"]
    if _whole(arguments, "num_experts"):
        flags += _values(arguments, "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        etp = _whole(arguments, "expert_tensor_parallel_size")
        flags += [f"etp={etp}"] if etp else []
        flags += (
            [f"dispatcher={arguments['moe_token_dispatcher_type']}"] if "moe_token_dispatcher_type" in arguments else []
        )
    flags += _values(arguments, "mtp_num_layers", "decoder_first_pipeline_num_layers", "pipeline_model_parallel_layout")
    recipe = _stated(arguments, "fp8_recipe")
    recipe = {"mxfp8": "MXFP8", "blockwise": "blockwise", "tensorwise": "FP8-CS"}.get(recipe, recipe)
    return "; ".join(part for part in (recipe, "flags: " + ", ".join(flags)) if part)


def _values(arguments: Mapping[str, str], *names: str) -> list[str]:
    return [f"{name.replace('_', '-')}={value}" for name in names if (value := _stated(arguments, name))]
