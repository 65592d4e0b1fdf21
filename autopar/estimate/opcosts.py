"""Seconds of one operation on one rank: its kind, its local shape, the device's rates and the stack's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopar.estimate.setting import Setting
from autopar.graph import AttentionShape, MatmulShape, Op, OpKind, Split
from autopar.shard import Degrees, activation_share, batch_scale, local_grouped_matmul, local_matmul
from costmodels.compute import attention_seconds, matmul_seconds, stream_seconds, unfused_attention_seconds

UNFUSED = "unfused"


def op_seconds(op: Op, setting: Setting, degrees: Degrees, number: int = 1) -> tuple[Any, Any]:
    """Seconds of forward and backward on one rank of ``number`` operations.

    Products and attention are equal ones; the bytes of memory-bound operations are those of all.
    """
    if op.kind is OpKind.GROUPED_MATMUL:
        forward, backward = _grouped_seconds(op, setting, degrees)
    elif op.kind is OpKind.MATMUL and isinstance(op.shape, MatmulShape):
        forward, backward = _matmul_seconds(op, setting, degrees)
    elif isinstance(op.shape, AttentionShape):
        forward, backward = _attention_seconds(op, setting, degrees)
    else:
        return _stream_seconds(op, setting, degrees, number)
    return number * forward, number * backward


def is_narrow(op: Op, setting: Setting) -> bool:
    """Whether this product multiplies in the narrow precision: linear layers of the blocks do, unless left wide."""
    return op.kind in (OpKind.MATMUL, OpKind.GROUPED_MATMUL) and op.split is not Split.VOCAB and not op.wide


def product_precision(op: Op, setting: Setting) -> str:
    """Type in which an operation multiplies."""
    precision = setting.workload.precision
    return (precision if is_narrow(op, setting) else precision.base).value


def quantize_seconds(op: Op, setting: Setting, inputs: Any, outputs: Any) -> tuple[Any, Any]:
    """Casting a product's input in forward and its output's gradient in backward; elements in, seconds out."""
    if product_precision(op, setting) == setting.workload.precision.base.value:
        return 0.0 * inputs, 0.0 * outputs
    each = setting.stack.kernels.quantize_bytes
    return _stream(setting, each * inputs, "quantize"), _stream(setting, each * outputs, "quantize", backward=True)


def _accumulation_bytes(setting: Setting) -> float:
    """Moved per weight where the product of the weight's gradient adds it to its sum: read and written."""
    return 2 * setting.gradient_bytes if setting.stack.kernels.fused_accumulation else 0.0


def _matmul_seconds(op: Op, setting: Setting, degrees: Degrees) -> tuple[Any, Any]:
    device, stack = setting.cluster.device, setting.stack
    m, n, k = local_matmul(op, setting.graph, degrees, stack)
    precision, rate = product_precision(op, setting), stack.kernels.matmul_rate
    forward = matmul_seconds(device, precision, m, n, k) / rate
    backward = (
        matmul_seconds(device, precision, m, n, k, backward=True, weight_gradient_bytes=_accumulation_bytes(setting))
        / rate
    )
    cast, cast_gradient = quantize_seconds(op, setting, m * k, m * n)
    divided = (np.asarray(degrees.tp) > 1) & (op.split in (Split.COLUMN, Split.ROW))
    calls = stack.overheads
    return (
        forward + cast + divided * calls.get("tensor_parallel.linear.forward", 0.0),
        backward + cast_gradient + divided * calls.get("tensor_parallel.linear.backward", 0.0),
    )


def _grouped_seconds(op: Op, setting: Setting, degrees: Degrees) -> tuple[Any, Any]:
    device, rate = setting.cluster.device, setting.stack.kernels.matmul_rate
    m, n, k, groups = local_grouped_matmul(op, setting.graph, degrees)
    precision, added = product_precision(op, setting), _accumulation_bytes(setting)
    forward = matmul_seconds(device, precision, m, n, k, groups=groups) / rate
    backward = (
        matmul_seconds(device, precision, m, n, k, backward=True, groups=groups, weight_gradient_bytes=added) / rate
    )
    cast, cast_gradient = quantize_seconds(op, setting, m * k, m * n)
    return forward + cast, backward + cast_gradient


def attention_kernel(setting: Setting) -> str | None:
    """The kernel that the stack uses on this device; None: what the device's profile measured."""
    wanted, known = setting.stack.kernels.attention, setting.cluster.device.attention_kernels
    return next((name for name in wanted if name == UNFUSED or name in known), None)


def local_attention(op: Op, setting: Setting, degrees: Degrees) -> dict[str, Any]:
    """Arguments of costmodels' attention on one rank."""
    shape = op.shape
    assert isinstance(shape, AttentionShape)
    return {
        "batch": shape.batch * batch_scale(setting.graph, degrees),
        "heads": shape.num_heads / np.asarray(degrees.tp, dtype=float),
        "query_len": shape.query_len / np.asarray(degrees.cp, dtype=float),
        "key_len": shape.key_len,
        "head_size": shape.head_size,
        "value_size": shape.value_size or None,
        "causal": shape.causal,
    }


def _softmax_fits(op: Op, setting: Setting, degrees: Degrees) -> Any:
    local = local_attention(op, setting, degrees)
    return np.asarray(local["batch"] * local["heads"] % setting.stack.kernels.softmax_heads == 0)


def launches(op: Op, setting: Setting, degrees: Degrees) -> Any:
    """Kernels that the host launches for an operation's forward, in units of a plain operation."""
    calls = setting.stack.host.calls
    number: Any = calls.get(op.kind.value, 1.0)
    if op.kind is OpKind.PERMUTE:
        number = number + np.where(np.asarray(degrees.tp) > 1, calls.get("permute tensor parallel", 0.0), 0.0)
    if isinstance(op.shape, AttentionShape) and attention_kernel(setting) == UNFUSED:
        number = number + np.where(_softmax_fits(op, setting, degrees), 0.0, calls.get("plain softmax", 0.0))
    return number


def _attention_seconds(op: Op, setting: Setting, degrees: Degrees) -> tuple[Any, Any]:
    device, precision, kernels = setting.cluster.device, setting.workload.precision.base.value, setting.stack.kernels
    shape, kernel = op.shape, attention_kernel(setting)
    assert isinstance(shape, AttentionShape)
    arguments = local_attention(op, setting, degrees)
    if kernel == UNFUSED:
        fits = _softmax_fits(op, setting, degrees)
        arguments |= {"dropout": shape.dropout}

        def unfused(backward: bool) -> Any:
            fused = unfused_attention_seconds(
                device, precision, **arguments, fused_softmax=kernels.fused_softmax, backward=backward
            )
            if fits.all():
                return fused
            plain = unfused_attention_seconds(device, precision, **arguments, fused_softmax=False, backward=backward)
            return np.where(fits, fused, plain)

        return unfused(False) / kernels.attention_rate, unfused(True) / kernels.attention_rate

    def fused(backward: bool) -> Any:
        found = attention_seconds(device, precision, **arguments, kernel=kernel, window=shape.window, backward=backward)
        return found / kernels.attention_rate

    return fused(False), fused(True)


def _stream(setting: Setting, num_bytes: Any, kind: str, *, backward: bool = False, ops: float = 1.0) -> Any:
    kernels = setting.stack.kernels
    moved = num_bytes * kernels.traffic.get(kind, kernels.traffic.get("default", 1.0)) / kernels.stream_rate
    return stream_seconds(setting.cluster.device, moved, kind, backward=backward, ops=ops)


def _stream_seconds(op: Op, setting: Setting, degrees: Degrees, number: int) -> tuple[Any, Any]:
    share = activation_share(op.split, degrees, setting.stack) * batch_scale(setting.graph, degrees)
    forward = _stream(setting, op.forward_bytes * share, op.kind.value, ops=number)
    if not op.backward_bytes:
        return forward, 0.0 * forward
    return forward, _stream(setting, op.backward_bytes * share, op.kind.value, backward=True, ops=number)
