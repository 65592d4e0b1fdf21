"""Bytes of an operation on one rank: what backward needs, by recompute module, and what it takes for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autopar.estimate.opcosts import UNFUSED, attention_kernel, is_narrow, local_attention
from autopar.estimate.setting import Setting
from autopar.graph import RECOMPUTE_MODULES, AttentionShape, MatmulShape, Op, OpKind, SavedTensor, Split
from autopar.shard import Degrees, activation_share, batch_scale, boundary_bytes, kept_bytes
from autopar.workload import Precision

PRODUCTS = (OpKind.MATMUL, OpKind.GROUPED_MATMUL)
STATISTICS = ("statistics", "logsumexp")
INPUTS = ".qkv"
PRODUCT_INPUT = ".input"
INTERMEDIATE = "act.intermediate"
LOSS_BYTES = 4.0
KEPT_WIDTHS = {
    Precision.FP8: 1.0,
    Precision.FP8_BLOCK: 1.0 + 4 / 128,
    Precision.MXFP8: 1.0 + 1 / 32,
    Precision.NVFP4: 0.5 + 1 / 16,
}
"""Bytes of a kept element with its share of the scales."""


def section_kept_bytes(ops: Sequence[Op], setting: Setting, degrees: Degrees, *, scores: bool = True) -> Any:
    """Bytes that these operations keep for their backward without recomputation; with the ``scores`` of unfused
    attention or without."""
    stack, scale = setting.stack, batch_scale(setting.graph, degrees)
    unfused = attention_kernel(setting) == UNFUSED
    sizes: dict[Split, float] = {}
    total: Any = np.zeros_like(np.asarray(degrees.tp, dtype=float))
    for op in ops:
        if isinstance(op.shape, AttentionShape) and stack.context.copies:
            inputs = [tensor for tensor in op.saved if tensor.name.endswith(INPUTS)]
            again = kept_bytes(inputs, setting.graph, degrees, stack)
            total = total + np.where(np.asarray(degrees.cp) > 1, again * stack.context.copies, 0.0)
        if op.kind is OpKind.LOSS and (each := stack.memory.loss_bytes or (LOSS_BYTES if _widens(setting) else 0)):
            logits = max((tensor.num_bytes for tensor in op.saved), default=0) / setting.graph.itemsize
            sizes[op.split] = sizes.get(op.split, 0.0) + logits * each
            continue
        inner = unfused and isinstance(op.shape, AttentionShape)
        for tensor in _really_saved(op, setting):
            if not (inner and tensor.name.endswith(STATISTICS)):
                sizes[tensor.split] = sizes.get(tensor.split, 0.0) + tensor.num_bytes
        if inner and scores:
            total = total + score_bytes(op, setting, degrees)
    for split, size in sizes.items():
        total = total + size * activation_share(split, degrees, stack) * scale
    return total


def _widens(setting: Setting) -> bool:
    return setting.stack.memory.loss_fp32 and setting.graph.itemsize < LOSS_BYTES


def _really_saved(op: Op, setting: Setting) -> Sequence[SavedTensor]:
    """What the engine keeps of an operation's tensors, and in which type.

    A product whose inputs are quantized keeps those instead: Transformer Engine saves the cast input for the gradient
    of the weight. Attention's result is kept by attention too, so that the product after it adds its own cast copy.
    """
    habits = setting.stack.memory
    saved: Sequence[SavedTensor] = op.saved
    if habits.fused_activations:
        saved = [tensor for tensor in saved if not tensor.name.endswith(INTERMEDIATE)]
    if not habits.expert_outputs and op.kind is OpKind.PERMUTE:
        saved = [tensor for tensor in saved if not tensor.name.endswith(PRODUCT_INPUT)]
    width = KEPT_WIDTHS.get(setting.workload.precision)
    if not habits.quantized_inputs or width is None or not is_narrow(op, setting):
        return saved
    share = width / setting.graph.itemsize
    quantized = [replace(t, num_bytes=t.num_bytes * share) for t in saved if t.name.endswith(PRODUCT_INPUT)]
    if not saved and op.split is Split.ROW and isinstance(op.shape, MatmulShape):
        copy = op.shape.m * op.shape.k * width
        return [SavedTensor(name=op.name + PRODUCT_INPUT, num_bytes=copy, split=Split.FEATURES)]
    return [*quantized, *(t for t in saved if not t.name.endswith(PRODUCT_INPUT))]


def waiting_bytes(ops: Sequence[Op], setting: Setting, degrees: Degrees) -> Any:
    """Bytes that a split backward keeps from its first part for its second: gradients of the results of weights.

    A weight's gradient needs that of what it made. Source: Qi et al. 2023 (zero bubble), and counted: torch's
    ``stage_backward_input`` keeps these and, since its graph stays, all that forward kept.
    """
    total: Any = np.zeros_like(np.asarray(degrees.tp, dtype=float))
    for op in ops:
        if op.parameters and op.kind is not OpKind.EMBEDDING:
            total = total + op.output_bytes * activation_share(op.output_split, degrees, setting.stack)
    return total * batch_scale(setting.graph, degrees)


def score_bytes(op: Op, setting: Setting, degrees: Degrees) -> Any:
    """Scores that unfused attention keeps: probabilities, and under dropout the mask and the dropped probabilities.

    Source: Korthikanti et al. 2022, section 4.1: 2 + 1 + 2 bytes per score in 2-byte types.
    """
    shape = op.shape
    assert isinstance(shape, AttentionShape)
    local = local_attention(op, setting, degrees)
    scores = local["batch"] * local["heads"] * local["query_len"] * local["key_len"]
    width = setting.graph.itemsize
    return scores * (width + (1 + width if shape.dropout else 0))


def _statistics(tensors: Sequence[SavedTensor], setting: Setting, degrees: Degrees) -> Any:
    found = [tensor for tensor in tensors if tensor.name.endswith(STATISTICS)]
    return kept_bytes(found, setting.graph, degrees, setting.stack)


def freed_bytes(ops: Sequence[Op], setting: Setting, degrees: Degrees) -> list[Any]:
    """Bytes that recomputing each of RECOMPUTE_MODULES frees, one entry a module.

    Recomputing attention frees what lies inside it; its output is the next product's input and stays.
    """
    freed: list[Any] = []
    for module in RECOMPUTE_MODULES:
        inside: Any = np.zeros_like(np.asarray(degrees.tp, dtype=float))
        for op in ops:
            if isinstance(op.shape, AttentionShape):
                if module == "core_attn":
                    unfused = attention_kernel(setting) == UNFUSED
                    inner = score_bytes(op, setting, degrees) if unfused else None
                    inside = inside + (_statistics(op.saved, setting, degrees) if inner is None else inner)
                made = [t for t in op.saved if t.made_by == module != "core_attn"]
            else:
                made = [t for t in _really_saved(op, setting) if t.made_by == module]
            inside = inside + kept_bytes(made, setting.graph, degrees, setting.stack)
        freed.append(inside)
    return freed


def saves_product(op: Op, setting: Setting) -> bool:
    """Whether this is a product that recomputation by operation knows; the others it computes again."""
    unknown = setting.workload.precision.value in setting.stack.memory.op_level_recomputes and is_narrow(op, setting)
    return op.kind in PRODUCTS and not unknown


def op_level_kept_bytes(ops: Sequence[Op], setting: Setting, degrees: Degrees) -> Any:
    """Bytes of a block that keeps its input, attention's result, and the result of every second product but the last.

    Source: the policy of torchtitan's selective activation checkpointing.
    """
    products = [op for op in ops if saves_product(op, setting)]
    total = boundary_bytes(setting.graph, degrees, setting.stack)
    scale = batch_scale(setting.graph, degrees)
    for op in products[:-1:2]:
        total = total + op.output_bytes * activation_share(op.output_split, degrees, setting.stack) * scale
    for op in ops:
        if isinstance(op.shape, AttentionShape):
            share = activation_share(op.output_split, degrees, setting.stack) * scale
            total = total + op.output_bytes * share + _statistics(op.saved, setting, degrees)
    return total


def working_bytes(op: Op, setting: Setting, degrees: Degrees) -> Any:
    """Temporary bytes of an operation's backward: the gradients of its result and of what it keeps.

    The loss holds ``loss_copies`` tensors of the size of the logits beside what forward kept. A row product's result is
    reduced out of place; along the sequence its parts are gathered and joined (``sequence_copies``).
    """
    share = activation_share(op.output_split, degrees, setting.stack) * batch_scale(setting.graph, degrees)
    if op.kind is OpKind.LOSS:
        logits = max((tensor.num_bytes for tensor in op.saved), default=0)
        share = activation_share(op.split, degrees, setting.stack) * batch_scale(setting.graph, degrees)
        wider = LOSS_BYTES / setting.graph.itemsize if _widens(setting) else 1.0
        return logits * setting.stack.memory.loss_copies * wider * share
    gradients = kept_bytes(
        [tensor for tensor in op.saved if not tensor.name.endswith(STATISTICS)],
        setting.graph, degrees, setting.stack,
    )  # fmt: skip
    whole = op.output_bytes * batch_scale(setting.graph, degrees) / np.asarray(degrees.cp, dtype=float)
    divided = (np.asarray(degrees.tp) > 1) & (op.split is Split.ROW)
    copies = np.where(degrees.sp, setting.stack.tensor.sequence_copies, 1)
    return op.output_bytes * share + gradients + whole * divided * copies
