"""Files of measured runs as rows and as cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from autopar.errors import InputError
from autopar.fit.problem import Case
from autopar.runs import RunRow, Unsupported, interpret, read_runs


def read_rows(paths: Sequence[str | Path]) -> tuple[RunRow, ...]:
    """Rows of several files. A run that is in several files is one row, later files filling what earlier leave empty.

    Raises InputError for a file that is no table of runs.
    """
    rows: list[RunRow] = []
    place: dict[str, int] = {}
    for path in paths:
        known = dict(place)
        for row in read_runs(path):
            if row.id in known:
                rows[known[row.id]] = _filled(rows[known[row.id]], row)
            else:
                place[row.id] = len(rows)
                rows.append(row)
    return tuple(rows)


def _filled(row: RunRow, other: RunRow) -> RunRow:
    missing = {
        field.name: getattr(other, field.name)
        for field in dataclasses.fields(row)
        if getattr(row, field.name) is None and getattr(other, field.name) is not None
    }
    return dataclasses.replace(row, **missing)


def read_cases(paths: Sequence[str | Path]) -> tuple[tuple[Case, ...], dict[str, str]]:
    """Read and interpret runs; the second result is why some of them are no cases, by id.

    Raises InputError for a file that is no table of runs.
    """
    cases: list[Case] = []
    refused: dict[str, str] = {}
    for row in read_rows(paths):
        try:
            found = interpret(row)
        except InputError as error:
            refused[row.id] = str(error)
            continue
        if isinstance(found, Unsupported):
            refused[row.id] = found.reason
        else:
            cases.append(found)
    return tuple(cases), refused
