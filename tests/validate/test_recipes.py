"""Published plans: each row is read or left out, restrictions hit whom they name, no plan beats the best."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from autopar.errors import InputError
from autopar.estimate import to_arrays
from autopar.plan import Recompute, parse_slug
from autopar.report.recipes import far_columns, readme, to_json
from autopar.runs.interpret import RunCase, Unsupported
from autopar.runs.published import PublishedPlan, as_run, read_published
from autopar.runs.reading import CannotRead
from autopar.validate.gaps import Kind, cause_of, successors
from autopar.validate.holding import DECISIONS
from autopar.validate.recipes import NEAR, Recipe, Recipes, offloaded_layers, read_case, validate_recipes
from autopar.validate.restrictions import RESTRICTIONS, restrictions_of, space_of, veto
from autopar.workload import Workload
from costmodels.stack import load_stack, stack_variants

FILE = Path(__file__).parents[2] / "reports" / "recipes" / "published_plans.csv"


@pytest.fixture(scope="module")
def plans() -> dict[str, PublishedPlan]:
    return {plan.id: plan for plan in read_published(FILE)}


def case_of(plan: PublishedPlan) -> RunCase:
    case = read_case(plan)
    assert isinstance(case, RunCase), case
    return case


def test_every_row_is_read_or_left_out_with_a_reason(plans: dict[str, PublishedPlan]) -> None:
    cases = [read_case(plan) for plan in plans.values()]
    left_out = [case for case in cases if isinstance(case, Unsupported)]
    assert len(cases) == 350
    assert all(case.reason for case in left_out)
    assert len(cases) - len(left_out) > 200
    assert {case.stack.split("+")[0] for case in cases if isinstance(case, RunCase)} == {
        "megatron-bridge", "megatron-core", "megatron-2021", "torchtitan",
    }  # fmt: skip


def test_rows_keep_what_their_source_states(plans: dict[str, PublishedPlan]) -> None:
    """Degrees, batch and devices of every row that is read, from the columns."""
    for plan in plans.values():
        case = read_case(plan)
        if isinstance(case, Unsupported):
            continue
        layout = case.plan.layout
        assert (layout.tp, layout.pp, layout.cp) == (plan.count("tp"), plan.count("pp"), plan.count("cp"))
        assert layout.world_size == plan.count("n_gpus") == case.cluster.world_size
        assert plan.count("global_batch") in (None, case.workload.global_batch)
        assert case.workload.seq_len == plan.count("seq_len")
        assert layout.ep == (plan.count("ep") or 1)


@pytest.mark.parametrize(
    ("name", "slug", "precision"),
    [
        ("nemo-recommended-061", "tp1.pp1.vp1.cp1.dp64.z3.mb1.ac-full10", "fp8"),
        ("nemo-recommended-034", "tp4.pp1.vp1.cp1.ep16.etp4.dp64.z1.mb1.ac-none.sp", "bf16"),
        ("nemo-recommended-106", "tp2.pp1.vp1.cp1.dp64.z3.mb1.ac-none.sp.rep2", "fp8"),
        ("megatron-bridge-024", "tp4.pp16.vp8.cp1.dp4.z1.mb1.ac-none.sp.split-0-1x126-0", "mxfp8"),
        ("megatron-bridge-161", "tp1.pp1.vp1.cp1.dp8.z3.mb1.ac-full5", "fp8"),
        ("sc21-009", "tp8.pp35.vp3.cp1.dp9.z0.mb1.ac-full", "fp16"),
        ("torchtitan-001", "tp1.pp1.vp1.cp1.dp8.z3.mb2.ac-selective+op_level", "bf16"),
    ],
)
def test_single_rows(plans: dict[str, PublishedPlan], name: str, slug: str, precision: str) -> None:
    case = case_of(plans[name])
    assert case.plan == parse_slug(slug)
    assert case.workload.precision.value == precision


def test_reasons(plans: dict[str, PublishedPlan]) -> None:
    for name, words in (
        ("nemo-recommended-001", "LoRA"), ("nemo-recommended-044", "diffusion"), ("nemo-recommended-035", "no preset"),
        ("megatron-bridge-108", "contradicts"), ("alpa-001", "Alpa"), ("aceso-001", "Aceso"),
        ("nemo-recommended-028", "Mamba"),
    ):  # fmt: skip
        with pytest.raises(CannotRead, match=words):
            as_run(plans[name])


def test_offloaded_blocks(plans: dict[str, PublishedPlan]) -> None:
    assert offloaded_layers(plans["megatron-bridge-048"]) == 20
    assert offloaded_layers(plans["megatron-bridge-023"]) == 0


def test_restrictions_hit_whom_they_name() -> None:
    """Each has a plan that it forbids and one that it allows, and exists for stacks and variants that exist."""
    examples = {
        "flex dispatcher": ("tp1.cp1.dp8.z1.mb1", "tp1.cp1.ep8.dp8.z1.mb1"),
        "overlapped exchange": ("tp1.pp2.cp1.ep4.dp4.z1.mb1", "tp1.pp2.vp2.cp1.ep4.dp4.z1.mb1"),
        "graphs of parts": ("tp1.cp1.dp8.z1.mb1.ac-full", "tp1.cp1.dp8.z1.mb1.ac-selective"),
        "FSDP in a pipeline": ("tp1.pp2.cp1.dp4.z3.mb1", "tp1.pp2.cp1.dp4.z1.mb1"),
        "sequence parallelism": ("tp2.cp1.dp4.z1.mb1.sp", "tp2.cp1.dp4.z1.mb1"),
        "microbatches of interleaving": ("pp4.vp2.dp2.mb4", "pp4.vp2.dp2.mb1"),
        "recomputation of the study": ("dp8.mb1.ac-full3", "dp8.mb1.ac-full"),
    }
    workload = Workload(global_batch=16, seq_len=128)
    assert {restriction.name for restriction in RESTRICTIONS} == set(examples)
    for restriction in RESTRICTIONS:
        hit = restriction.forbids(to_arrays([parse_slug(slug) for slug in examples[restriction.name]]), workload)
        assert hit.tolist() == [True, False], restriction.name
        assert restriction.source
        for stack in restriction.stacks:
            load_stack(stack)
            assert set(restriction.variants) <= set(stack_variants(stack))


def test_restrictions_follow_the_stack() -> None:
    names = {r.name for r in restrictions_of("megatron-bridge+hybridep", "megatron-bridge")}
    assert names == {"flex dispatcher", "FSDP in a pipeline"}
    assert {r.name for r in restrictions_of("torchtitan", "torchtitan")} == set()
    assert "recomputation of the study" in {r.name for r in restrictions_of("megatron-2021", "sc21")}


def test_published_plans_obey_their_own_restrictions(plans: dict[str, PublishedPlan]) -> None:
    """What is forbidden must not be what ran; a table that prints no virtual stages is read as it is."""
    for plan in plans.values():
        case = read_case(plan)
        if isinstance(case, Unsupported):
            continue
        found = tuple(r for r in restrictions_of(case.stack, plan.group) if r.name != "overlapped exchange")
        assert not veto(found, case.workload)(to_arrays([case.plan]))[0], plan.id
        assert space_of(case.stack, plan.group, case.plan).max_vp >= case.plan.layout.vp


def test_decisions_cover_a_plan() -> None:
    """Plans that agree on every decision are the same but for order, schedule, split and sequence parallelism."""
    one = parse_slug("tp2.pp2.vp2.cp1.ep2.dp4.z1.mb2.ac-full1.sp")
    other = dataclasses.replace(one, recompute=Recompute.NONE, recompute_layers=0)
    assert all(decision.same(one, one) for decision in DECISIONS)
    assert [decision.name for decision in DECISIONS if not decision.same(one, other)] == ["recomputation"]


def test_a_row_is_judged(tmp_path: Path, plans: dict[str, PublishedPlan]) -> None:
    """A published plan of eight devices: its ratio, terms and memory, and what is held for one that is far."""
    lines = FILE.read_text().splitlines()
    chosen = [line for line in lines if line.startswith(("torchtitan-007,", "torchtitan-001,", "alpa-001,"))]
    small = tmp_path / "plans.csv"
    small.write_text("\n".join([lines[0], *chosen]) + "\n")
    found = validate_recipes(small)
    assert (len(found.rows), len(found.judged), sum(found.left_out.values())) == (3, 2, 1)
    for row in found.judged:
        assert row.ratio >= 1 - 1e-9
        assert row.fits
        assert np.isclose(sum(row.terms.values()), row.published_s - row.best_s)
        assert bool(row.held) == (row.ratio > NEAR)
        assert all(held.ratio is None or held.ratio <= row.ratio * (1 + 1e-9) for held in row.held)
        assert (row.faster == 0) == np.isclose(row.ratio, 1.0)
    text = readme(found)
    assert "# Published recipes" in text and all(row.id in text for row in found.judged)
    assert to_json(found)["summary"]["judged"] == 2
    far = [row for row in found.judged if not row.near]
    assert len(far_columns(far)[0].cells) == len(far)


def made(name: str, **changes: object) -> Recipe:
    base = Recipe(id=name, group="g", title="t", stack="s", slug=name, question=("q",), published_s=2.0, best_s=1.0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_causes() -> None:
    assert cause_of(made("a", caveats=("experts drop tokens",))).kind is Kind.LACKING
    assert cause_of(made("a", source="benchmarks/asyncTP_llama3")).kind is Kind.PURPOSE
    assert cause_of(made("a")).kind is Kind.DECISION


def test_successors() -> None:
    rows = [
        made("a", release="26.02", measured_s=4.0), made("b", release="26.04", measured_s=2.0, published_s=1.0),
        made("c", release="26.06", measured_s=2.0, published_s=1.0), made("d", published_s=0.5, measured_s=1.0),
    ]  # fmt: skip
    [found] = successors(rows)
    assert (found.earlier.id, found.later.id, found.measured, found.predicted, found.agrees) == ("a", "b", 2, 2, True)


def test_left_out_rows_are_counted() -> None:
    rows = (made("a"), Recipe(id="b", group="g", title="t", reason="why"))
    assert Recipes(rows=rows).left_out == {"why": 1}


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,model\na,b\n")
    with pytest.raises(InputError, match="hardware"):
        read_published(path)
    lines = FILE.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[1]]))
    with pytest.raises(InputError, match="twice"):
        read_published(path)
