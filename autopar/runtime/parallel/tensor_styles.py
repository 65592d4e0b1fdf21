"""What a ``tensor_parallel_plan`` may say of modules, and whether it can be done.

Styles of a ``tensor_parallel_plan``:

- ``colwise``, ``rowwise``: a Linear divided by output or by input features.
- ``colwise-fused 64 32 32``: a Linear whose output features are several parts of such widths, one after another
  (queries, keys, values). Every rank has its share of each; the module splits what it sees in proportion.
- ``vocab``: a token embedding, or the Linear that makes the logits: divided along the vocabulary. The loss must then be
  ``torch.nn.functional.cross_entropy`` of the logits, as they are or flattened to [tokens, vocabulary].
- ``inner``, ``whole``: other modules with weights between or beside divided products, see above.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from autopar.errors import PlanError
from autopar.runtime.parallel.fused import FUSED, fused_widths
from autopar.runtime.parallel.vocabulary import VOCAB

COLWISE, ROWWISE, INNER, WHOLE = "colwise", "rowwise", "inner", "whole"
STYLES = (COLWISE, ROWWISE, FUSED, VOCAB, INNER, WHOLE)


def resolve_plan(module: nn.Module, declared: Mapping[str, str] | None, tp: int) -> dict[str, str]:
    """Module names of a whole model to styles.

    Args:
        module: the whole model.
        declared: name patterns (``*`` is one path component), or None for the module's own ``tensor_parallel_plan``.
        tp: tensor parallel ranks.

    Raises:
        PlanError: nothing is declared, a pattern matches nothing, a product is not a Linear that tp divides, or
            modules that share a weight have unlike styles.
    """
    patterns = declared if declared is not None else getattr(module, "tensor_parallel_plan", None)
    if not patterns:
        raise PlanError(
            f"tp={tp} needs to know which products to divide: pass tensor_parallel_plan={{'blocks.*.mlp.up': "
            "'colwise', 'blocks.*.mlp.down': 'rowwise', ...} or declare it on the module, or use tp=1"
        )
    found: dict[str, str] = {}
    for pattern, style in patterns.items():
        if kind_of(style) not in STYLES:
            raise PlanError(f"tensor_parallel_plan: '{pattern}' is '{style}'; it is one of {', '.join(STYLES)}")
        matching = [(name, child) for name, child in module.named_modules() if matches(name, pattern)]
        if not matching:
            raise PlanError(f"tensor_parallel_plan: the model has no module named '{pattern}'")
        for name, child in matching:
            found[name] = style
            if kind_of(style) not in (INNER, WHOLE):
                _check_product(name, style, child, tp)
    _check_shared(module, found)
    return found


def kind_of(style: str) -> str:
    """The style without the widths that may follow it."""
    return style.partition(" ")[0]


def _check_product(name: str, style: str, module: nn.Module, tp: int) -> None:
    if style == VOCAB and isinstance(module, nn.Embedding):
        return
    if not isinstance(module, nn.Linear):
        raise PlanError(f"tensor_parallel_plan: '{name}' is a {type(module).__name__}; only Linear can be divided")
    if style == VOCAB:
        return
    size = module.in_features if style == ROWWISE else module.out_features
    parts = fused_widths(style) or (size,)
    if sum(parts) != size:
        raise PlanError(f"tensor_parallel_plan: '{style}' adds up to {sum(parts)} of the {size} features of '{name}'")
    for part in parts:
        if part % tp:
            raise PlanError(f"tensor_parallel_plan: tp={tp} does not divide the {part} features of '{name}'")


def _check_shared(module: nn.Module, styles: Mapping[str, str]) -> None:
    for names in shared_names(module):
        found = {styles.get(name.rpartition(".")[0]) for name in names}
        if len(found) > 1:
            raise PlanError(
                f"tensor_parallel_plan: {' and '.join(names)} are one parameter, but divided unlike: declare both "
                "modules alike, for example as 'vocab'"
            )


def shared_names(module: nn.Module) -> list[list[str]]:
    """Names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern, in which ``*`` is one path component or a part of one."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
