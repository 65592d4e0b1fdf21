"""Factors of a predicted step time between which four of five left-out runs lie, fitted; see costmodels.step_bands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.fit.problem import Case
from costmodels.step_bands import BandRule, Bands

Floats = NDArray[np.float64]

SHARE = 0.8
"""Of the truths that an interval holds."""

FEWEST = 10
"""Left-out runs from which an engine on a device gets a band of its own."""


def traits(case: Case) -> tuple[str, str, bool]:
    """Engine without variants, device, and whether the model has experts."""
    return case.stack.split("+")[0], case.cluster.device.name, case.spec.num_experts > 0


def band_of(bands: Bands, case: Case) -> BandRule:
    """The first rule that matches a case."""
    return bands.rule_of(*traits(case))


def fit_bands(
    cases: Sequence[Case],
    residuals: Floats,
    source_residuals: Floats,
    *,
    widen: float = 1.0,
    what: str = "published runs",
) -> Bands:
    """Rules from left-out errors.

    Args:
        cases: measured runs.
        residuals: log(predicted / measured) of each with its model left out of the fit.
        source_residuals: the same with its source left out, for engines that nothing was fitted on.
        widen: factor of every interval's logarithms, from ``widening``.
        what: the runs, for the origin.
    """
    found = [traits(case) for case in cases]
    rules = []
    for stack, device, experts in dict.fromkeys(found):
        chosen = np.asarray([f == (stack, device, experts) for f in found])
        if chosen.sum() >= FEWEST:
            origin = f"{what}: model left out, {stack} on {device}"
            rules.append(_rule(residuals[chosen], origin, widen=widen, stack=stack, device=device, experts=experts))
    for experts in (False, True):
        for stack in dict.fromkeys(f[0] for f in found if f[2] == experts):
            chosen = np.asarray([f[0] == stack and f[2] == experts for f in found])
            if chosen.sum() >= FEWEST:
                origin = f"{what}: model left out, {stack} on any device, widened by a fifth for a device not fitted"
                rules.append(_rule(residuals[chosen], origin, widen=1.2 * widen, stack=stack, experts=experts))
    for experts in (False, True):
        chosen = np.asarray([f[2] == experts for f in found])
        if chosen.sum() >= FEWEST:
            rules.append(_rule(source_residuals[chosen], f"{what}: source left out", widen=widen, experts=experts))
    rules.append(_rule(source_residuals, f"{what}: source left out", widen=widen))
    return Bands(band=tuple(rules))


def _rule(
    residuals: Floats,
    origin: str,
    *,
    widen: float = 1.0,
    stack: str = "",
    device: str = "",
    experts: bool | None = None,
) -> BandRule:
    low, high = quantiles(residuals)
    return BandRule(
        low=float(np.exp(-widen * high)), high=float(np.exp(-widen * low)), rows=len(residuals), origin=origin,
        stack=stack, device=device, experts=experts,
    )  # fmt: skip


def quantiles(residuals: Floats) -> tuple[float, float]:
    """Interval of log(predicted / measured) that holds SHARE of unseen runs, 0 included.

    The k-th smallest and largest of n with k = floor((n + 1) (1 - SHARE)/2), at least 1: exact for exchangeable runs
    (split conformal prediction); for few runs the extremes.
    """
    ordered = np.sort(residuals)
    rank = max(1, int((len(ordered) + 1) * (1 - SHARE) / 2 + 1e-9))
    return min(float(ordered[rank - 1]), 0.0), max(float(ordered[-rank]), 0.0)


def coverage(cases: Sequence[Case], residuals: Floats, keys: Sequence[object], *, widen: float = 1.0) -> float:
    """Share of runs inside bands made of the other parts' errors: ``keys`` are the parts that were left out.

    ``widen`` multiplies the logarithms of the bands' ends.
    """
    inside = []
    found = [traits(case) for case in cases]
    for key in dict.fromkeys(keys):
        held = np.asarray([k == key for k in keys])
        for index in np.flatnonzero(held):
            alike = np.asarray([f == found[index] for f in found]) & ~held
            if alike.sum() < FEWEST:
                alike = np.asarray([f[2] == found[index][2] for f in found]) & ~held
            if not alike.any():
                continue
            low, high = quantiles(residuals[alike])
            inside.append(widen * low <= residuals[index] <= widen * high)
    return float(np.mean(inside)) if inside else float("nan")


def widening(cases: Sequence[Case], residuals: Floats, keys: Sequence[object]) -> float:
    """Factor, at least 1, at which bands made of other parts hold SHARE of a part's runs.

    Runs of a model err alike, so that the quantiles of other models' runs alone are too narrow for it.
    """
    for factor in np.arange(1.0, 2.01, 0.05):
        if not coverage(cases, residuals, keys, widen=float(factor)) < SHARE:
            return float(factor)
    return 2.0


def bands_toml(bands: Bands) -> str:
    """The file's text."""
    lines = [
        "# Factors of a predicted step time between which four of five left-out runs were measured.",
        "# Written by `autopar validate --report DIR --ship-bands`; the first rule that matches a case applies.",
    ]
    for rule in bands.band:
        lines += ["", "[[band]]"]
        if rule.stack:
            lines.append(f'stack = "{rule.stack}"')
        if rule.device:
            lines.append(f'device = "{rule.device}"')
        if rule.experts is not None:
            lines.append(f"experts = {str(rule.experts).lower()}")
        lines += [f"low = {rule.low:.3f}", f"high = {rule.high:.3f}", f"rows = {rule.rows}"]
        lines.append(f'origin = "{rule.origin}"')
    return "\n".join(lines) + "\n"
