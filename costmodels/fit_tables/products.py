"""Matrix products: shapes of A100 and B200, grouped products of experts, fp8 of H800."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from costmodels.compute import product_seconds
from costmodels.fit_tables.solve import Array, TableFit, fit
from costmodels.fit_tables.tables import Row, numbers, rows_where
from costmodels.hardware import Device, load_device
from costmodels.rates import MatmulRate

SIMUMAX = "SimuMax's measured efficiencies of the products of Llama and DeepSeek layers"
DEEPGEMM = "DeepGEMM's table of fp8 products on H800"
FAMILY = "a pair of dimensions"


def table_device(name: str) -> Device:
    """The card of a table as a Device: like a shipped one but for what the card differs in."""
    if name == "a100-pcie":
        return dataclasses.replace(load_device("a100-80g"), memory_bandwidth=1.935e12)
    return load_device({"h800": "h100"}.get(name, name))


def _shapes(rows: Sequence[Row]) -> tuple[tuple[Array, Array, Array], Array]:
    """(m, n, k) of the product that ran, and the rows per group of the layer that it belongs to.

    Grouped backward products are listed by the shape of the forward one.
    """
    m, n, k = (numbers(rows, column) for column in "mnk")
    kind = np.array([row["op"] for row in rows])
    inputs, weights = kind == "grouped-dx", kind == "grouped-dw"
    shape = (np.where(weights, k, m), np.where(inputs, k, n), np.where(inputs, n, np.where(weights, m, k)))
    return shape, m


def fit_products() -> tuple[TableFit, ...]:
    """One fit for each table of products. Levels that training runs set are fitted here too, and not shipped."""
    return (
        _dense("a100-pcie", ("quantization", "k_half", "byte_cost"), "a100-80g"),
        _dense("b200", ("byte_cost",), "b200"),
        _grouped("a100-pcie", "a100-80g"),
        _grouped("b200", "b200"),
        _deepgemm(),
    )


FORMS: Mapping[str, tuple[str, ...]] = {
    "a constant": (),
    "inner dimension": ("k_half",),
    "all dimensions": ("m_half", "n_half", "k_half"),
    "bytes": ("byte_cost",),
    "inner dimension and waves": ("k_half", "quantization"),
    "bytes and waves": ("byte_cost", "quantization"),
    "bytes, inner dimension and waves": ("byte_cost", "k_half", "quantization"),
}
"""Laws of the efficiency of a product, by the constants that they have beside a level."""


def compare_forms(card: str) -> dict[str, TableFit]:
    """Fits of every form to the plain products of a card (``a100-pcie``, ``b200``), by name of the form."""
    return {form: _dense(card, free, "") for form, free in FORMS.items()}


START = {
    "peak_fraction": 0.7,
    "m_half": 100.0,
    "n_half": 100.0,
    "k_half": 100.0,
    "byte_cost": 0.7,
    "quantization": 0.5,
    "rows_half": 200.0,
}


def _fit(
    name: str, rows: Sequence[Row], device: Device, free: Sequence[str], known: MatmulRate, table: str, ships: str
) -> TableFit:
    shape, group_rows = _shapes(rows)
    m, n, k = shape
    groups, result = numbers(rows, "groups"), numbers(rows, "result_bytes")
    precision = rows[0]["precision"]
    measured = 2 * m * n * k * groups / (device.peak(precision) * numbers(rows, "efficiency"))

    def law(constants: Mapping[str, float]) -> Array:
        rate = dataclasses.replace(known, **cast(dict[str, Any], dict(constants)))
        few = np.where(groups > 1, 1 + rate.rows_half / group_rows, 1.0)
        seconds: Array = np.asarray(product_seconds(device, precision, rate, shape, groups, result, few))
        return seconds

    family = [tuple(sorted((row["n"], row["k"]))) for row in rows]
    parts = [sorted(set(family)).index(pair) % 10 for pair in family]
    place = ("devices", ships, "matmul") if ships else ()
    start = {constant: START[constant] for constant in free}
    return fit(name, law, start, measured, parts, table=table, left_out=FAMILY, ships_in=place)


def _dense(card: str, free: Sequence[str], ships: str) -> TableFit:
    rows = rows_where("products", device=card, op="matmul")
    known = MatmulRate(peak_fraction=0.5, quantization=0.0)
    return _fit(f"{card} products", rows, table_device(card), ("peak_fraction", *free), known, SIMUMAX, ships)


def _grouped(card: str, ships: str) -> TableFit:
    """Level and rows per group; byte cost, inner dimension and waves as those of the card's plain products."""
    rows = rows_where("products", device=card, op=("grouped-fwd", "grouped-dx", "grouped-dw"))
    known = dataclasses.replace(load_device(ships).matmul, rows_half=0.0)
    free = ("peak_fraction", "rows_half")
    return _fit(f"{card} grouped products", rows, table_device(card), free, known, SIMUMAX, ships)


def _deepgemm() -> TableFit:
    rows = rows_where("products", device="h800", op="matmul")
    known = MatmulRate(peak_fraction=0.8)
    return _fit("h800 fp8 products", rows, table_device("h800"), ("peak_fraction", "byte_cost"), known, DEEPGEMM, "")
