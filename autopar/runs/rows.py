"""Measured runs as rows of a CSV file (``runs.csv``): one row, one run.

An empty cell is None. Columns that are missing are empty, columns that are not known are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autopar.errors import InputError, nearest

REQUIRED = ("id", "model_name", "gpu", "n_gpus")
EMPTY = ("", "nan", "none", "null", "n/a", "-")
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One row; a field is a column of the same name.

    Attributes:
        id: unique name, ``source-001``.
        source, source_ref: who published it, and where in it.
        model_name ... top_k: numbers of the model; ``params_b`` in billions.
        gpu, n_gpus, gpus_per_node, interconnect: the machine, ``gpu`` and ``interconnect`` in words.
        global_batch, micro_batch: sequences per optimizer step, and per forward pass of a data parallel rank.
        tp ... vp: degrees; ``dp`` without ``cp``.
        zero_or_fsdp, recompute, dtype, framework: in words.
        iter_time_s, tokens_per_s_per_gpu, tflops_per_gpu, mfu, mem_gb_per_gpu: what was measured; GiB mostly.
        notes: everything else, in words.
        derived_fields: names of fields that the source does not state.
        flops_per_token_full_attn ... check, time_basis, kind, mem_basis: of who collected the rows.
    """

    id: str
    source: str | None = None
    source_ref: str | None = None
    model_name: str | None = None
    params_b: float | None = None
    n_layers: int | None = None
    hidden: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    ffn_hidden: int | None = None
    vocab: int | None = None
    seq_len: int | None = None
    gated_mlp: bool | None = None
    n_experts: int | None = None
    top_k: int | None = None
    gpu: str | None = None
    n_gpus: int | None = None
    gpus_per_node: int | None = None
    interconnect: str | None = None
    global_batch: int | None = None
    micro_batch: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    vp: int | None = None
    sequence_parallel: bool | None = None
    zero_or_fsdp: str | None = None
    recompute: str | None = None
    dtype: str | None = None
    framework: str | None = None
    year: int | None = None
    iter_time_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    mem_gb_per_gpu: float | None = None
    notes: str | None = None
    derived_fields: str | None = None
    flops_per_token_full_attn: float | None = None
    flops_per_token_causal: float | None = None
    ratio_full: float | None = None
    ratio_causal: float | None = None
    check: str | None = None
    time_basis: str | None = None
    kind: str | None = None
    mem_basis: str | None = None

    def words(self, *fields: str) -> str:
        """Text of the named fields (of all that are text, without a name), lower case, empty ones left out."""
        chosen = fields or ("source", "source_ref", "model_name", "interconnect", "zero_or_fsdp", "recompute",
                            "dtype", "framework", "notes")  # fmt: skip
        return "; ".join(str(value) for name in chosen if (value := getattr(self, name)) is not None).lower()


def read_runs(path: str | Path) -> tuple[RunRow, ...]:
    """Read a CSV of runs.

    Raises:
        InputError: no such file, not text, a necessary column missing, or a cell that is no number; with line and
            column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(reader.fieldnames, path)
            return tuple(_row(cells, f"{path}, line {reader.line_num}") for cells in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV of runs: {error}") from error


def write_runs(path: str | Path, rows: Iterable[RunRow]) -> None:
    """Write a CSV of runs that ``read_runs`` reads back."""
    names = [field.name for field in dataclasses.fields(RunRow)]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(getattr(row, name)) for name in names] for row in rows)


def _check_header(names: Iterable[str] | None, path: str | Path) -> None:
    found = list(names or ())
    for name in REQUIRED:
        if name not in found:
            hint = nearest(name, found) if found else "; the file is empty"
            raise InputError(f"{path}, line 1: column '{name}' of a CSV of runs is missing{hint}")


@cache
def _kinds() -> dict[str, type]:
    kinds: dict[str, type] = {}
    for name, hint in typing.get_type_hints(RunRow).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = options[0]
    return kinds


def _row(cells: Mapping[str | None, str | list[str] | None], where: str) -> RunRow:
    if None in cells:
        raise InputError(f"{where}: more cells than columns: is a comma unquoted?")
    values = {
        name: _value(kind, str(cells.get(name) or "").strip(), f"{where}, column {name}")
        for name, kind in _kinds().items()
    }
    if values["id"] is None:
        raise InputError(f"{where}, column id: a run needs an id")
    return RunRow(**values)


def _value(kind: type, text: str, where: str) -> typing.Any:
    if text.lower() in EMPTY and not (kind is str and text.lower() in ("none", "-")):
        return None
    if kind is str:
        return text
    if kind is bool and text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        raise InputError(f"{where}: '{text}' is not a number") from None
    if not math.isfinite(number):
        return None
    if kind is bool:
        return bool(number)
    if kind is int:
        if number != round(number):
            raise InputError(f"{where}: {text} is not a whole number")
        return round(number)
    return number


def _cell(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)
