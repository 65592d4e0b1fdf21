"""A replanning for the terminal and as plain data: the plans to go on with, what switching costs, when it has paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autopar.report.columns import Column, terminal_table
from autopar.report.numbers import significant
from autopar.report.style import time_scale
from autopar.search.replan import Option, Replanning
from costmodels.units import GB, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType


def _options(found: Replanning) -> list[tuple[str, Option]]:
    """The options with their names; one row where the old plan is the one to go on with."""
    if found.kept is None:
        return [("new", found.new)]
    if found.kept.plan == found.new.plan:
        return [("old", found.new)]
    return [("new", found.new), ("old", found.kept)]


def replan_columns(found: Replanning) -> list[Column]:
    """Both plans: their step, what moves over all ranks and to the one that needs most, and what switching takes."""
    rows = _options(found)
    options = [option for _, option in rows]
    scale, unit = time_scale(min(option.estimate.step_s for option in options))

    def gigabytes(sizes: list[float]) -> tuple[str, ...]:
        return tuple(significant(size / GB) for size in sizes)

    return [
        Column(header="plan", cells=tuple(name for name, _ in rows), text=True),
        Column(header="slug", cells=tuple(option.plan.slug for option in options), text=True, code=True),
        Column(header="ranks", cells=tuple(str(option.plan.layout.world_size) for option in options), drop=2),
        Column(header=f"step {unit}", cells=tuple(significant(o.estimate.step_s / scale) for o in options)),
        Column(header="GiB", cells=tuple(f"{option.estimate.memory_gib:.1f}" for option in options), drop=3),
        Column(header="moved GB", cells=gigabytes([float(option.received.sum()) for option in options])),
        Column(header="inside nodes", cells=gigabytes([_inside(option) for option in options]), drop=4),
        Column(header="most per rank", cells=gigabytes([float(option.received.max()) for option in options]), drop=1),
        Column(header="switch s", cells=tuple(significant(option.switch_s) for option in options)),
    ]


def ranges_text(numbers: Sequence[int]) -> str:
    """Numbers with runs drawn together, -1 as ``+``: ``0-3 8 +``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number >= 0 and number == runs[-1][-1] + 1 and runs[-1][0] >= 0:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ["+" if run[0] < 0 else str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return " ".join(words)


def _inside(option: Option) -> float:
    """Bytes that come from the same node."""
    return 0.0 if option.from_checkpoint else float(option.move.inside.sum())


def replan_sentences(found: Replanning) -> list[str]:
    """What the table does not say, in sentences."""
    old, new = found.old.layout.world_size, found.new
    lines = [f"The run was {found.old.slug} on {old} ranks; there are {found.world} now."]
    if found.lost:
        ranks = "rank" if len(found.lost) == 1 else "ranks"
        lines.append(f"State of {len(found.lost)} old {ranks} is lost.")
    for name, option in _options(found):
        if option.from_checkpoint:
            size = significant(float(option.move.lost.sum()) / GB)
            lines.append(
                f"{name.capitalize()} plan: {size} GB have no holder left, so that every rank goes back to the last "
                f"checkpoint, which takes {format_seconds(option.storage_s)}."
            )
        elif option.restarts:
            lines.append(
                f"{name.capitalize()} plan: moving takes {format_seconds(option.links_s)} over the links, "
                f"{format_seconds(option.storage_s)} through checkpoint storage."
            )
    if found.new.node_order and found.new.restarts and not found.new.from_checkpoint:
        order = ranges_text(found.new.node_order)
        lines.append(f"Start the new plan's nodes in this order of their old numbers (+ is a new machine): {order}.")
    if any(option.restarts for _, option in _options(found)):
        storage = significant(found.costs.storage_bandwidth / GB)
        again = (
            f", and {found.costs.steps_since_checkpoint:g} steps run again"
            if found.costs.steps_since_checkpoint
            else ""
        )
        lines.append(
            f"Taken as given: a restart of {found.costs.restart_s:g} s, checkpoint storage of {storage} GB/s{again}."
        )
    lines.append(_verdict(found, new))
    return lines


def _verdict(found: Replanning, new: Option) -> str:
    kept, steps = found.kept, found.payback_steps
    if found.refused is not None:
        return f"The old plan cannot run: {found.refused.detail}. The new one is {new.plan.slug}."
    assert kept is not None
    if kept.plan == new.plan:
        same = "It goes on as it is" if not new.restarts else f"It goes on after {format_seconds(new.switch_s)}"
        within = f" for the {found.remaining_steps:g} steps that remain" if found.remaining_steps is not None else ""
        return f"The old plan is still the best{within}. {same}."
    if steps is None:
        return "The new plan is no faster per step, but costs less to switch to."
    shorter = f"every step is then {1 - new.estimate.step_s / kept.estimate.step_s:.1%} shorter"
    if not steps:
        return f"Moving pays at once, since the old plan has to be moved as well; {shorter}."
    count = math.ceil(steps)
    return f"Moving has paid after {count:,} step{'s' if count > 1 else ''}; {shorter}."


def replan_table(found: Replanning, *, width: int = 120) -> RenderableType:
    """The plans and the verdict, for a terminal."""
    from rich.console import Group
    from rich.text import Text

    table = terminal_table(replan_columns(found), width, title="Replanning", strong=(0,))
    return Group(table, Text(), *(Text(line) for line in replan_sentences(found)))


def replan_json(found: Replanning) -> dict[str, Any]:
    """The same as plain data; bytes and seconds."""
    kept, refused = found.kept, found.refused
    return {
        "old": {"slug": found.old.slug, "ranks": found.old.layout.world_size, "lost": list(found.lost)},
        "world_size": found.world,
        "new": _option_json(found.new),
        "kept": _option_json(kept) if kept else None,
        "refused": {"reason": refused.reason, "detail": refused.detail, **refused.numbers} if refused else None,
        "payback_steps": found.payback_steps,
        "remaining_steps": found.remaining_steps,
    }


def _option_json(option: Option) -> dict[str, Any]:
    move, received = option.move, option.received
    most = int(np.argmax(received))
    return {
        "slug": option.plan.slug,
        "ranks": option.plan.layout.world_size,
        "step_s": option.estimate.step_s,
        "memory_gib": option.estimate.memory_gib,
        "moved_bytes": float(received.sum()),
        "inside_nodes_bytes": _inside(option),
        "kept_bytes": float(move.kept.sum()),
        "lost_bytes": float(move.lost.sum()),
        "missing_bytes_by_kind": dict(move.moved_by_label),
        "most_moved_bytes": float(received[most]),
        "most_moved_rank": most,
        "model_bytes": move.model_bytes,
        "links_s": option.links_s,
        "storage_s": option.storage_s,
        "from_checkpoint": option.from_checkpoint,
        "restarts": option.restarts,
        "switch_s": option.switch_s,
        "node_order": list(option.node_order),
    }
