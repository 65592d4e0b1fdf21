"""Files of measured runs as cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopar.errors import InputError
from autopar.fit.problem import Case


def read_cases(paths: Sequence[str | Path]) -> tuple[tuple[Case, ...], dict[str, str]]:
    """Read and interpret runs; the second result is why some of them are no cases, by id.

    A run that is in several files counts once. Raises InputError for a file that is no table of runs.
    """
    from autopar.runs import Unsupported, interpret, read_runs

    cases: dict[str, Case] = {}
    refused: dict[str, str] = {}
    for path in paths:
        for row in read_runs(path):
            if row.id in cases or row.id in refused:
                continue
            try:
                found = interpret(row)
            except InputError as error:
                refused[row.id] = str(error)
                continue
            if isinstance(found, Unsupported):
                refused[row.id] = found.reason
            else:
                cases[row.id] = found
    return tuple(cases.values()), refused
