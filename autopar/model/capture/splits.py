"""How tensor parallelism divides captured operations, from a plan of column- and row-wise products.

A plan maps patterns of module paths (``*`` is one path component) to the styles of
``autopar.runtime.parallel.tensor_styles``. Only column- and row-wise products count here: the vocabulary is found
without being told, and modules between products follow from these. Without a plan products, embeddings and the loss are
whole (NONE) and everything between them is TOKENS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopar.errors import InputError, nearest
from autopar.graph import OpKind, Split

STYLES = ("colwise", "rowwise")
FUSED = "colwise-fused"
OTHERS = ("vocab", "inner", "whole")


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """Split of an operation, of its result, of the input that it keeps, and of its parameters by kind."""

    op: Split
    output: Split
    kept_input: Split
    parameters: Mapping[str, Split]


def planned_styles(plan: Mapping[str, str], products: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Style by module path of each product that the plan names.

    Args:
        plan: patterns and styles.
        products: paths of modules that are matrix products.
        others: every other path, for messages.

    Raises:
        InputError: an unknown style, or a pattern that names no product.
    """
    products, others = list(products), list(others)
    styles: dict[str, str] = {}
    for pattern, text in plan.items():
        style = text.partition(" ")[0]
        if style in OTHERS:
            continue
        style = "colwise" if style == FUSED else style
        if style not in STYLES:
            raise InputError(f"tensor parallel plan: '{pattern}' is '{style}'{nearest(style, STYLES)}")
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [path for path in products if expression.fullmatch(path)]
        if not found:
            wrong = next((path for path in others if expression.fullmatch(path)), None)
            paths = [path for path in products if path]
            known = nearest(pattern, paths) if paths else "; the model has no product in a module of its own"
            detail = f"'{wrong}' is no matrix product" if wrong else f"no module has that path{known}"
            raise InputError(f"tensor parallel plan: '{pattern}': {detail}")
        styles.update(dict.fromkeys(found, style))
    return styles


def divide(
    kind: OpKind, style: str | None, *, vocabulary: bool, has_parameters: bool, inputs: Iterable[Split]
) -> Division:
    """How an operation is divided.

    Args:
        kind: of the operation.
        style: from the plan, None if it is not named.
        vocabulary: it is the embedding of tokens, the head that predicts them, or the loss over them.
        has_parameters: it has weights.
        inputs: output splits of its producers.
    """
    inputs = set(inputs)
    carried = Split.FEATURES if Split.FEATURES in inputs else Split.TOKENS
    if style == "colwise":
        columns = {"weight": Split.COLUMN, "bias": Split.COLUMN}
        return Division(op=Split.COLUMN, output=Split.FEATURES, kept_input=Split.GATHERED, parameters=columns)
    if style == "rowwise":
        return Division(op=Split.ROW, output=Split.TOKENS, kept_input=carried, parameters={"weight": Split.ROW})
    weights = {"weight": Split.VOCAB, "bias": Split.VOCAB} if vocabulary else {}
    if kind is OpKind.LOSS:
        return Division(
            op=Split.VOCAB if vocabulary else Split.NONE,
            output=Split.NONE,
            kept_input=Split.VOCAB if vocabulary else Split.TOKENS,
            parameters={},
        )
    if kind is OpKind.EMBEDDING:
        split = Split.VOCAB if vocabulary else Split.NONE
        return Division(op=split, output=Split.TOKENS, kept_input=Split.NONE, parameters=weights)
    if kind is OpKind.MATMUL and vocabulary:
        return Division(op=Split.VOCAB, output=Split.VOCAB, kept_input=Split.GATHERED, parameters=weights)
    if kind is OpKind.MATMUL and (has_parameters or carried is Split.TOKENS):
        return Division(op=Split.NONE, output=Split.TOKENS, kept_input=carried, parameters={})
    return Division(op=carried, output=carried, kept_input=carried, parameters={})
