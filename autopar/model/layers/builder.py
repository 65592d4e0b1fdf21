"""Collects the operations of a graph; knows products, norms and sums, from which the parts of a block are made.

Symbols as in ``autopar.model.build``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autopar.graph import MatmulShape, Op, OpKind, Parameter, SavedTensor, Split
from autopar.model.spec import ModelSpec, Norm

INDEX_BYTES = 8
STATISTIC_BYTES = 4
MASK_BYTES = 1


@dataclass(kw_only=True, slots=True)
class Builder:
    """Operations and edges so far. Each method adds an operation and returns its name.

    Attributes:
        spec: the model.
        batch, seq: sequences, and tokens of each.
        itemsize: bytes of an activation element.
    """

    spec: ModelSpec
    batch: int
    seq: int
    itemsize: int
    ops: list[Op] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """T = b s."""
        return self.batch * self.seq

    def activation_bytes(self, width: int) -> int:
        """Bytes of [T, width]."""
        return self.tokens * width * self.itemsize

    def add(self, op: Op, *inputs: str) -> str:
        """Add an operation that reads the results of ``inputs``."""
        self.ops.append(op)
        self.edges.extend((producer, op.name) for producer in inputs)
        return op.name

    def linear(
        self,
        name: str,
        block: int,
        n: int,
        k: int,
        split: Split,
        source: str,
        *,
        keeps: Split | None,
        bias: bool,
        module: str = "",
        output_split: Split | None = None,
        shared_with: str | None = None,
    ) -> str:
        """A product [T, k] x [k, n].

        Args:
            name, block, split, module: as of Op.
            n, k: output and input features.
            source: operation whose result it reads.
            keeps: split of the input that it keeps, None if an operation before keeps it.
            bias: whether it adds one.
            output_split: None means what follows from ``split``.
            shared_with: the parameter whose storage its weight uses.
        """
        weight_split = split if split in (Split.COLUMN, Split.ROW, Split.VOCAB) else Split.NONE
        parameters = [Parameter(name=f"{name}.weight", elements=n * k, split=weight_split, shared_with=shared_with)]
        if bias:
            bias_split = Split.NONE if split is Split.ROW else weight_split
            parameters.append(Parameter(name=f"{name}.bias", elements=n, split=bias_split))
        saved = () if keeps is None else (kept(f"{name}.input", self.activation_bytes(k), keeps),)
        flops = 2 * self.tokens * n * k
        op = Op(
            name=name,
            kind=OpKind.MATMUL,
            block=block,
            split=split,
            shape=MatmulShape(m=self.tokens, n=n, k=k),
            forward_flops=flops,
            backward_flops=2 * flops,
            parameters=tuple(parameters),
            saved=saved,
            output_bytes=self.activation_bytes(n),
            output_split=output_split
            or {Split.COLUMN: Split.FEATURES, Split.VOCAB: Split.VOCAB}.get(split, Split.TOKENS),
            module=module,
        )
        return self.add(op, source)

    def stream_norm(self, name: str, block: int, source: str, *, module: str = "layernorm") -> str:
        """Normalisation of the residual stream."""
        h = self.spec.hidden_size
        return self.normalization(
            name, block, (source,), width=h, weights=h, rows=1, split=Split.TOKENS, centred=None, module=module
        )

    def normalization(
        self,
        name: str,
        block: int,
        sources: tuple[str, ...],
        *,
        width: int,
        weights: int,
        rows: int,
        split: Split,
        centred: bool | None = False,
        storage: int | None = None,
        module: str = "",
    ) -> str:
        """Normalisation of [T, width] in ``rows`` parts of each token.

        Args:
            name, block, split, module: as of Op.
            sources: operations whose results it reads.
            width: features of a token.
            weights: elements of the weight.
            rows: parts of a token that are normalised by themselves, each with its statistics.
            centred: subtracts the mean and adds a bias; None means as the model's norm.
            storage: width of the storage that its input is a view of; None means ``width``.
        """
        if centred is None:
            centred = self.spec.norm is Norm.LAYERNORM
        parameters = [Parameter(name=f"{name}.weight", elements=weights, split=Split.NONE)]
        if centred:
            parameters.append(Parameter(name=f"{name}.bias", elements=weights, split=Split.NONE))
        statistics = self.tokens * rows * STATISTIC_BYTES * (2 if centred else 1)
        op = Op(
            name=name,
            kind=OpKind.NORMALIZATION,
            block=block,
            split=split,
            forward_bytes=2 * self.activation_bytes(width),
            backward_bytes=3 * self.activation_bytes(width),
            parameters=tuple(parameters),
            saved=(
                kept(f"{name}.input", self.activation_bytes(width if storage is None else storage), split),
                kept(f"{name}.statistics", statistics, split),
            ),
            output_bytes=self.activation_bytes(width),
            output_split=split,
            module=module,
        )
        return self.add(op, *sources)

    def residual(
        self,
        name: str,
        block: int,
        left: str,
        right: str,
        *,
        rows: int | None = None,
        dropout: bool = False,
        module: str = "",
    ) -> str:
        """A sum of two streams, the right one dropped out before if ``dropout``.

        ``rows`` are the bytes of a right side without a batch, whose gradient backward sums over it. Dropout in the
        same kernel writes and keeps a mask of one byte an element; backward reads it and the gradient and writes the
        gradient of the right side.
        """
        size = self.activation_bytes(self.spec.hidden_size)
        mask = self.tokens * self.spec.hidden_size * MASK_BYTES if dropout else 0
        op = Op(
            name=name,
            kind=OpKind.ELEMENTWISE,
            block=block,
            split=Split.TOKENS,
            forward_bytes=2 * size + (size if rows is None else rows) + mask,
            backward_bytes=(0 if rows is None else size + rows) + (2 * size + mask if dropout else 0),
            saved=(kept(f"{name}.mask", mask, Split.TOKENS),) if dropout else (),
            output_bytes=size,
            module=module,
        )
        return self.add(op, left, right)


def kept(name: str, num_bytes: int, split: Split) -> SavedTensor:
    """A tensor kept for backward; ``tags.with_makers`` says later what made it."""
    return SavedTensor(name=name, num_bytes=num_bytes, split=split)
