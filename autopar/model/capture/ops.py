"""From groups to operations: kind, shape, FLOPs, memory traffic, kept tensors, parameters.

Memory traffic follows the conventions that devices are calibrated with: a normalisation moves the tensors of its
input's size (statistics and weights are left out), an embedding moves its result twice and in backward also fills
the gradient of its whole weight, a cross entropy passes three times over the logits in each direction. Everything
else counts what its kernels read and write. Gradients that several users send to one tensor are added up; that
belongs to the tensor's producer. Products and attention are priced by shape and carry no traffic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopar.graph import AttentionShape, MatmulShape, OpKind, Parameter, Split
from autopar.model.capture.group import Group
from autopar.model.capture.kernels import RECURRENT
from autopar.model.capture.records import Kernel, Saved, Trace, TracedParameter

EMBEDDINGS = ("embedding", "embedding_bag", "embedding_renorm")
LOG_SOFTMAX = "log_softmax"
LOSSES = (
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "mse_loss", "nll_loss2d_forward",
    "nll_loss_forward", "smooth_l1_loss",
)  # fmt: skip
NORMALIZATIONS = (
    "batch_norm_with_update", "cudnn_batch_norm", "fused_rms_norm", "miopen_batch_norm", "native_batch_norm",
    "native_batch_norm_legit", "native_group_norm", "native_layer_norm",
)  # fmt: skip
NORM_FUNCTIONS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm")
ACTIVATIONS = (
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "mish",
    "prelu", "prelu_kernel", "relu", "rrelu_with_noise", "selu", "sigmoid", "silu", "softplus", "tanh", "threshold",
)  # fmt: skip
MEMORY_BOUND = (
    OpKind.NORMALIZATION, OpKind.ELEMENTWISE, OpKind.ACTIVATION, OpKind.EMBEDDING, OpKind.LOSS,
)  # fmt: skip


def kind_of(group: Group, class_name: str) -> OpKind:
    """What prices a group; ``class_name`` is that of its leaf module, empty elsewhere."""
    names = {kernel.name for kernel in group.forward}
    if not group.in_model:
        return OpKind.LOSS
    if attention_of(group) is not None:
        return OpKind.ATTENTION
    if any(kernel.flops for kernel in group.forward):
        return OpKind.MATMUL
    if names & set(EMBEDDINGS):
        return OpKind.EMBEDDING
    if names & set(LOSSES):
        return OpKind.LOSS
    if names & set(NORMALIZATIONS) or group.function in NORM_FUNCTIONS or class_name.lower().endswith("norm"):
        return OpKind.NORMALIZATION
    return OpKind.ACTIVATION if names & set(ACTIVATIONS) else OpKind.ELEMENTWISE


def attention_of(group: Group) -> AttentionShape | None:
    """Shape of the attention in a group of the model."""
    return next((call.attention for call in group.calls if call.attention is not None), None)


def shape_of(group: Group, kind: OpKind) -> MatmulShape | AttentionShape | None:
    """Shape of attention or of the largest product; several products count as one with more rows."""
    if kind is OpKind.ATTENTION:
        return attention_of(group)
    if kind is not OpKind.MATMUL:
        return None
    flops = sum(kernel.flops for kernel in group.forward)
    largest = max((k for k in group.forward if k.product is not None), key=lambda k: k.flops, default=None)
    if largest is None or largest.product is None:
        return MatmulShape(m=max(1, flops // 2), n=1, k=1)
    product = largest.product
    return MatmulShape(m=max(1, round(flops / (2 * product.n * product.k))), n=product.n, k=product.k)


def traffic(group: Group, kind: OpKind, parameters: Mapping[int, TracedParameter]) -> tuple[int, int]:
    """Bytes read and written in forward and backward, see the module's docstring."""
    if kind not in MEMORY_BOUND:
        return 0, 0
    forward, backward = _kernel_bytes(group.forward), _kernel_bytes(group.backward)
    logits = [k.writes[0].num_bytes for k in group.forward if k.name == LOG_SOFTMAX]
    if kind is OpKind.LOSS and logits:
        forward = backward = 3 * max(logits)
    elif kind is OpKind.EMBEDDING:
        forward = 2 * group.output_bytes
        weights = sum(use.num_bytes for use in group.reads if use.storage in parameters)
        backward = forward + weights if group.backward else 0
    elif kind is OpKind.NORMALIZATION:
        largest = max(math.prod(use.shape) for kernel in group.forward for use in kernel.reads)
        forward, backward = _kernel_bytes(group.forward, largest), _kernel_bytes(group.backward, largest)
    return forward, backward + group.accumulated


def _kernel_bytes(kernels: list[Kernel], elements: int | None = None) -> int:
    """Bytes of all tensors that kernels touch, or of those with so many elements."""
    return sum(
        use.num_bytes
        for kernel in kernels
        for use in kernel.reads + kernel.writes
        if elements is None or math.prod(use.shape) == elements
    )


def kept_name(group: Group, kind: OpKind, saved: Saved) -> str:
    """Role of a kept tensor, as the analytic graph calls it."""
    inside = saved.storage in group.writes
    if kind is OpKind.LOSS:
        normalized = {use.storage for k in group.forward if k.name == LOG_SOFTMAX for use in k.writes}
        return LOG_SOFTMAX if saved.storage in normalized else ("target" if not saved.floating or inside else "input")
    result = group.result
    is_result = result is not None and saved.storage == result.storage
    if kind is OpKind.ATTENTION:
        return "output" if is_result else ("logsumexp" if inside else "qkv")
    if kind is OpKind.NORMALIZATION:
        return "statistics" if inside else "input"
    return "output" if is_result else ("intermediate" if inside else "input")


def workspace_bytes(group: Group) -> int:
    """What a fused recurrent kernel keeps beside its inputs and results: the gates and two states of each step.

    Its size is hidden in the library and unknown for fake tensors. This is what the unfused computation keeps; oneDNN
    was seen to keep 2.6 times as much.
    """
    total = 0
    for kernel in group.forward:
        if kernel.name.startswith(RECURRENT) and kernel.product is not None:
            steps, result = math.prod(kernel.reads[0].shape[:2]), kernel.writes[0]
            width = kernel.product.n + 2 * result.shape[-1]
            total += steps * width * result.num_bytes // math.prod(result.shape)
    return total


def parameters_of(
    group: Group, trace: Trace, owned: dict[int, str], splits: Mapping[str, Split]
) -> tuple[Parameter, ...]:
    """Parameters that a group reads. ``owned`` maps storages to the names of first owners, and grows.

    ``splits`` gives the split by the last part of a name (``weight``, ``bias``), none where it has no entry.
    """
    read = {use.storage for use in group.reads}
    found = []
    for storage, parameter in trace.parameters.items():
        if storage not in read:
            continue
        own = (name for name in parameter.names if name.rpartition(".")[0] == group.module)
        name = next(own, parameter.names[0])
        found.append(
            Parameter(
                name=name,
                elements=math.prod(parameter.shape),
                split=splits.get(name.rpartition(".")[2], Split.NONE),
                shared_with=owned.get(storage),
            )
        )
        owned.setdefault(storage, name)
    return tuple(found)
