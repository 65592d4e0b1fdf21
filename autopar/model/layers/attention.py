"""Operations of attention: with query, key and value products, or with latents (DeepSeek-V2 2024, section 2.1).

Symbols as in ``autopar.model.build``.
"""

from __future__ import annotations

from autopar.graph import AttentionShape, Op, OpKind, Split
from autopar.model.layers.builder import STATISTIC_BYTES, Builder, kept
from autopar.model.spec import Latent, Position

LATENT_MODULE = "mla_up_proj"


def attention(builder: Builder, prefix: str, block: int, source: str) -> str:
    """Add the attention of a block and return its last operation."""
    if builder.spec.latent is not None:
        return _latent_attention(builder, builder.spec.latent, prefix, block, source)
    spec, bias = builder.spec, builder.spec.bias
    query_width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    products = (
        {"qkv": query_width + 2 * kv_width}
        if spec.fused_qkv
        else {"query": query_width, "key": kv_width, "value": kv_width}
    )
    inputs: list[str] = []
    for name, width in products.items():
        keeps = None if inputs else Split.GATHERED
        inputs.append(
            builder.linear(
                f"{prefix}.{name}", block, width, spec.hidden_size, Split.COLUMN, source, keeps=keeps, bias=bias
            )
        )
    changed = False
    if spec.qk_norm:
        inputs = [inputs[-1], _query_key_norm(builder, f"{prefix}.qk_norm", block, inputs)]
        changed = True
    if spec.position is Position.ROTARY:
        value, rotated = inputs[-1], inputs[:-1]
        if changed:
            value, rotated = inputs[0], inputs[1:]
        inputs = [value, _rotary(builder, f"{prefix}.rotary", block, query_width + kv_width, rotated or [value])]
        changed = True
    kept_width = query_width + 2 * kv_width
    if spec.fused_qkv and changed and not spec.qk_norm:
        # The value is a view of the fused product, whose whole storage stays beside the changed query and key.
        kept_width += query_width + kv_width
    elif spec.fused_qkv and spec.qk_norm:
        # The norm has kept that storage already.
        kept_width = query_width + kv_width
    core = _core(
        builder, f"{prefix}.sdpa", block, inputs, kept_width=kept_width, num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size, value_size=spec.head_size,
    )  # fmt: skip
    return builder.linear(
        f"{prefix}.output", block, spec.hidden_size, query_width, Split.ROW, core, keeps=None, bias=bias
    )


def _query_key_norm(builder: Builder, name: str, block: int, products: list[str]) -> str:
    """Normalise every head of queries and keys by itself; one weight of a head's size each."""
    spec = builder.spec
    width = (spec.num_heads + spec.num_kv_heads) * spec.head_size
    return builder.normalization(
        name, block, tuple(products[:2]), width=width, weights=2 * spec.head_size,
        rows=spec.num_heads + spec.num_kv_heads, split=Split.FEATURES,
        storage=width + spec.num_kv_heads * spec.head_size if spec.fused_qkv else None,
    )  # fmt: skip


def _rotary(builder: Builder, name: str, block: int, width: int, inputs: list[str]) -> str:
    return _reshaping(builder, name, block, inputs, read=width, written=width, module="")


def _reshaping(
    builder: Builder, name: str, block: int, inputs: list[str], *, read: int, written: int, module: str
) -> str:
    """An elementwise operation that reads and writes so many features of a token; its backward the other way."""
    op = Op(
        name=name,
        kind=OpKind.ELEMENTWISE,
        block=block,
        split=Split.FEATURES,
        forward_bytes=builder.activation_bytes(read + written),
        backward_bytes=builder.activation_bytes(read + written),
        output_bytes=builder.activation_bytes(written),
        output_split=Split.FEATURES,
        module=module,
    )
    return builder.add(op, *inputs)


def _core(
    builder: Builder,
    name: str,
    block: int,
    inputs: list[str],
    *,
    kept_width: int,
    num_kv_heads: int,
    head_size: int,
    value_size: int,
) -> str:
    """Fused attention: scores and the weighted sum, 2 T s a (d + d_v) FLOPs.

    Backward computes the scores again and has four products more (Dao et al. 2022, algorithm 4): three over d and two
    over d_v.
    """
    spec = builder.spec
    product = 2 * builder.tokens * builder.seq * spec.num_heads
    window = spec.window if block % 2 == 0 and spec.window < builder.seq else 0
    out = builder.activation_bytes(spec.num_heads * value_size)
    op = Op(
        name=name,
        kind=OpKind.ATTENTION,
        block=block,
        split=Split.FEATURES,
        shape=AttentionShape(
            batch=builder.batch,
            num_heads=spec.num_heads,
            num_kv_heads=num_kv_heads,
            query_len=builder.seq,
            key_len=builder.seq,
            head_size=head_size,
            causal=spec.causal,
            value_size=value_size if value_size != head_size else 0,
            window=window,
            dropout=spec.dropout,
        ),
        forward_flops=product * (head_size + value_size),
        backward_flops=product * (3 * head_size + 2 * value_size),
        saved=(
            kept(f"{name}.qkv", builder.activation_bytes(kept_width), Split.FEATURES),
            kept(f"{name}.output", out, Split.FEATURES),
            kept(f"{name}.logsumexp", builder.tokens * spec.num_heads * STATISTIC_BYTES, Split.FEATURES),
        ),
        output_bytes=out,
        output_split=Split.FEATURES,
        module="core_attn",
    )
    return builder.add(op, *inputs)


def _latent_attention(builder: Builder, latent: Latent, prefix: str, block: int, source: str) -> str:
    """Queries from a latent of q_rank, keys and values from one of kv_rank, the key's rotary part beside it.

    The products to the latents are whole on every tensor parallel rank (as in Megatron-Core), those from them divided
    by heads. Keys are written out for every head before attention.
    """
    spec, a, h = builder.spec, builder.spec.num_heads, builder.spec.hidden_size
    size = latent.nope_size + latent.rope_size
    up = Split.COLUMN

    def normed(name: str, product: str, width: int, storage: int) -> str:
        return builder.normalization(
            f"{prefix}.{name}", block, (product,), width=width, weights=width, rows=1, split=Split.TOKENS,
            storage=storage, module=LATENT_MODULE,
        )  # fmt: skip

    if latent.q_rank:
        down = builder.linear(
            f"{prefix}.query_down", block, latent.q_rank, h, Split.TOKENS, source, keeps=Split.TOKENS, bias=False
        )
        from_latent = normed("query_norm", down, latent.q_rank, latent.q_rank)
        query = builder.linear(
            f"{prefix}.query_up", block, a * size, latent.q_rank, up, from_latent, keeps=Split.GATHERED, bias=False,
            module=LATENT_MODULE,
        )  # fmt: skip
    else:
        query = builder.linear(
            f"{prefix}.query", block, a * size, h, up, source, keeps=Split.GATHERED, bias=False, module=LATENT_MODULE
        )
    narrow = latent.kv_rank + latent.rope_size
    down = builder.linear(f"{prefix}.kv_down", block, narrow, h, Split.TOKENS, source, keeps=None, bias=False)
    from_latent = normed("kv_norm", down, latent.kv_rank, narrow)
    key_value = builder.linear(
        f"{prefix}.kv_up", block, a * (latent.nope_size + latent.value_size), latent.kv_rank, up, from_latent,
        keeps=Split.GATHERED, bias=False, module=LATENT_MODULE,
    )  # fmt: skip
    rotated = _reshaping(
        builder, f"{prefix}.rotary", block, [query, down, key_value], read=a * size + latent.rope_size,
        written=a * (latent.rope_size + size), module=LATENT_MODULE,
    )  # fmt: skip
    core = _core(
        builder, f"{prefix}.sdpa", block, [key_value, rotated], kept_width=a * (2 * size + latent.value_size),
        num_kv_heads=a, head_size=size, value_size=latent.value_size,
    )  # fmt: skip
    return builder.linear(
        f"{prefix}.output", block, h, a * latent.value_size, Split.ROW, core, keeps=None, bias=spec.bias
    )
