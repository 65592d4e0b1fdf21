"""Bands of memory: closed forms of their widths, fits on made errors, the file's text."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from autopar.validate.memory_bands import (
    COUNTED,
    FEWEST,
    NARROWEST,
    MemoryRow,
    fair_quantiles,
    fit_memory_bands,
    memory_bands_toml,
    memory_coverage,
    score,
)
from costmodels.memory_bands import MemoryBands, MemoryRule, item_bands, load_memory_bands
from costmodels.stack import stack_names

RULE = MemoryRule(counted=0.01, low=1.0, high=2.0, rows=0, origin="test")
BANDS = MemoryBands(spread={"activations": 0.1, "working": 0.5}, origins={}, rule=(RULE,))
ITEMS = {"parameters": 300.0, "activations": 400.0, "working": 80.0}


def test_widths_of_items_and_of_their_sum() -> None:
    found = item_bands(ITEMS, "any", BANDS)
    assert (found["parameters"].low, found["parameters"].high) == pytest.approx((297, 303))
    assert (found["activations"].low, found["activations"].high) == pytest.approx((360, 480))
    assert (found["working"].low, found["working"].high) == pytest.approx((40, 160))
    spread = math.hypot(40, 40)
    assert found["total"].low == pytest.approx(780 - math.hypot(3, spread))
    assert found["total"].high == pytest.approx(780 + math.hypot(3, 2 * spread))
    # Errors of items are independent: the sum is more certain than all items at their ends.
    assert found["total"].high - 780 < sum(found[name].high - size for name, size in ITEMS.items())


def rows(stack: str, spread: float, number: int = 200, seed: int = 0) -> list[MemoryRow]:
    draw = random.Random(seed)
    return [
        MemoryRow(
            stack=stack, items=ITEMS, measured=780 + draw.gauss(0, spread), model_out=780, source_out=780,
            model=f"{stack}-{i % 10}", source=stack,
        )
        for i in range(number)
    ]  # fmt: skip


def test_fitted_bands_hold_four_of_five() -> None:
    made = rows("torchtitan+x", 60.0) + rows("internevo", 20.0, seed=1)
    fitted = fit_memory_bands(made, BANDS)
    wide, narrow = fitted.rule_of("torchtitan"), fitted.rule_of("internevo+y")
    assert wide.high > narrow.high > NARROWEST or narrow.high == NARROWEST
    inside = [
        (band := item_bands(row.items, row.stack, fitted)["total"]).low <= row.measured <= band.high
        for row in made[:200]
    ]
    assert sum(inside) / len(inside) == pytest.approx(0.8, abs=0.04)
    assert memory_coverage(made[:200], BANDS) == pytest.approx(0.8, abs=0.06)


def test_engines_with_few_runs_share_a_rule_and_unknown_ones_are_wider() -> None:
    few = rows("internevo", 60.0, FEWEST - 1)
    fitted = fit_memory_bands(rows("torchtitan", 60.0) + few, BANDS)
    assert [rule.stacks for rule in fitted.rule] == [("torchtitan",), ("internevo",), ()]
    assert fitted.rule_of("deepspeed") is fitted.rule[-1]
    assert fitted.rule[-1].counted > COUNTED
    bands = [item_bands(ITEMS, stack, fitted)["total"] for stack in ("internevo", "deepspeed")]
    assert bands[1].high - bands[1].low > bands[0].high - bands[0].low


def test_a_source_with_many_runs_weighs_as_much_as_one_with_few() -> None:
    scores = [0.1] * 90 + [2.0] * 10
    assert fair_quantiles(scores, ["a"] * 90 + ["b"] * 10) == (0.0, 2.0)
    assert fair_quantiles(scores, ["a"] * 100)[1] == 0.1


def test_errors_within_what_counting_allows_score_nothing() -> None:
    row = rows("x", 0.0, 1)[0]
    assert score(row, 780 + 2.9, BANDS, 0.01) == 0
    assert score(row, 780 + 5, BANDS, 0.01) == pytest.approx(-4 / math.hypot(40, 40))


def test_text_reads_back(tmp_path: Path) -> None:
    fitted = fit_memory_bands(rows("torchtitan", 60.0))
    path = tmp_path / "bands.toml"
    path.write_text(memory_bands_toml(fitted))
    assert load_memory_bands(path) == fitted


def test_shipped_rules() -> None:
    shipped = load_memory_bands()
    assert not shipped.rule[-1].stacks
    assert {stack for rule in shipped.rule for stack in rule.stacks} <= set(stack_names())
    assert set(shipped.spread) == set(shipped.origins)
    assert not {"parameters", "gradients", "optimizer"} & set(shipped.spread)
    assert all(rule.counted <= shipped.rule[-1].counted for rule in shipped.rule)
