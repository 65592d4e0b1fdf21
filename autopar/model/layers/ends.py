"""Operations before and after the blocks: embeddings, the head with its loss, and heads for tokens further ahead.

Symbols as in ``autopar.model.build``.
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.graph import Op, OpKind, Parameter, Split
from autopar.model.layers.builder import INDEX_BYTES, MASK_BYTES, STATISTIC_BYTES, Builder, kept
from autopar.model.spec import Position

EMBEDDING = "embedding.token.weight"
HEAD = "head.weight"


def embed(builder: Builder) -> str:
    """Add token and position embeddings and return the operation whose result enters the first block."""
    spec, h = builder.spec, builder.spec.hidden_size
    stream = _lookup(builder, "embedding.token", -1, shared=spec.tied_embeddings)
    if spec.position is Position.LEARNED:
        rows = builder.seq * h * builder.itemsize
        weight = "embedding.position.weight"
        position = builder.add(
            Op(
                name="embedding.position",
                kind=OpKind.EMBEDDING,
                block=-1,
                split=Split.NONE,
                forward_bytes=2 * rows,
                backward_bytes=2 * rows + spec.max_seq_len * h * builder.itemsize,
                parameters=(Parameter(name=weight, elements=spec.max_seq_len * h, split=Split.NONE),),
                saved=(kept("embedding.position.input", builder.seq * INDEX_BYTES, Split.NONE),),
                output_bytes=rows,
            )
        )
        stream = builder.residual("embedding.add", -1, stream, position, rows=rows)
    return _dropout(builder, "embedding.dropout", stream) if spec.dropout else stream


def _lookup(builder: Builder, name: str, block: int, *, shared: bool, shared_with: str | None = None) -> str:
    """A token embedding; ``shared`` if the gradient of its weight is a sum of two."""
    spec, h = builder.spec, builder.spec.hidden_size
    size, weight = builder.activation_bytes(h), spec.vocab_size * h * builder.itemsize
    parameter = Parameter(
        name=f"{name}.weight", elements=spec.vocab_size * h, split=Split.VOCAB, shared_with=shared_with
    )
    return builder.add(
        Op(
            name=name,
            kind=OpKind.EMBEDDING,
            block=block,
            split=Split.VOCAB,
            forward_bytes=2 * size,
            backward_bytes=2 * size + weight * (4 if shared else 1),
            parameters=(parameter,),
            saved=(kept(f"{name}.input", builder.tokens * INDEX_BYTES, Split.NONE),),
            output_bytes=size,
        )
    )


def _dropout(builder: Builder, name: str, stream: str) -> str:
    size = builder.activation_bytes(builder.spec.hidden_size)
    mask = builder.tokens * builder.spec.hidden_size * MASK_BYTES
    op = Op(
        name=name,
        kind=OpKind.ELEMENTWISE,
        block=-1,
        split=Split.TOKENS,
        forward_bytes=2 * size + mask,
        backward_bytes=2 * size + mask,
        saved=(kept(f"{name}.mask", mask, Split.TOKENS),),
        output_bytes=size,
    )
    return builder.add(op, stream)


def head(builder: Builder, stream: str) -> str:
    """Add the last norm, the LM head and the loss."""
    shared_with = EMBEDDING if builder.spec.tied_embeddings else None
    return _head(builder, "", stream, shared_with=shared_with)


def _head(builder: Builder, prefix: str, stream: str, *, shared_with: str | None) -> str:
    spec, end = builder.spec, builder.spec.num_layers
    normed = builder.stream_norm(f"{prefix}norm", end, stream, module="")
    logits = builder.linear(
        f"{prefix}head", end, spec.vocab_size, spec.hidden_size, Split.VOCAB, normed, keeps=Split.GATHERED, bias=False,
        shared_with=shared_with,
    )  # fmt: skip
    size = builder.tokens * spec.vocab_size * builder.itemsize
    loss = f"{prefix}loss"
    return builder.add(
        Op(
            name=loss,
            kind=OpKind.LOSS,
            block=end,
            split=Split.VOCAB,
            forward_bytes=3 * size,
            backward_bytes=3 * size,
            saved=(
                kept(f"{loss}.log_softmax", size, Split.VOCAB),
                kept(f"{loss}.target", builder.tokens * INDEX_BYTES + STATISTIC_BYTES, Split.NONE),
            ),
            output_bytes=STATISTIC_BYTES,
            output_split=Split.NONE,
        ),
        logits,
    )


def multi_token_head(
    builder: Builder, prefix: str, stream: str, transformer_block: Callable[[Builder, str, int, str], str]
) -> str:
    """Add a head that predicts one token further (DeepSeek-V3 2024, section 2.2) and return its block's result.

    The stream and the embedding of the next token are normalised, joined and projected from 2h to h; a block of its
    own follows, and the model's head once more. It belongs to the end of the model, after the last block, and
    shares the embedding and the head.
    """
    spec, h, end = builder.spec, builder.spec.hidden_size, builder.spec.num_layers
    token = _lookup(builder, f"{prefix}.embedding", end, shared=True, shared_with=EMBEDDING)
    streams = (
        builder.stream_norm(f"{prefix}.stream_norm", end, stream, module=""),
        builder.stream_norm(f"{prefix}.embedding_norm", end, token, module=""),
    )
    joined = builder.add(
        Op(
            name=f"{prefix}.join",
            kind=OpKind.ELEMENTWISE,
            block=end,
            split=Split.TOKENS,
            forward_bytes=4 * builder.activation_bytes(h),
            backward_bytes=4 * builder.activation_bytes(h),
            output_bytes=2 * builder.activation_bytes(h),
        ),
        *streams,
    )
    projected = builder.linear(
        f"{prefix}.project", end, h, 2 * h, Split.COLUMN, joined, keeps=Split.GATHERED, bias=False,
        output_split=Split.TOKENS,
    )  # fmt: skip
    result = transformer_block(builder, prefix, end, projected)
    _head(builder, f"{prefix}.", result, shared_with=EMBEDDING if spec.tied_embeddings else HEAD)
    return result
