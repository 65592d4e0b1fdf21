"""Published plans held against the best that the search finds for the same model, machine, batch, precision and engine.

A row becomes a case (``runs.published``, ``runs.interpret``), its plan is priced and checked against memory, and the
search looks at everything that the engine offers and the recipe's settings allow (``restrictions``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting, estimate
from autopar.model.build import build_graph
from autopar.runs.interpret import RunCase, Unsupported, interpret
from autopar.runs.published import PublishedPlan, as_run, read_published
from autopar.runs.reading import find_int
from autopar.search.exhaustive import SearchResult, search
from autopar.validate.holding import Held, held_ratios
from autopar.validate.restrictions import offering, restrictions_of, space_of, veto
from costmodels.stack import load_stack
from costmodels.units import GIB

RECIPES_SCHEMA = 1
NEAR = 1.15
"""Published over best step time up to which a published plan counts as near the best."""
TOP = 10
"""Answers that really differ which a search returns, for the rank of the published one."""

OnMessage = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A published plan and what the search makes of its question.

    Attributes:
        id, group: of the row, and of the rows of one source.
        title: model, devices and precision.
        source: who published it.
        reason: why the row is left out; empty where it is read.
        stack, slug: software and plan that were read.
        release: of the software, ``26.04``; empty where not stated.
        question: what the plan answers: equal for rows that do.
        measured_s, published_s, best_s: seconds of a step: measured, predicted for the published plan and for the best.
        memory_gib, memory_low_gib, limit_gib: of the published plan, the lower end of its interval, of a device.
        offloaded_layers: blocks whose activations the recipe keeps on the host; memory is without these.
        best_slug, best_memory_gib: of the best plan.
        faster: answers that really differ (``search.distinct``) and are faster than the published plan, at most TOP.
        considered: plans of the space.
        terms: seconds by which each named term of the published step is longer than the best plan's.
        held: what is left of the gap if one decision is as published, by decision; for rows beyond NEAR.
        caveats, assumptions: what the prediction does not know of, and what the row does not say.
    """

    id: str
    group: str
    title: str
    source: str = ""
    reason: str = ""
    stack: str = ""
    slug: str = ""
    release: str = ""
    question: tuple[Any, ...] = ()
    measured_s: float | None = None
    published_s: float = 0.0
    best_s: float = 0.0
    memory_gib: float = 0.0
    memory_low_gib: float = 0.0
    limit_gib: float = 0.0
    offloaded_layers: int = 0
    best_slug: str = ""
    best_memory_gib: float = 0.0
    faster: int = 0
    considered: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)
    held: tuple[Held, ...] = ()
    caveats: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def read(self) -> bool:
        """Whether the row was read."""
        return not self.reason

    @property
    def ratio(self) -> float:
        """Predicted step of the published plan over that of the best."""
        return self.published_s / self.best_s

    @property
    def near(self) -> bool:
        """Whether the published plan is within 15 percent of the best."""
        return self.read and self.ratio <= NEAR

    @property
    def fits(self) -> bool:
        """Whether the published plan fits in memory."""
        return self.memory_gib <= self.limit_gib

    @property
    def error(self) -> float | None:
        """Predicted over measured step of the published plan, minus 1."""
        return self.published_s / self.measured_s - 1 if self.measured_s else None

    @property
    def longest_term(self) -> tuple[str, float]:
        """The term that explains most of the gap, and its share of the best step."""
        name = max(self.terms, key=self.terms.__getitem__)
        return name, self.terms[name] / self.best_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipes:
    """All rows of a file in its order."""

    rows: tuple[Recipe, ...]

    @property
    def judged(self) -> tuple[Recipe, ...]:
        """Rows that were read."""
        return tuple(row for row in self.rows if row.read)

    @property
    def left_out(self) -> dict[str, int]:
        """Reasons with their number of rows, most frequent first; with ``judged`` they add up to all rows."""
        return dict(Counter(row.reason for row in self.rows if not row.read).most_common())

    @property
    def share_near(self) -> float:
        """Share of the judged rows within 15 percent of the best."""
        return sum(row.near for row in self.judged) / max(len(self.judged), 1)


def validate_recipes(path: str | Path, *, on_message: OnMessage | None = None) -> Recipes:
    """Judge every published plan of a file. Raises InputError for a file that is none of published plans."""
    plans = read_published(path)
    tell = on_message or (lambda message: None)
    rows: list[Recipe] = []
    known: dict[tuple[Any, ...], _Question] = {}
    for place, plan in enumerate(plans):
        tell({"study": "published plans", "done": place, "of": len(plans)})
        case = read_case(plan)
        if isinstance(case, Unsupported):
            rows.append(Recipe(id=plan.id, group=plan.group, title=plan.text("model"), reason=case.reason))
            continue
        rows.append(_judge(plan, case, known))
    return Recipes(rows=tuple(rows))


def read_case(plan: PublishedPlan) -> RunCase | Unsupported:
    """The row as a question with a plan, or why it is none."""
    try:
        return interpret(as_run(plan))
    except InputError as error:
        return Unsupported(id=plan.id, source=plan.group, reason=str(error))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    setting: Setting
    found: SearchResult


def question_of(case: RunCase, group: str) -> tuple[Any, ...]:
    """What a plan answers: rows of one question share the search."""
    return (case.spec, case.workload, repr(case.cluster), case.stack, group == "sc21")


def setting_of(case: RunCase) -> Setting:
    """What is given."""
    workload = case.workload
    graph = build_graph(case.spec, seq_len=workload.seq_len, precision=workload.precision)
    stack = offering(load_stack(case.stack), experts=case.spec.num_experts > 0)
    return Setting(graph=graph, workload=workload, cluster=case.cluster, stack=stack)


def offloaded_layers(plan: PublishedPlan) -> int:
    """Blocks whose activations the recipe keeps on the host."""
    return find_int(plan.text("recipe"), r"activation offload (\d+) layers") or 0


def _judge(plan: PublishedPlan, case: RunCase, known: dict[tuple[Any, ...], _Question]) -> Recipe:
    title = f"{case.spec.name}, {case.cluster.world_size} {case.cluster.device.name}, {case.workload.precision.value}"
    base: dict[str, Any] = {
        "id": plan.id, "group": plan.group, "title": title, "source": plan.text("source"), "stack": case.stack,
        "slug": case.plan.slug,
    }  # fmt: skip
    space = space_of(case.stack, plan.group, case.plan)
    key = (*question_of(case, plan.group), space.max_vp)
    forbidden = veto(restrictions_of(case.stack, plan.group), case.workload)
    try:
        if key not in known:
            setting = setting_of(case)
            found = search(setting, top=TOP, space=space, forbidden=forbidden, distinct=True)
            known[key] = _Question(setting=setting, found=found)
        setting, found = known[key].setting, known[key].found
        published = estimate(setting, case.plan)
    except InputError as error:
        return Recipe(**base, reason=f"not a plan of ours: {error}")
    best = found.best[0]
    ratio = published.step_s / best.step_s
    hosted = offloaded_layers(plan)
    return Recipe(
        **base,
        release=(re.search(r"\b(2\d\.\d\d(\.\d\d)?) NeMo", plan.text("notes")) or ("", ""))[1],
        question=(case.spec.name, case.cluster.name, case.workload), measured_s=case.measured_s,
        published_s=published.step_s, best_s=best.step_s,
        **_memory(published, setting.graph.num_blocks, hosted), offloaded_layers=hosted,
        best_slug=best.plan.slug, best_memory_gib=best.memory_gib,
        faster=sum(other.step_s < published.step_s * (1 - 1e-9) for other in found.best), considered=found.considered,
        terms={name: published.breakdown[name] - best.breakdown[name] for name in best.breakdown},
        held=held_ratios(setting, space, forbidden, published, best) if ratio > NEAR else (),
        caveats=case.caveats, assumptions=case.assumptions,
    )  # fmt: skip


def _memory(published: Estimate, blocks: int, hosted: int) -> dict[str, Any]:
    on_host = published.memory["activations"] * min(hosted / blocks, 1.0)
    return {
        "memory_gib": (published.memory_bytes - on_host) / GIB,
        "memory_low_gib": (published.memory_bands["total"].low - on_host) / GIB,
        "limit_gib": published.memory_limit / GIB,
    }
