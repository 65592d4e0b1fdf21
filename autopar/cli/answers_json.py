"""Answers as ``--json`` prints them: seconds, GiB and plain ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.estimate import Estimate
    from autopar.plan import Rejected
    from autopar.search.explain import Explanation
    from autopar.search.pareto import Front
    from autopar.search.strategies import StrategyComparison
    from autopar.search.why_not import WhyNot
    from autopar.validate.sensitivity import Sensitivity, Trial


def brief(estimate: Estimate) -> dict[str, Any]:
    """A plan's main numbers."""
    return {
        "slug": estimate.plan.slug,
        "step_s": estimate.step_s,
        "memory_gib": estimate.memory_gib,
        "mfu": estimate.mfu,
        "tokens_per_s_per_gpu": estimate.tokens_per_s_per_gpu,
    }


def front_json(front: Front) -> dict[str, Any]:
    """The front, by size, the fastest of each first."""
    return {
        "points": [
            {
                "gpus": point.world_size,
                **brief(point.estimate),
                "headroom": point.headroom,
                "tokens_per_s": point.tokens_per_s,
            }
            for point in front.points
        ],
        "sizes": [
            {"gpus": size, "considered": number, "unfit": front.unfit.get(size)}
            for size, number in front.considered.items()
        ],
    }


def rejected_json(rejected: Rejected) -> dict[str, Any]:
    """One reason with its numbers."""
    return {"reason": rejected.reason, "detail": rejected.detail, "numbers": dict(rejected.numbers)}


def why_not_json(answer: WhyNot) -> dict[str, Any]:
    """Why a plan is not the answer."""
    from autopar.search.why_not import waterfall

    price = answer.estimate
    return {
        "slug": answer.plan.slug,
        "feasible": not answer.rejections,
        "violations": [rejected_json(rejected) for rejected in answer.rejections],
        "step_s": None if price is None else price.step_s,
        "memory_gib": None if price is None else price.memory_gib,
        "slower": answer.slower,
        "rank": answer.rank,
        "best": brief(answer.best),
        "waterfall_s": {} if price is None else waterfall(price, answer.best),
        "changes": [
            {
                "change": remedy.words,
                **brief(remedy.estimate),
                "slower": remedy.estimate.step_s / answer.best.step_s - 1,
            }
            for remedy in answer.remedies
        ],
    }


def explain_json(answer: Explanation) -> dict[str, Any]:
    """What binds a plan."""
    from autopar.search.explain import MORE

    return {
        **brief(answer.estimate),
        "binding": answer.binding,
        "shares": dict(answer.shares),
        "headroom": answer.headroom,
        "by_term_s": {term: dict(row) for term, row in answer.by_term.items()},
        "more": MORE,
        "improvements": [
            {
                "resource": found.resource.value,
                "gain": found.gain,
                "replanned_gain": found.replanned_gain,
                "replanned_slug": None if found.replanned is None else found.replanned.slug,
            }
            for found in answer.improvements
        ],
    }


def comparison_json(found: StrategyComparison) -> dict[str, Any]:
    """Strategies, sizes and the map."""
    return {
        "strategies": [
            {
                "name": s.name,
                "rule": s.rule,
                "why_not": s.why_not or None,
                "plan": None
                if s.estimate is None
                else {**brief(s.estimate), "breakdown_s": dict(s.estimate.breakdown)},
            }
            for s in found.strategies
        ],
        "scaling": [
            {
                "gpus": point.world_size,
                "best": None if point.best is None else brief(point.best),
                "rule_of_thumb": None if point.thumb is None else brief(point.thumb),
                "why_not": point.why_not or None,
            }
            for point in found.scaling
        ],
        "cells": [
            {
                "tp": cell.tp,
                "pp": cell.pp,
                "step_s": cell.step_s,
                "slug": cell.slug or None,
                "reason": cell.reason or None,
                "least_memory": cell.memory_ratio,
            }
            for cell in found.cells
        ],
        "considered": found.considered,
    }


def sensitivity_json(answer: Sensitivity) -> dict[str, Any]:
    """Whether a choice survives."""
    chosen = answer.chosen
    return {
        "slug": chosen.plan.slug,
        "error": answer.error,
        "survives": not answer.changes,
        "worst_regret": answer.worst_regret,
        "runner_up": None if answer.runner_up is None else brief(answer.runner_up),
        "margin": answer.margin,
        "step_band_s": [chosen.step_band.low, chosen.step_band.high],
        "beyond_band": answer.told_apart,
        "fits_at_high": answer.fits_at_high,
        "trials": [_trial_json(trial) for trial in answer.trials],
        "measure": list(dict.fromkeys(trial.doubt.measure for trial in answer.changes)),
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.doubt.name,
        "value": trial.doubt.value,
        "why": trial.doubt.why,
        "factor": trial.factor,
        "step_s": trial.chosen.step_s,
        "fits": trial.fits,
        "best": None if trial.best is None else brief(trial.best),
        "regret": trial.regret,
        "survives": trial.survives,
        "measure": trial.doubt.measure,
    }
