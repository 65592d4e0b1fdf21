"""Operations of a dense feed-forward part: one or two products, the activation, and the product back.

Symbols as in ``autopar.model.build``.
"""

from __future__ import annotations

from autopar.graph import Op, OpKind, SavedTensor, Split
from autopar.model.layers.builder import Builder, kept

CLAMPED_PASSES = (22, 38)
"""Passes over an activation's output forward and backward where nothing is fused: two clamps (4), scaled sigmoid (4),
gate times sigmoid (3), one added (2), product (3), the biases of the product before (6); backward of each."""


def feed_forward(builder: Builder, prefix: str, block: int, source: str, *, width: int, module: str) -> str:
    """Add the part with inner ``width`` and return its last operation."""
    spec, h = builder.spec, builder.spec.hidden_size
    inputs: list[str] = []
    for name in ("gate", "up") if spec.gated_mlp else ("up",):
        keeps = None if inputs else Split.GATHERED
        inputs.append(
            builder.linear(
                f"{prefix}.{name}", block, width, h, Split.COLUMN, source, keeps=keeps, bias=spec.bias, module=module
            )
        )
    activated = activation(
        builder, f"{prefix}.act", block, inputs, size=builder.activation_bytes(width), split=Split.FEATURES,
        module=module,
    )  # fmt: skip
    return builder.linear(
        f"{prefix}.down", block, h, width, Split.ROW, activated, keeps=Split.FEATURES, bias=spec.bias, module=module
    )


def activation(
    builder: Builder, name: str, block: int, inputs: list[str], *, size: int, split: Split, module: str
) -> str:
    """Add the activation whose result has ``size`` bytes: GELU, or silu(gate) * up.

    Gated it takes silu (2 passes over the size) and the product (3); their backwards read and write 3 each, the
    product's twice. Eager PyTorch keeps silu's result between them.
    """
    gated = builder.spec.gated_mlp
    saved: tuple[SavedTensor, ...] = (kept(f"{name}.input", size * (2 if gated else 1), split),)
    if gated:
        saved += (kept(f"{name}.intermediate", size, split),)
    forward, backward = (5, 9) if gated else (2, 3)
    if gated and builder.spec.clamped_activation:
        forward, backward = CLAMPED_PASSES
    op = Op(
        name=name,
        kind=OpKind.ACTIVATION,
        block=block,
        split=split,
        forward_bytes=forward * size,
        backward_bytes=backward * size,
        saved=saved,
        output_bytes=size,
        output_split=split,
        module=module,
    )
    return builder.add(op, *inputs)
