"""Frozen dataclasses to and from JSON and TOML: unknown keys refused, types checked, files written whole.

Supports what the project's records use: int, float, str, bool, None, StrEnum, tuples, mappings with string
keys, unions of these, and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import tempfile
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from costmodels.errors import InputError, nearest

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """Turn records, tuples, enums and mappings into what ``json.dumps`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Record], data: Any, where: str) -> Record:
    """Build a record of type ``kind`` from plain data.

    Args:
        kind: the dataclass to build.
        data: a mapping as read from JSON or TOML.
        where: what the user knows the data as (a path, usually), for error messages.

    Raises:
        InputError: unknown or missing key, or a value of the wrong type.
    """
    return typing.cast(Record, _convert(kind, data, where))


def _convert(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _convert_union(kind, data, where)
    if origin is tuple:
        return _convert_tuple(kind, data, where)
    if origin is not None and issubclass(origin, Mapping):
        _, item_kind = typing.get_args(kind)
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: expected a table, found {data!r}")
        return {str(key): _convert(item_kind, item, f"{where}: {key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_record(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        options = [member.value for member in kind]
        if data not in options:
            raise InputError(f"{where}: unknown value {data!r}{nearest(str(data), map(str, options))}")
        return kind(data)
    return _convert_scalar(kind, data, where)


def _convert_union(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None and types.NoneType in options:
        return None
    failures: list[str] = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _convert(option, data, where)
        except InputError as error:
            failures.append(str(error))
    raise InputError(failures[-1])


def _convert_tuple(kind: Any, data: Any, where: str) -> Any:
    arguments: tuple[Any, ...] = typing.get_args(kind)
    if not isinstance(data, list | tuple):
        raise InputError(f"{where}: expected a list, found {data!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(data) != len(arguments):
        raise InputError(f"{where}: expected {len(arguments)} values, found {len(data)}")
    return tuple(_convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))


def _convert_record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a table of fields of {kind.__name__}, found {data!r}")
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in data:
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'{nearest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise InputError(f"{where}: key '{name}' is missing")
    return kind(**{key: _convert(hints[key], item, f"{where}: {key}") for key, item in data.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)
    if not isinstance(kind, type) or not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        name = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where}: expected {name}, found {data!r}")
    return data


def read_text(path: str | Path) -> str:
    """Read a file that the user named. Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError if the file is missing, torn or not an object."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "the file may be torn: write it again with the command that made it"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file. Raises InputError if it is missing or malformed."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole: readers see the old content or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, data: Any) -> None:
    """Write records or plain data as indented JSON, whole."""
    write_text(path, json.dumps(to_plain(data), indent=1) + "\n")


def read_record(kind: type[Record], path: str | Path, schema_version: int) -> Record:
    """Read a program-written JSON file with a ``schema_version`` beside the record's own fields."""
    data = read_json(path)
    found = data.pop("schema_version", None)
    if found != schema_version:
        raise InputError(
            f"{path}: schema_version is {found!r}, this program reads {schema_version}; "
            "write the file again with this version"
        )
    return from_plain(kind, data, str(path))


def write_record(path: str | Path, record: Any, schema_version: int) -> None:
    """Write a record with its ``schema_version`` first."""
    write_json(path, {"schema_version": schema_version, **to_plain(record)})
