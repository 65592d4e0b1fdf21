"""Specifications that ship with the program: ``specs/devices/*.toml`` and ``specs/stacks/*.toml``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, TypeVar, cast

from costmodels.errors import InputError, nearest
from costmodels.records import from_plain, read_toml

Record = TypeVar("Record")

SpecPath = tuple[str, ...]
"""Folder, specification and keys of one number: ("devices", "h100", "matmul", "peak_fraction")."""

_REPLACED: ContextVar[Mapping[SpecPath, float]] = ContextVar("replaced", default=MappingProxyType({}))


@contextmanager
def replaced(values: Mapping[SpecPath, float]) -> Iterator[None]:
    """Within the block specifications read as if these numbers stood in them; the files stay as they are.

    For fits, which try many values. Loaders that cache what they read must be called past their cache.
    """
    token = _REPLACED.set({**_REPLACED.get(), **values})
    try:
        yield
    finally:
        _REPLACED.reset(token)


@cache
def shipped_names(folder: str) -> tuple[str, ...]:
    """Names of the specifications in a folder of ``specs/``, sorted."""
    paths = (resources.files("costmodels") / "specs" / folder).iterdir()
    return tuple(sorted(path.name.removesuffix(".toml") for path in paths if path.name.endswith(".toml")))


def read_shipped(folder: str, name: str) -> dict[str, Any]:
    """Read one specification as plain data. Raises InputError with the nearest name."""
    if name not in shipped_names(folder):
        raise InputError(f"unknown {folder.removesuffix('s')} '{name}'{nearest(name, shipped_names(folder))}")
    data = copy.deepcopy(_parsed(folder, name))
    for (its_folder, its_name, *tables, key), value in _REPLACED.get().items():
        if (its_folder, its_name) == (folder, name):
            place = data
            for table in tables:
                place = place.setdefault(table, {})
            place[key] = value
    return data


@cache
def _parsed(folder: str, name: str) -> dict[str, Any]:
    return read_toml(str(resources.files("costmodels") / "specs" / folder / f"{name}.toml"))


def load_shipped(kind: type[Record], folder: str, name: str) -> Record:
    """Read one specification as a record. Raises InputError with the nearest name."""
    found = (_load if _REPLACED.get() else _load_once)(cast(Any, kind), folder, name)
    return cast(Record, found)


def _load(kind: Any, folder: str, name: str) -> Any:
    return from_plain(kind, read_shipped(folder, name), f"{folder.removesuffix('s')} {name}")


@cache
def _load_once(kind: Any, folder: str, name: str) -> Any:
    return _load(kind, folder, name)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, table by table: a specification on top of the one that it builds on."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
