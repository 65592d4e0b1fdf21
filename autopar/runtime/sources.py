"""Where a module comes from, and what cannot be done with it; told without importing torch.

A source is empty for the project's own transformer, the path of a Hugging Face ``config.json`` (or of its folder), or
``package.module:function`` for a function that builds the module.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from autopar.errors import InputError, nearest
from autopar.plan import Plan, Rejected
from costmodels.records import read_json

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
CLASSES = (*DECODERS, "gpt2", "bert")


def config_path(source: str) -> Path | None:
    """The config.json that a source names, or None for another source."""
    path = Path(source)
    if source.endswith(".json"):
        return path
    return path / "config.json" if source and ":" not in source else None


def model_type(path: Path) -> str:
    """The ``model_type`` of a config.json.

    Raises:
        InputError: its class is not supported, or transformers is not installed.
    """
    found = str(read_json(path).get("model_type"))
    if found not in CLASSES:
        raise InputError(f"{path}: model_type '{found}' cannot be run{nearest(found, CLASSES)}")
    if find_spec("transformers") is None:
        raise InputError(f"{path}: its class is in transformers, which is missing: pip install 'autopar[huggingface]'")
    return found


def unsupported_source(plan: Plan, source: str) -> list[Rejected]:
    """What a source's class cannot do, beside what no model of its numbers can. Raises InputError as ``model_type``."""
    path = config_path(source)
    if path is None:
        return []
    kind, layout, found = model_type(path), plan.layout, []

    def reject(reason: str, detail: str, **numbers: float) -> None:
        found.append(Rejected(reason=reason, detail=detail, numbers=numbers))

    if layout.cp > 1:
        reject(
            "source", f"cp={layout.cp}: attention in transformers sees one rank's tokens alone: use cp=1", cp=layout.cp
        )
    if plan.sequence_parallel:
        reject("source", "sp: attention in transformers takes positions that a divided stream has not: drop sp")
    for axis, degree in (("ep", layout.ep), ("etp", layout.etp)):
        if degree > 1:
            reject(
                "source", f"{axis}={degree}: experts in transformers stay on every rank: use {axis}=1, or source ''",
                **{axis: degree},
            )  # fmt: skip
    if layout.tp > 1 and kind == "gpt2":
        reject("source", f"tp={layout.tp}: GPT-2 in transformers has fused Conv1D products: use tp=1", tp=layout.tp)
    return found
