"""Operations of a mixture of experts: router, dispatch, the experts' products, combine, and the shared expert.

Symbols as in ``autopar.model.build``; R = T k rows are routed. Tokens are assumed to spread evenly over the experts.
The shared expert comes first, as its input is the router's too. What is kept: the router's scores, the order of the
rows, the rows themselves (input of the first product), what the activation needs, and the experts' results, which the
gradient of the routing weights needs.
"""

from __future__ import annotations

from autopar.graph import MatmulShape, Op, OpKind, Parameter, SavedTensor, Split
from autopar.model.layers.builder import Builder, kept
from autopar.model.layers.feed_forward import activation, feed_forward

ROUTER_BYTES = 4
ROW_INDEX_BYTES = 4
MODULE = "moe"


def mixture_of_experts(builder: Builder, prefix: str, block: int, source: str) -> str:
    """Add the experts of a block and return their last operation."""
    spec, h, f = builder.spec, builder.spec.hidden_size, builder.spec.expert_ffn_size
    shared = None
    if spec.shared_ffn_size:
        shared = feed_forward(builder, f"{prefix}.shared", block, source, width=spec.shared_ffn_size, module=MODULE)
    routed = _router(builder, f"{prefix}.router", block, source, keeps_input=shared is None)
    rows = _permute(builder, f"{prefix}.dispatch", block, [source, routed], combine=False)
    inner = _grouped(builder, f"{prefix}.up", block, f * (2 if spec.gated_mlp else 1), h, Split.EXPERT_COLUMN, rows)
    activated = activation(
        builder, f"{prefix}.act", block, [inner], size=spec.top_k * builder.activation_bytes(f),
        split=Split.EXPERT_FEATURES, module="moe_act",
    )  # fmt: skip
    outer = _grouped(builder, f"{prefix}.down", block, h, f, Split.EXPERT_ROW, activated)
    combined = _permute(builder, f"{prefix}.combine", block, [outer, routed], combine=True)
    if shared is None:
        return combined
    return builder.residual(f"{prefix}.add", block, combined, shared, module=MODULE)


def _router(builder: Builder, name: str, block: int, source: str, *, keeps_input: bool) -> str:
    """Scores of all experts in fp32, softmax or sigmoid over them, and the k best of each token.

    Passes over the T x E scores: forward writes the product, reads and writes the softmax, reads it for the choice
    and writes a map of the chosen; backward reads and writes the gradients of both.
    """
    spec, scores = builder.spec, builder.tokens * builder.spec.num_experts
    stream = builder.activation_bytes(spec.hidden_size)
    flops = 2 * scores * spec.hidden_size
    parameters = [Parameter(name=f"{name}.weight", elements=spec.num_experts * spec.hidden_size, split=Split.NONE)]
    if spec.bias:
        parameters.append(Parameter(name=f"{name}.bias", elements=spec.num_experts, split=Split.NONE))
    op = Op(
        name=name,
        kind=OpKind.ROUTER,
        block=block,
        split=Split.TOKENS,
        shape=MatmulShape(m=builder.tokens, n=spec.num_experts, k=spec.hidden_size),
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_bytes=stream + (4 * ROUTER_BYTES + 1) * scores,
        backward_bytes=2 * stream + 4 * ROUTER_BYTES * scores,
        parameters=tuple(parameters),
        saved=(
            *((kept(f"{name}.input", stream, Split.TOKENS),) if keeps_input else ()),
            kept(f"{name}.scores", ROUTER_BYTES * scores, Split.TOKENS),
            kept(f"{name}.map", scores, Split.TOKENS),
        ),
        output_bytes=builder.tokens * spec.top_k * ROUTER_BYTES,
        module=MODULE,
    )
    return builder.add(op, source)


def _permute(builder: Builder, name: str, block: int, inputs: list[str], *, combine: bool) -> str:
    """Bring tokens into the order of their experts (R rows from T), or back (each token a weighted sum of k rows).

    A token is read once for each of its rows. The way back is the backward of the way there; combining also has the
    gradient of the weights, which reads the rows and the token's gradient.
    """
    spec = builder.spec
    token = builder.activation_bytes(spec.hidden_size)
    row = spec.top_k * token
    indices = builder.tokens * spec.top_k
    if combine:
        forward, backward, output, output_split = row + token, 3 * row, token, Split.TOKENS
        saved: tuple[SavedTensor, ...] = (
            kept(f"{name}.input", row, Split.EXPERT_TOKENS),
            kept(f"{name}.weights", ROUTER_BYTES * indices, Split.TOKENS),
        )
    else:
        forward, backward, output, output_split = 2 * row, row + token, row, Split.EXPERT_TOKENS
        saved = (kept(f"{name}.order", ROW_INDEX_BYTES * indices, Split.EXPERT_TOKENS),)
    op = Op(
        name=name,
        kind=OpKind.PERMUTE,
        block=block,
        split=Split.EXPERT_TOKENS,
        forward_bytes=forward,
        backward_bytes=backward,
        saved=saved,
        output_bytes=output,
        output_split=output_split,
        module=MODULE,
    )
    return builder.add(op, *inputs)


def _grouped(builder: Builder, name: str, block: int, n: int, k: int, split: Split, source: str) -> str:
    """Products [R / E, k] x [k, n], one for each expert; gate and up are one product of twice the width."""
    spec = builder.spec
    rows = builder.tokens * spec.top_k
    column = split is Split.EXPERT_COLUMN
    inside, outside = Split.EXPERT_FEATURES, Split.EXPERT_TOKENS
    parameters = [Parameter(name=f"{name}.weight", elements=spec.num_experts * n * k, split=split)]
    if spec.bias:
        parameters.append(Parameter(name=f"{name}.bias", elements=spec.num_experts * n, split=split))
    flops = 2 * rows * n * k
    op = Op(
        name=name,
        kind=OpKind.GROUPED_MATMUL,
        block=block,
        split=split,
        shape=MatmulShape(m=rows, n=n, k=k, groups=spec.num_experts),
        forward_flops=flops,
        backward_flops=2 * flops,
        parameters=tuple(parameters),
        saved=(kept(f"{name}.input", rows * k * builder.itemsize, outside if column else inside),),
        output_bytes=rows * n * builder.itemsize,
        output_split=inside if column else outside,
        module=MODULE,
    )
    return builder.add(op, source)
