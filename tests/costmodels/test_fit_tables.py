"""Constants that ship are those that the shipped tables give, and the tables are predicted as well as is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from costmodels.fit_tables import TableFit, fit_tables
from costmodels.fit_tables.links import predicted_seconds, with_constants
from costmodels.fit_tables.solve import fit
from costmodels.fit_tables.tables import numbers, rows_where
from costmodels.hardware import load_cluster, load_device, load_fabric
from costmodels.shipped import read_shipped
from costmodels.stack import load_stack

LEVELS = {"peak_fraction", "efficiency", "tree"}
"""Set by training runs, or rounded below 1: not compared with what ships."""


@pytest.fixture(scope="module")
def fits() -> dict[str, TableFit]:
    return {found.name: found for found in fit_tables()}


def test_shipped_constants_are_the_fitted_ones(fits: dict[str, TableFit]) -> None:
    compared = 0
    for found in fits.values():
        if not found.ships_in:
            continue
        folder, name, *tables = found.ships_in
        place = read_shipped(folder, name)
        for table in tables:
            place = place.get(table, {})
        for constant, value in found.constants.items():
            key, _, ranks = constant.partition(".")
            if key in LEVELS and not key.startswith("efficiency_of"):
                continue
            shipped = place[key][ranks] if ranks else place.get(key, 0.0)
            assert shipped == pytest.approx(value, rel=0.1, abs=0.05), (found.name, constant)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    ("name", "error", "left_out"),
    [
        ("a100-pcie products", 0.035, 0.04), ("b200 products", 0.11, 0.115), ("b200 grouped products", 0.15, 0.17),
        ("h800 fp8 products", 0.10, 0.11), ("a100-80g flash2 fwd+bwd", 0.015, 0.02), ("h100 flash3 fwd", 0.05, 0.055),
        ("a100-pcie attention fwd", 0.03, 0.04), ("b200 attention bwd", 0.06, 0.08), ("a100 rings", 0.045, 0.05),
        ("v100 rings", 0.04, 0.045), ("h100 switch", 0.055, 0.06), ("b200 switch", 0.065, 0.1), ("efa", 0.05, 0.055),
    ],
)  # fmt: skip
def test_errors_stay_what_the_origins_say(fits: dict[str, TableFit], name: str, error: float, left_out: float) -> None:
    assert fits[name].error < error
    assert fits[name].left_out_error < left_out
    assert "left out" in fits[name].origin


def test_every_fit_names_its_rows(fits: dict[str, TableFit]) -> None:
    for found in fits.values():
        assert found.rows >= 5, found.name
        assert found.error <= found.worst_error, found.name
        assert all(value >= 0 for value in found.constants.values()), found.name


def test_a_fit_finds_known_constants_and_sees_what_it_cannot_predict() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    exact = 3.0 + 0.5 * x

    def law(c: dict[str, float]) -> np.ndarray:
        return c["a"] + c["b"] * x

    found = fit("line", law, {"a": 1.0, "b": 1.0}, exact, list(x), table="a line", left_out="a point")
    assert found.constants == pytest.approx({"a": 3.0, "b": 0.5}, rel=1e-4)
    assert found.left_out_error < 1e-4
    # A law without the constant term must fail, and its left-out error says so.
    through_zero = fit("ray", lambda c: c["b"] * x, {"b": 1.0}, exact, list(x), table="a line", left_out="a point")
    assert through_zero.error > 0.2
    assert through_zero.left_out_error > through_zero.error


def test_the_ramp_of_the_switch_is_needed() -> None:
    """Without it, the same rows of 8 H100 and H200 from 1 MiB are missed by three times as much."""
    rows = [row for row in rows_where("collectives", device=("h100", "h200"), kind="all_reduce", nodes="1")
            if float(row["num_bytes"]) >= 2**20 and row["algorithm"] != "ring"]  # fmt: skip
    link = dataclasses.replace(load_cluster("h100:1x8").node_link, slowdown=1.0)
    measured = numbers(rows, "microseconds") * 1e-6

    def error(changed: dict[str, float]) -> float:
        predicted = predicted_seconds(rows, "h100", with_constants(link, changed), across=False)
        return float(np.mean(np.abs(predicted / measured - 1)))

    assert error({}) < 0.06
    flat = min(error({"in_network_ramp_MB": 0.0, "in_network": share}) for share in (0.5, 0.55, 0.6, 0.65, 0.7))
    assert flat > 2 * error({})


@pytest.mark.parametrize(("table", "fabric"), [("aws-samples", "efa"), ("two-node-logs-a", "infiniband")])
def test_large_all_reduces_of_two_nodes(table: str, fabric: str) -> None:
    """From 2 GiB; below, logs of one configuration differ by 40 percent among themselves."""
    rows = [row for row in rows_where("collectives", table=table) if float(row["num_bytes"]) >= 2**31]
    link = dataclasses.replace(load_fabric(fabric, 50e9), slowdown=1.0)
    predicted = predicted_seconds(rows, "h100", link, across=True)
    assert predicted == pytest.approx(numbers(rows, "microseconds") * 1e-6, rel=0.06)


def test_levels_of_products_stay_near_their_tables(fits: dict[str, TableFit]) -> None:
    """Training runs set the levels; a level far off its table would stand for something else.

    The table of B200 is of one machine, whose products are slower than those of others (``slow-products``).
    """
    machine = {"b200 products": load_stack("megatron-core+slow-products").kernels.matmul_rate}
    for name, device, precision in (("a100-pcie products", "a100-80g", "bf16"), ("b200 products", "b200", "bf16"),
                                    ("h800 fp8 products", "h800", "fp8-block")):  # fmt: skip
        shipped = load_device(device).matmul_rate(precision).peak_fraction
        assert shipped * machine.get(name, 1.0) == pytest.approx(fits[name].constants["peak_fraction"], rel=0.2)
