"""The model that a user names: a preset, a Hugging Face config.json, or a model.toml."""

from __future__ import annotations

from pathlib import Path

from autopar.errors import InputError
from autopar.model.huggingface import load_config
from autopar.model.presets import load_preset
from autopar.model.spec import ModelSpec
from costmodels.records import from_plain, read_toml


def load_model(text: str) -> ModelSpec:
    """Load a model by preset name, by the path of a ``.json`` configuration (or its folder), or of a ``.toml``.

    A model.toml holds the fields of ModelSpec. Raises InputError for anything that cannot be read.
    """
    path = Path(text)
    if text.endswith(".json"):
        return load_config(path)
    if text.endswith(".toml"):
        return from_plain(ModelSpec, {"name": path.stem, **read_toml(path)}, text)
    if path.is_dir():
        return load_config(path / "config.json")
    if "/" in text:
        raise InputError(f"{text}: a model is a preset, a config.json (or its folder) or a .toml file")
    return load_preset(text)
