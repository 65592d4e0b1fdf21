"""Every layout trains like one process: loss, gradient norm and weights, and it calls what the plan says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, MODELS, TOLERANCE, Case
from table import Row, disagreements, expected, run_cases

from autopar.plan import parse_slug
from autopar.runtime.support import unsupported

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]
ALL = [(ranks, case) for ranks, cases in CASES.items() for case in cases]
IDS = [f"{ranks}-{case.model}-{case.slug}" for ranks, case in ALL]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[Case, Row]]:
    """Rows of all cases on a number of processes, run once."""
    done: dict[int, dict[Case, Row]] = {}

    def get(ranks: int) -> dict[Case, Row]:
        if ranks not in done:
            found = run_cases(ranks, CASES[ranks], tmp_path_factory.mktemp(f"equal{ranks}"))
            done[ranks] = dict(zip(CASES[ranks], found, strict=True))
        return done[ranks]

    return get


def test_the_table_is_large_enough() -> None:
    assert len(ALL) >= 40 and len(set(ALL)) == len(ALL) and set(CASES) == {1, 2, 4, 8}
    layouts = [parse_slug(case.slug).layout for case in CASES[8]]
    assert any(min(x.pp, x.dp, x.tp, max(x.cp, x.ep)) > 1 for x in layouts)


@pytest.mark.parametrize(("ranks", "case"), ALL, ids=IDS)
def test_equal_to_one_process(rows: Callable[[int], dict[Case, Row]], ranks: int, case: Case) -> None:
    row = rows(ranks)[case]
    assert row.covered
    assert row.loss < TOLERANCE and row.norm < TOLERANCE and row.weights < TOLERANCE, row


@pytest.mark.parametrize(("ranks", "case"), ALL, ids=IDS)
def test_collectives_are_the_plans(rows: Callable[[int], dict[Case, Row]], ranks: int, case: Case) -> None:
    due = expected(ranks, case.model, parse_slug(case.slug))
    drops = MODELS[case.model].capacity_factor > 0
    assert disagreements(rows(ranks)[case].collectives, due, drops=drops) == []


def test_nothing_in_the_table_is_refused() -> None:
    for _, case in ALL:
        assert unsupported(parse_slug(case.slug), MODELS[case.model], 8) == (), case


@pytest.mark.parametrize("spoiled", [{"scale": 1.01}, {"seed": 1}], ids=["gradients 1 percent off", "another seed"])
def test_the_comparison_notices(spoiled: dict[str, float], tmp_path: Path) -> None:
    case = Case(model="gpt", slug="dp2.mb8")
    [row] = run_cases(2, [case], tmp_path, **spoiled)  # type: ignore[arg-type]
    assert not row.equal and row.norm > 100 * TOLERANCE
