"""What choices among measured layouts by prediction cost, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from autopar.report.columns import Column, markdown_table
from autopar.report.numbers import signed_percent
from autopar.validate.choices import Sweep

WORST = 12


def sweeps_text(kinds: Mapping[str, Sequence[Sweep]], title_of: Callable[[str], str]) -> str:
    """Losses by source and the worst sweeps; ``kinds`` are those of ``Study.sweeps``."""
    groups = {name: _by_source(found) for name, found in kinds.items()}
    unseen = groups["model left out"]
    if not unseen:
        return "No source measured several layouts of one model."

    def mean_tau(sweeps: Sequence[Sweep]) -> str:
        known = [s.tau for s in sweeps if s.tau is not None]
        return f"{statistics.mean(known):.2f}" if known else ""

    def losses(name: str, summary: Callable[[list[float]], float]) -> tuple[str, ...]:
        return tuple(signed_percent(summary([s.regret for s in groups[name][source]])) for source in unseen)

    table = markdown_table(
        [
            Column(header="source", cells=tuple(map(title_of, unseen)), text=True),
            Column(header="sweeps", cells=tuple(str(len(s)) for s in unseen.values())),
            Column(header="layouts", cells=tuple(str(sum(x.rows for x in s)) for s in unseen.values())),
            Column(header="mean tau", cells=tuple(mean_tau(s) for s in unseen.values())),
            Column(header="mean loss", cells=losses("model left out", statistics.mean)),
            Column(header="worst loss", cells=losses("model left out", max)),
            Column(header="shipped: mean", cells=losses("shipped", statistics.mean)),
            Column(header="worst", cells=losses("shipped", max)),
            Column(header="one run known: mean", cells=losses("one run", statistics.mean)),
            Column(header="worst", cells=losses("one run", max)),
        ]
    )
    worst = sorted(kinds["shipped"], key=lambda sweep: -sweep.regret)[:WORST]
    return (
        "Sweeps of one model, batch and number of devices with at least three layouts. Loss: how much longer the "
        "layout that was predicted fastest (model left out) took than the fastest one; *shipped* with the "
        "specifications as they stand, *one run known* if a run of each width, tp and microbatch was measured in "
        f"another sweep.\n\n{table}\nThe largest losses as shipped:\n\n" + markdown_table(_columns(worst, title_of))
    )


def _by_source(sweeps: Sequence[Sweep]) -> dict[str, list[Sweep]]:
    found: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        found.setdefault(sweep.source, []).append(sweep)
    return found


def _columns(sweeps: Sequence[Sweep], title_of: Callable[[str], str]) -> list[Column]:
    return [
        Column(header="source", cells=tuple(title_of(s.source) for s in sweeps), text=True),
        Column(header="sweep", cells=tuple(s.name for s in sweeps), text=True),
        Column(header="layouts", cells=tuple(str(s.rows) for s in sweeps)),
        Column(header="predicted fastest", cells=tuple(s.first for s in sweeps), text=True, code=True),
        Column(header="fastest", cells=tuple(s.fastest for s in sweeps), text=True, code=True),
        Column(header="loss", cells=tuple(signed_percent(s.regret) for s in sweeps)),
    ]
