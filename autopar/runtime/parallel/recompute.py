"""Recomputation: modules that keep their input alone and run forward again in backward.

Full recomputation covers blocks; selective recomputation the modules that ``recompute_parts`` names, a mapping from a
recompute module (of ``autopar.graph.RECOMPUTE_MODULES``) to patterns of module names:

- ``core_attn``: attention between its products, ``mlp``: a dense feed-forward part, ``moe``: a mixture of experts. Each
  keeps its input; what lies inside is freed.
- ``layernorm``: norms of the stream, ``moe_act``: activations of experts. Their results are freed as well, which the
  products behind them would keep (see ``autopar.runtime.parallel.remake``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar.errors import PlanError
from autopar.plan import Plan, Recompute
from autopar.runtime.parallel.parts import Parts
from autopar.runtime.parallel.remake import Remaking
from autopar.runtime.parallel.tensor_styles import matches
from autopar.runtime.private import has_dropout

THROWN = ("layernorm", "moe_act")


def recompute(chain: nn.Module, whole: nn.Module, parts: Parts, plan: Plan) -> tuple[nn.Module, ...]:
    """Let modules of a chain run again in backward as a plan says, and return them.

    Args:
        chain: a virtual stage, or the whole model.
        whole: the model, for what it declares.
        parts: of the whole.
        plan: tells which modules.

    Raises:
        PlanError: the model does not declare what the plan recomputes.
    """
    if plan.recompute is Recompute.NONE:
        return ()
    blocks = _blocks(chain, parts)
    if plan.recompute is Recompute.FULL:
        covered = blocks[: plan.recompute_layers or None]
    else:
        found = {tag: _declared(chain, whole, tag) for tag in plan.recomputed_modules}
        thrown = [module for tag in THROWN if tag in found for module in found.pop(tag)]
        # What lies in another recomputed module is covered by that.
        covered = _outermost([module for modules in found.values() for module in modules])
        if thrown:
            _remake(blocks, thrown, covered)
            return tuple(covered)
    for module in covered:
        module.forward = partial(  # type: ignore[method-assign]
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=has_dropout(module)
        )
    return tuple(covered)


def _blocks(chain: nn.Module, parts: Parts) -> list[nn.Module]:
    if not parts.blocks:
        raise PlanError(
            "recompute=full needs to know the model's blocks: declare pipeline_parts(), or use recompute none"
        )
    names = {name for name, _ in chain.named_modules()}
    return [chain.get_submodule(name) for name in parts.blocks if name in names]


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inside = {id(child) for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if id(module) not in inside]


def _remake(blocks: Iterable[nn.Module], thrown: Iterable[nn.Module], covered: Iterable[nn.Module]) -> None:
    inside = {id(child) for module in covered for child in module.modules()}
    thrown_ids = {id(module) for module in thrown} - inside
    covered_ids = {id(module) for module in covered}
    for block in blocks:
        children = list(block.modules())
        Remaking(
            block,
            [child for child in children if id(child) in thrown_ids],
            [(child, has_dropout(child)) for child in children if id(child) in covered_ids],
        )


def _declared(chain: nn.Module, whole: nn.Module, tag: str) -> list[nn.Module]:
    patterns = getattr(whole, "recompute_parts", {}).get(tag)
    if not patterns:
        raise PlanError(
            f"selective recomputation of '{tag}' needs to know where it is: declare recompute_parts on the model, a "
            f"mapping such as {{'{tag}': ('blocks.*.attention.sdpa',)}}, or use recompute none or full"
        )
    return [module for name, module in chain.named_modules() if any(matches(name, pattern) for pattern in patterns)]
