"""The folder that holds published plans against the search: README.md, ``recipes.json`` and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autopar.report.columns import Column, markdown_table
from autopar.report.names import TERM_LABELS
from autopar.report.numbers import signed_percent, significant
from autopar.report.plots.recipes import Dots, recipe_ratios
from autopar.report.style import ACCENT, save_png
from autopar.validate.gaps import Cause, Kind, Successor, cause_of, successors
from autopar.validate.recipes import NEAR, RECIPES_SCHEMA, TOP, Recipe, Recipes
from autopar.validate.restrictions import RESTRICTIONS
from costmodels.records import write_json, write_text

TITLES = {
    "nemo-recommended": "NeMo 25 recipes", "megatron-bridge": "Megatron-Bridge", "megatron-lm": "Megatron-LM",
    "sc21": "Megatron 2021", "torchtitan": "torchtitan",
}  # fmt: skip
WITHIN = "within 15 percent"
KIND_NAMES = {
    Kind.DECISION: "a decision of the recipe", Kind.LACKING: "no setting of ours",
    Kind.PURPOSE: "not meant as best",
}  # fmt: skip
COLORS = {
    WITHIN: ACCENT, KIND_NAMES[Kind.DECISION]: "#d55e00", KIND_NAMES[Kind.LACKING]: "#6a51a3",
    KIND_NAMES[Kind.PURPOSE]: "#8b929c",
}  # fmt: skip


def write_recipes_report(recipes: Recipes, folder: Path) -> list[Path]:
    """Write README.md, ``recipes.json`` and ``plots/ratios.png`` into a folder; return files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "recipes.json", folder / "plots" / "ratios.png", folder / "README.md"]
    write_json(files[0], to_json(recipes))
    if recipes.judged:
        save_png(ratios_plot(recipes), files[1])
    write_text(files[2], readme(recipes))
    return files


def to_json(recipes: Recipes) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "schema_version": RECIPES_SCHEMA,
        "summary": {
            "rows": len(recipes.rows), "judged": len(recipes.judged), "left_out": recipes.left_out,
            "within_15_percent": recipes.share_near, "infeasible": [r.id for r in recipes.judged if not r.fits],
            "explained": sum(row.near or cause_of(row).kind is not Kind.DECISION for row in recipes.judged),
        },
        "rows": [_row_json(row) for row in recipes.rows],
    }  # fmt: skip


def _row_json(row: Recipe) -> dict[str, Any]:
    if not row.read:
        return {"id": row.id, "model": row.title, "status": "left out", "reason": row.reason}
    cause = None if row.near else cause_of(row)
    return {
        "id": row.id, "model": row.title, "status": "ok", "reason": None, "source": row.source, "stack": row.stack,
        "published": row.slug, "published_s": row.published_s, "measured_s": row.measured_s, "best": row.best_slug,
        "best_s": row.best_s, "ratio": row.ratio, "faster_answers": row.faster, "considered": row.considered,
        "memory_gib": row.memory_gib, "memory_limit_gib": row.limit_gib, "feasible": row.fits,
        "offloaded_layers": row.offloaded_layers, "terms": dict(row.terms),
        "held": {held.decision: held.ratio for held in row.held},
        "cause": {"kind": cause.kind.value, "text": cause.text} if cause else None,
    }  # fmt: skip


def groups_of(rows: Sequence[Recipe]) -> dict[str, list[Recipe]]:
    """Rows by source, in the order of the file."""
    found: dict[str, list[Recipe]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def kind_of(row: Recipe) -> str:
    """Name of what a row shows."""
    return WITHIN if row.near else KIND_NAMES[cause_of(row).kind]


def ratios_plot(recipes: Recipes) -> Any:
    """Every judged row by source."""
    groups = [
        Dots(
            title=TITLES.get(group, group), ratios=tuple(row.ratio for row in rows),
            kinds=tuple(kind_of(row) for row in rows),
        )
        for group, rows in groups_of(recipes.judged).items()
    ]  # fmt: skip
    return recipe_ratios(groups, COLORS, near=NEAR, title="Published plans against the best that the search finds")


def readme(recipes: Recipes) -> str:
    """The report as Markdown."""
    judged = recipes.judged
    far = sorted((row for row in judged if not row.near), key=lambda row: -row.ratio)
    kinds = {kind: sum(cause_of(row).kind is kind for row in far) for kind in Kind}
    too_large = [row for row in judged if not row.fits]
    parts = [
        "# Published recipes against the search",
        f"{len(recipes.rows)} plans that the makers of an engine publish as their best "
        "(`published_plans.csv` names each one's source; its column `recipe` holds what the source's recipe files "
        f"add). {len(judged)} are read. For each, the search looks at everything that the engine offers under the "
        "recipe's own settings, for the same model, machine, batch, sequence and precision. *Ratio* is the predicted "
        "step of the published plan over that of the best plan found; *faster* counts answers that really differ "
        f"(`search.distinct`, up to {TOP}) and beat the published plan.",
        f"**{recipes.share_near:.0%} of the published plans are predicted within 15 percent of the best; with those "
        f"whose engine does what we lack, or that were not meant as the best, {_explained(recipes):.0%}.** Of the "
        f"{len(far)} beyond, {kinds[Kind.LACKING]} use something of the engine that we have no setting for, "
        f"{kinds[Kind.PURPOSE]} were not meant as the best plan, and in {kinds[Kind.DECISION]} a decision of the "
        "recipe costs that nothing we know of forces. "
        + (
            f"{len(too_large)} are predicted not to fit in memory."
            if too_large
            else "None is predicted not to fit in memory."
        ),
        "![ratios](plots/ratios.png)",
        "## By source",
        markdown_table(source_columns(judged)),
        "## Left out",
        markdown_table(
            [
                Column(header="rows", cells=tuple(str(n) for n in recipes.left_out.values())),
                Column(header="why", cells=tuple(recipes.left_out), text=True),
            ]
        ),
        "## Beyond 15 percent",
        "*Largest term*: the part of the step that is longer than in the best plan, as a share of the best step. "
        "*Cause*: what the engine does that we lack, or the decision whose published value, held in another search, "
        "leaves the least of the gap. *Error*: of the predicted published step, where it was measured.",
        markdown_table(far_columns(far)),
        *_successor_text(successors(judged)),
        *_memory_text(judged),
        "## What recipes forbid",
        "Conditions beside what the stacks offer (`offers` in `costmodels/specs/stacks`).",
        markdown_table(
            [
                Column(header="condition", cells=tuple(r.name for r in RESTRICTIONS), text=True),
                Column(
                    header="for", text=True,
                    cells=tuple(", ".join((*r.variants, *r.groups)) or ", ".join(r.stacks) for r in RESTRICTIONS),
                ),
                Column(header="source", cells=tuple(r.source for r in RESTRICTIONS), text=True),
            ]
        ),
        "## Every row",
        markdown_table(row_columns(judged)),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def source_columns(judged: Sequence[Recipe]) -> list[Column]:
    """One line a source."""
    found = list(groups_of(judged).items())

    def cells(number: Any) -> tuple[str, ...]:
        return tuple(number(rows) for _, rows in found)

    def worst(rows: Sequence[Recipe]) -> str:
        row = max(rows, key=lambda row: row.ratio)
        return f"{row.ratio:.2f} ({row.id})"

    def error(rows: Sequence[Recipe]) -> str:
        known = [abs(row.error) for row in rows if row.error is not None]
        return f"{100 * statistics.median(known):.1f} of {len(known)}" if known else ""

    return [
        Column(header="source", cells=tuple(TITLES.get(group, group) for group, _ in found), text=True),
        Column(header="rows", cells=cells(lambda rows: str(len(rows)))),
        Column(header="within 15%", cells=cells(lambda rows: f"{sum(r.near for r in rows) / len(rows):.0%}")),
        Column(header="median ratio", cells=cells(lambda rows: f"{statistics.median(r.ratio for r in rows):.2f}")),
        Column(header="worst", cells=cells(worst)),
        Column(header="fit in memory", cells=cells(lambda rows: f"{sum(r.fits for r in rows)}")),
        Column(header="median error %, measured", cells=cells(error)),
    ]


def far_columns(rows: Sequence[Recipe]) -> list[Column]:
    """Rows beyond 15 percent, the worst first."""
    causes: list[Cause] = [cause_of(row) for row in rows]
    terms = [row.longest_term for row in rows]
    return [
        Column(header="row", cells=tuple(row.id for row in rows), text=True),
        Column(header="question", cells=tuple(row.title for row in rows), text=True),
        Column(header="ratio", cells=tuple(f"{row.ratio:.2f}" for row in rows)),
        Column(header="faster", cells=tuple(_faster(row) for row in rows)),
        Column(header="published", cells=tuple(row.slug for row in rows), text=True, code=True),
        Column(header="best", cells=tuple(row.best_slug for row in rows), text=True, code=True),
        Column(
            header="largest term", cells=tuple(f"{TERM_LABELS[n]} {signed_percent(x, 0)}" for n, x in terms), text=True
        ),
        Column(header="cause", cells=tuple(f"{c.kind.value}: {c.text}" for c in causes), text=True),
        Column(header="error", cells=tuple("" if row.error is None else signed_percent(row.error, 0) for row in rows)),
    ]


def row_columns(rows: Sequence[Recipe]) -> list[Column]:
    """All judged rows."""
    return [
        Column(header="row", cells=tuple(row.id for row in rows), text=True),
        Column(header="question", cells=tuple(row.title for row in rows), text=True),
        Column(header="published", cells=tuple(row.slug for row in rows), text=True, code=True),
        Column(header="predicted s", cells=tuple(significant(row.published_s) for row in rows)),
        Column(
            header="measured s",
            cells=tuple("" if row.measured_s is None else significant(row.measured_s) for row in rows),
        ),
        Column(header="best s", cells=tuple(significant(row.best_s) for row in rows)),
        Column(header="ratio", cells=tuple(f"{row.ratio:.3f}" for row in rows)),
        Column(header="faster", cells=tuple(_faster(row) for row in rows)),
        Column(header="memory GiB", cells=tuple(f"{row.memory_gib:.1f} of {row.limit_gib:.0f}" for row in rows)),
    ]  # fmt: skip


def _explained(recipes: Recipes) -> float:
    found = [row.near or cause_of(row).kind is not Kind.DECISION for row in recipes.judged]
    return sum(found) / max(len(found), 1)


def _faster(row: Recipe) -> str:
    return f"{row.faster}+" if row.faster >= TOP else str(row.faster)


def _successor_text(found: Sequence[Successor]) -> list[str]:
    if not found:
        return []
    return [
        "## What the makers changed",
        "Questions for which a later release published another plan and both were measured: how much faster the later "
        f"one ran and is predicted to run. {sum(s.agrees for s in found)} of {len(found)} agree on the direction; what "
        "else changed between releases is in the measured figure alone.",
        markdown_table(
            [
                Column(header="question", cells=tuple(s.title for s in found), text=True),
                Column(header="from", cells=tuple(s.earlier.release for s in found), text=True),
                Column(header="to", cells=tuple(s.later.release for s in found), text=True),
                Column(header="earlier plan", cells=tuple(s.earlier.slug for s in found), text=True, code=True),
                Column(header="later plan", cells=tuple(s.later.slug for s in found), text=True, code=True),
                Column(header="measured", cells=tuple(f"{s.measured:.2f}x" for s in found)),
                Column(header="predicted", cells=tuple(f"{s.predicted:.2f}x" for s in found)),
            ]
        ),
    ]  # fmt: skip


def _memory_text(judged: Sequence[Recipe]) -> list[str]:
    hosted = [row for row in judged if row.offloaded_layers]
    tight = sorted(judged, key=lambda row: -row.memory_gib / row.limit_gib)[:8]
    return [
        "## Memory",
        "The fullest published plans. "
        + (
            f"{len(hosted)} recipes keep activations of some blocks on the host; these blocks are left out of their "
            "memory, and our plans have no such offload."
            if hosted
            else ""
        ),
        markdown_table(
            [
                Column(header="row", cells=tuple(row.id for row in tight), text=True),
                Column(header="question", cells=tuple(row.title for row in tight), text=True),
                Column(header="memory GiB", cells=tuple(f"{row.memory_gib:.1f}" for row in tight)),
                Column(header="at least", cells=tuple(f"{row.memory_low_gib:.1f}" for row in tight)),
                Column(header="device", cells=tuple(f"{row.limit_gib:.0f}" for row in tight)),
                Column(header="blocks on the host", cells=tuple(str(row.offloaded_layers or "") for row in tight)),
            ]
        ),
    ]
