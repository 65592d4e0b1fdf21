"""Models that ship with the program: ``presets/*.toml``, one file a family, a table a model."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from autopar.errors import InputError, nearest
from autopar.model.spec import ModelSpec
from costmodels.records import from_plain, read_toml


@cache
def _tables() -> dict[str, dict[str, Any]]:
    folder = resources.files("autopar.model") / "presets"
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".toml"):
            tables.update(read_toml(str(path)))
    return tables


def preset_names() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(sorted(_tables()))


def load_preset(name: str) -> ModelSpec:
    """Load a preset by name. Raises InputError with the nearest name."""
    if name not in _tables():
        raise InputError(f"unknown model '{name}'{nearest(name, preset_names())}")
    return from_plain(ModelSpec, {"name": name, **_tables()[name]}, f"preset {name}")
