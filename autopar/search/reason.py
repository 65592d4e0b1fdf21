"""Why a plan ranks where it does: the named terms in which it differs from the best."""

from __future__ import annotations

from autopar.estimate import Estimate

LABELS = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "recomputation",
    "tensor_parallel": "tensor parallel traffic",
    "context_parallel": "context parallel traffic",
    "expert_parallel": "exchange with experts",
    "launch_bound": "kernel launches",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_transfer": "pipeline transfers",
    "processor_sharing": "shared processors",
    "gradient_accumulation": "gradient accumulation",
    "data_parallel": "data parallel traffic",
    "optimizer": "optimizer",
    "step_overhead": "overhead of a step",
    "stragglers": "stragglers",
}


def reason(candidate: Estimate, best: Estimate) -> str:
    """One line: where the best plan's time goes, or what costs a slower plan the most against the best."""
    if candidate.plan == best.plan:
        overhead = {
            name: seconds
            for name, seconds in best.breakdown.items()
            if name not in ("forward", "backward", "optimizer", "processor_sharing") and seconds > 0
        }
        if not overhead:
            return "nothing but compute"
        name = max(overhead, key=overhead.__getitem__)
        return f"fastest; beside compute mostly {LABELS[name]} ({overhead[name] / best.step_s:.0%})"
    difference = {name: candidate.breakdown[name] - best.breakdown[name] for name in best.breakdown}
    worst = max(difference, key=difference.__getitem__)
    return f"{candidate.step_s / best.step_s - 1:+.0%}: {LABELS[worst]} {difference[worst] / best.step_s:+.0%}"
