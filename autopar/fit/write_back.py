"""Write values into specification files without touching the rest: comments, order and layout stay.

Understands what the specifications use: tables under ``[headers]``, ``key = number`` lines, and numbers in inline
tables (``matmul = { peak_fraction = 0.8 }``). A key that is missing is added at the end of its table, a table that is
missing at the end of the file.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from autopar.errors import InputError
from autopar.fit.constants import Constant, Quantity
from autopar.fit.errors import error_of_constant, sources_of
from autopar.fit.fitting import FitResult
from autopar.fit.leave_out import LeftOut
from costmodels.records import read_text, write_text

_HEADER = re.compile(r"^\s*\[(?P<name>[^\[\]]+)\]\s*(#.*)?$")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def set_value(text: str, keys: Sequence[str], value: float | str) -> str:
    """Return TOML text with the value at ``keys`` replaced or added. Raises InputError where text is no such TOML."""
    written = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    lines = text.splitlines()
    changed = _replace(lines, tuple(keys), written)
    result = "\n".join(changed) + "\n"
    place: object = tomllib.loads(result)
    for key in keys:
        place = place[key] if isinstance(place, dict) and key in place else None
    if place != value:
        raise InputError(f"cannot write {'.'.join(keys)} = {written}: the file holds it in an unusual form")
    return result


def _replace(lines: list[str], keys: tuple[str, ...], written: str) -> list[str]:
    for depth in range(len(keys) - 1, -1, -1):
        table, rest = keys[:depth], keys[depth:]
        for start, end in _tables(lines, table):
            for number in range(start, end):
                changed = _in_line(lines[number], rest, written)
                if changed is not None:
                    return [*lines[:number], changed, *lines[number + 1 :]]
    return _add(lines, keys, written)


def _in_line(line: str, keys: tuple[str, ...], written: str) -> str | None:
    """The line with the value of ``keys`` replaced: dotted keys, then inline tables; None if it does not hold them."""
    for count in range(len(keys), 0, -1):
        head = r"\s*\.\s*".join(_pattern(key) for key in keys[:count])
        found = re.match(rf"^(\s*{head}\s*=\s*)(.*)$", line)
        if not found:
            continue
        if count == len(keys):
            return found[1] + _replaced_scalar(found[2], written)
        rest = found[2]
        inner = re.search(rf"([{{,]\s*{_pattern(keys[count])}\s*=\s*)([^,}}]+?)(\s*[,}}])", rest)
        if inner and count + 1 == len(keys):
            return found[1] + rest[: inner.start()] + inner[1] + written + inner[3] + rest[inner.end() :]
    return None


def _replaced_scalar(rest: str, written: str) -> str:
    scalar = re.match(r"""("(?:[^"\\]|\\.)*"|'[^']*'|[^#\s]+)(.*)$""", rest)
    return written + (scalar[2] if scalar else "")


def _pattern(key: str) -> str:
    quoted = re.escape(json.dumps(key))
    return rf"(?:{re.escape(key)}|{quoted})" if _BARE.fullmatch(key) else quoted


def _add(lines: list[str], keys: tuple[str, ...], written: str) -> list[str]:
    for depth in range(len(keys) - 1, -1, -1):
        spans = _tables(lines, keys[:depth])
        if not spans or (depth < len(keys) - 1 and depth > 0):
            continue
        if depth < len(keys) - 1:
            break
        start, end = spans[0]
        while end > start and not lines[end - 1].strip():
            end -= 1
        return [*lines[:end], f"{_name(keys[depth:])} = {written}", *lines[end:]]
    header = f"[{_name(keys[:-1])}]"
    origins = next((i for i, line in enumerate(lines) if re.fullmatch(r"\s*\[origins\]\s*", line)), len(lines))
    block = [header, f"{_name(keys[-1:])} = {written}", ""]
    before = lines[:origins]
    if before and before[-1].strip():
        before = [*before, ""]
    return [*before, *block, *lines[origins:]] if origins < len(lines) else [*before, *block[:-1]]


def _name(keys: Sequence[str]) -> str:
    return ".".join(key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False) for key in keys)


def _tables(lines: list[str], table: tuple[str, ...]) -> list[tuple[int, int]]:
    """Line ranges between the header of ``table`` and the next header; the top of the file for ()."""
    starts = [0] if not table else []
    ends = []
    headers = [(number, _header(line)) for number, line in enumerate(lines) if line.lstrip().startswith("[")]
    headers = [(number, keys) for number, keys in headers if keys is not None]
    starts += [number + 1 for number, keys in headers if keys == table and table]
    borders = sorted(number for number, _ in headers)
    for start in starts:
        ends.append(next((border for border in borders if border >= start), len(lines)))
    return list(zip(starts, ends, strict=True))


def _header(line: str) -> tuple[str, ...] | None:
    found = _HEADER.match(line)
    if not found:
        return ("",) if line.lstrip().startswith("[[") else None
    try:
        place: object = tomllib.loads(f"[{found['name']}]")
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(place, dict) and place:
        [(key, place)] = place.items()
        keys.append(key)
    return tuple(keys)


def origin_keys(text: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Where the origin of ``keys`` belongs: the deepest ``origins`` table above it, under what remains of the path."""
    data = tomllib.loads(text)
    for depth in range(len(keys) - 1, 0, -1):
        place: object = data
        for key in (*keys[:depth], "origins"):
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            return (*keys[:depth], "origins", ".".join(keys[depth:]))
    return ("origins", ".".join(keys))


def write_values(result: FitResult, left: LeftOut | None = None) -> tuple[Path, ...]:
    """Write fitted values and their origins into the shipped specifications; return the files that changed.

    A constant that no run moved stays as it is. ``left`` adds the error of runs that were left out.
    """
    texts: dict[Path, str] = {}
    for constant in result.constants:
        if not result.rows_of(constant):
            continue
        value = float(f"{result.values[constant.name]:.4g}")
        origin = origin_text(result, constant, left)
        for folder, name, *keys in constant.paths:
            path = Path(str(resources.files("costmodels"))) / "specs" / folder / f"{name}.toml"
            text = texts.get(path) or read_text(path)
            text = set_value(text, keys, value)
            texts[path] = set_value(text, origin_keys(text, keys), origin)
    for path, text in texts.items():
        write_text(path, text)
    return tuple(texts)


def origin_text(result: FitResult, constant: Constant, left: LeftOut | None) -> str:
    """The sentence that stands beside a fitted value."""
    what = "step times" if constant.quantity is Quantity.TIME else "memory"
    rows, sources = len(result.rows_of(constant)), ", ".join(sources_of(result, constant))
    error = ""
    if left is not None:
        error = f"; model left out: error {error_of_constant(result, constant, left.residuals).mape:.1f}%"
    return f"fitted on {what} of {rows} runs of {sources}{error}"
