"""Colours that can be told apart, and names that differ where plans do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autopar.estimate.memory import ITEMS
from autopar.estimate.step import TERMS
from autopar.plan import parse_slug
from autopar.report.names import MEMORY_LABELS, TERM_LABELS, layout_name, layout_words, short_names
from autopar.report.numbers import parts_of, percent, signed_percent, significant
from autopar.report.plots.scatter import BANDS
from autopar.report.style import MEMORY_COLORS, TERM_COLORS, memory_scale, time_scale

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color: str, seen: np.ndarray) -> np.ndarray:
    """CIE Lab of a colour as a reader with this matrix sees it."""
    srgb = np.asarray([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen @ linear, 0, 1)
    xyz = np.asarray([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    ratio = xyz / np.asarray([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.asarray([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_term_and_item_has_a_colour_and_a_name() -> None:
    assert tuple(TERM_COLORS) == TERMS and tuple(TERM_LABELS) == TERMS
    assert tuple(MEMORY_COLORS) == ITEMS and tuple(MEMORY_LABELS) == ITEMS
    for colors in (TERM_COLORS, MEMORY_COLORS):
        assert len(set(colors.values())) == len(colors)


@pytest.mark.parametrize("blindness", ["none", *BLINDNESS])
@pytest.mark.parametrize("colors", [TERM_COLORS, MEMORY_COLORS], ids=["terms", "memory"])
def test_neighbours_in_a_bar_differ_for_every_reader(colors: dict[str, str], blindness: str) -> None:
    seen = np.asarray(BLINDNESS.get(blindness, np.eye(3)))
    # Terms that are zero vanish, so that any two less than three apart may become neighbours.
    names = list(colors)
    for a, b in itertools.combinations(range(len(names)), 2):
        if b - a < 3:
            distance = float(np.linalg.norm(lab(colors[names[a]], seen) - lab(colors[names[b]], seen)))
            assert distance > 12, f"{names[a]} and {names[b]} are {distance:.0f} apart under {blindness}"


def test_short_names_have_no_more_detail_than_needed() -> None:
    slugs = ["dp4.mb4", "dp4.mb2", "pp2.dp2.mb2", "pp2.dp2.z3.mb2", "mb1", "mb1.ac-full", "tp2.dp2.mb4.sp"]
    plans = [parse_slug(slug) for slug in slugs]
    names = short_names(plans)
    assert [names[plan.slug] for plan in plans] == [
        "dp4 mb4", "dp4 mb2", "pp2 dp2", "pp2 dp2 ZeRO-3", "1 rank", "1 rank ac-full", "tp2 sp dp2",
    ]  # fmt: skip
    apart = [parse_slug(slug) for slug in ("pp2.mb1", "pp2.mb1.sched-gpipe", "pp2.mb1.split-1-7", "pp2.mb1.split-7-1")]
    assert len(set(short_names(apart).values())) == 4


def test_layouts_in_words() -> None:
    assert layout_name(parse_slug("dp4.z2.rep2.mb1")) == "dp4 ZeRO-2 x2"
    assert layout_name(parse_slug("pp4.vp2.mb1.sched-zb-v")) == "pp4 zb-v"
    assert layout_name(parse_slug("pp4.vp2.dp2.z1.mb1")) == "pp4 vp2 dp2 ZeRO-1"
    assert layout_words(parse_slug("pp2.dp2.z2.mb1")) == "pipeline of 2 ranks × 2-way data parallel (ZeRO-2)"
    assert layout_words(parse_slug("mb1")) == "one rank"


@pytest.mark.parametrize(
    ("value", "text"),
    [(815.4, "815"), (56.72, "56.7"), (0.03174, "0.0317"), (0, "0"), (99.96, "100.0"), (12345, "12345")],
)
def test_significant(value: float, text: str) -> None:
    assert significant(value) == text


def test_percents() -> None:
    assert percent(0.1234) == "12.3%"
    assert signed_percent(0.1) == "+10.0%" and signed_percent(-0.1) == "−10.0%" and signed_percent(-0.0001) == "0.0%"


@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_printed_parts_add_up(decimals: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.random(7)
        values = values / values.sum() * 100
        printed = parts_of(values.tolist(), 100.0, decimals)
        assert round(sum(map(float, printed)), decimals) == 100.0
        assert all(abs(float(text) - value) < 10**-decimals for text, value in zip(printed, values, strict=True))
    with pytest.raises(AssertionError):
        parts_of([1.0, 2.0], 5.0, 0)


def test_scales() -> None:
    assert time_scale(2.0) == (1.0, "s") and time_scale(0.5) == (1e-3, "ms") and time_scale(1e-5) == (1e-6, "µs")
    assert memory_scale(3 * 2**30) == (2**30, "GiB") and memory_scale(5 * 2**20) == (2**20, "MiB")
    assert sorted(BANDS) == [0.1, 0.2]
