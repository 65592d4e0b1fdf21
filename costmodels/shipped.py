"""Specifications that ship with the program: ``specs/devices/*.toml`` and ``specs/stacks/*.toml``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TypeVar

from costmodels.errors import InputError, nearest
from costmodels.records import from_plain, read_toml

Record = TypeVar("Record")


@cache
def shipped_names(folder: str) -> tuple[str, ...]:
    """Names of the specifications in a folder of ``specs/``, sorted."""
    paths = (resources.files("costmodels") / "specs" / folder).iterdir()
    return tuple(sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml")))


def load_shipped(kind: type[Record], folder: str, name: str) -> Record:
    """Read one specification as a record. Raises InputError with the nearest name."""
    what = folder.removesuffix("s")
    if name not in shipped_names(folder):
        raise InputError(f"unknown {what} '{name}'{nearest(name, shipped_names(folder))}")
    path = resources.files("costmodels") / "specs" / folder / f"{name}.toml"
    return from_plain(kind, read_toml(str(path)), f"{what} {name}")
