"""Fused attention: charts of FlashAttention by length and head size, tables of SimuMax by number of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from costmodels.compute import attention_flops, attention_seconds
from costmodels.fit_tables.products import table_device
from costmodels.fit_tables.solve import Array, TableFit, fit
from costmodels.fit_tables.tables import Row, numbers, rows_where
from costmodels.hardware import Device
from costmodels.rates import AttentionRate

CHARTS = "the charts of FlashAttention-2 and 3"
SIMUMAX = "SimuMax's measured efficiencies of fused attention"
LENGTHS = {"len_half": 400.0, "len_half_full": 100.0}
BOTH = 3.5
"""Forward and backward together, of the forward's multiplications."""


def fit_attention() -> tuple[TableFit, ...]:
    """One fit for each kernel and direction that a table has."""
    return (
        *(_by_length("a100-80g", kernel, "fwd+bwd") for kernel in ("flash1", "flash2")),
        *(_by_length("h100", kernel, phase) for kernel, phase in (("flash1", "fwd+bwd"), ("flash2", "fwd+bwd"))),
        _by_length("h100", "flash2", "fwd", ships=False),
        *(_by_length("h100", kernel, "fwd") for kernel in ("flash3", "cudnn")),
        *(_by_heads(card, phase) for card in ("a100-pcie", "b200") for phase in ("fwd", "bwd")),
    )


def rows_seconds(device: Device, rows: Sequence[Row], rate: AttentionRate, backward: bool) -> Array:
    """Seconds that a rate gives for rows of a table."""
    seconds = np.empty(len(rows))
    plain = dataclasses.replace(device, op_overhead=0.0, attention=rate, attention_backward=rate)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["causal"])
    for causal, chosen in groupby(order, key=lambda i: rows[i]["causal"]):
        index = list(chosen)
        part = [rows[i] for i in index]
        seconds[index] = attention_seconds(
            plain, "bf16", batch=numbers(part, "batch"), heads=numbers(part, "heads"), query_len=numbers(part, "seq"),
            key_len=numbers(part, "seq"), head_size=numbers(part, "head_size"), value_size=numbers(part, "value_size"),
            causal=causal == "1", backward=backward,
        )  # fmt: skip
    return seconds


def measured_seconds(device: Device, rows: Sequence[Row]) -> Array:
    """Seconds of a table's rows, from its efficiencies: forward FLOPs, 2.5 times as many backward."""
    width = (numbers(rows, "head_size") + numbers(rows, "value_size")) / 2
    seen = numbers(rows, "seq") * np.where(numbers(rows, "causal") == 1, 0.5, 1.0)
    flops = attention_flops(numbers(rows, "batch"), numbers(rows, "heads"), numbers(rows, "seq"), seen, width)
    times = np.array([{"fwd": 1.0, "bwd": BOTH - 1, "fwd+bwd": BOTH}[row["phase"]] for row in rows])
    seconds: Array = flops * times / (device.peak("bf16") * numbers(rows, "efficiency"))
    return seconds


def _by_length(card: str, kernel: str, phase: str, ships: bool = True) -> TableFit:
    """Length and head size; tokens are constant over a chart, so that waves are too."""
    rows, device = rows_where("attention", device=card, kernel=kernel, phase=phase), table_device(card)

    def law(constants: Mapping[str, float]) -> Array:
        seconds = rows_seconds(device, rows, AttentionRate(**constants), backward=False)
        return seconds * (BOTH if phase == "fwd+bwd" else 1.0)

    start = {"peak_fraction": 0.5, **LENGTHS, "head_half": 20.0}
    lengths = [row["seq"] for row in rows]
    measured = measured_seconds(device, rows)
    place = ("devices", card, "attention_kernels", kernel, "forward") if ships else ()
    name = f"{card} {kernel} {phase}"
    return fit(name, law, start, measured, lengths, table=CHARTS, left_out="a length", ships_in=place)


def _by_heads(card: str, phase: str) -> TableFit:
    """Number of heads and unequal widths, at the length law of the shipped kernel."""
    rows, device = rows_where("attention", device=card, kernel="te", phase=phase), table_device(card)
    kernel = {"a100-pcie": "flash2", "b200": "cudnn"}[card]
    known = device.attention_rate(kernel, phase == "bwd")

    def law(constants: Mapping[str, float]) -> Array:
        return rows_seconds(device, rows, dataclasses.replace(known, **constants), backward=phase == "bwd")

    start = {"peak_fraction": 0.5, "wave_half": 2.0, "unequal_share": 0.9}
    heads = [row["heads"] for row in rows]
    measured = measured_seconds(device, rows)
    shipped = {"a100-pcie": "a100-80g"}.get(card, card)
    place = ("devices", shipped, "attention_kernels", kernel, "backward" if phase == "bwd" else "forward")
    name, words = f"{card} attention {phase}", "a number of heads"
    return fit(name, law, start, measured, heads, table=SIMUMAX, left_out=words, ships_in=place)
