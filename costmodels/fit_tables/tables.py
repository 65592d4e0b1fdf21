"""The published tables that ship with the program (``costmodels/data``; its README names the sources)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, str]


@cache
def read_table(name: str) -> tuple[Row, ...]:
    """Rows of ``costmodels/data/<name>.csv``, as text by column."""
    text = (resources.files("costmodels") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def rows_where(name: str, **wanted: str | tuple[str, ...]) -> list[Row]:
    """Rows whose columns have a value, or one of several."""
    return [
        row
        for row in read_table(name)
        if all(row[column] in ((value,) if isinstance(value, str) else value) for column, value in wanted.items())
    ]


def numbers(rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    """A column as numbers."""
    return np.array([float(row[column]) for row in rows])
