"""What ``autopar plan`` prints and writes for a mixed cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.cli.common import say, show, terminal_width

if TYPE_CHECKING:
    from autopar.estimate.mixed_result import MixedEstimate
    from autopar.estimate.mixed_setting import MixedSetting
    from autopar.workload import Optimizer, Precision

MIXED_PLAN_SCHEMA = 1


def mixed_setting_of(
    model: str, cluster: str, batch: int, seq_len: int, precision: Precision, optimizer: Optimizer, stack: str
) -> tuple[Any, MixedSetting] | None:
    """As ``common.setting_of``; None where the cluster's devices are all alike."""
    if not cluster.endswith(".toml"):
        return None
    from autopar.estimate.mixed_setting import mixed_setting
    from autopar.model.build import build_graph
    from autopar.model.load import load_model
    from autopar.workload import Workload
    from costmodels.islands import MixedCluster, load_hardware
    from costmodels.stack import load_stack

    hardware = load_hardware(cluster)
    if not isinstance(hardware, MixedCluster):
        return None
    spec = load_model(model)
    workload = Workload(global_batch=batch, seq_len=seq_len, precision=precision, optimizer=optimizer)
    graph = build_graph(spec, seq_len=seq_len, precision=precision)
    return spec, mixed_setting(graph, workload, hardware, load_stack(stack))


def plan_mixed(setting: MixedSetting, *, top: int, as_json: bool, out: Path | None, title: str) -> None:
    """Search a mixed cluster, print the ranked plans, and write the best as mixed_plan.json. Raises NoFeasiblePlan."""
    from autopar.report.mixed_tables import mixed_plans_table
    from autopar.search.mixed import search_mixed
    from costmodels.records import write_record

    result = search_mixed(setting, top=top)
    if as_json:
        plans = [{"rank": i + 1, **mixed_json(e, setting)} for i, e in enumerate(result.best)]
        found = {
            "considered": result.considered, "feasible": result.feasible, "rejected": dict(result.rejected),
            "bound_s": result.bound_s, "seconds": result.seconds,
        }  # fmt: skip
        assumptions = list(result.best[0].assumptions)
        print(json.dumps({"schema_version": 1, "plans": plans, "search": found, "assumptions": assumptions}))
    else:
        show(mixed_plans_table(result, setting, width=terminal_width(), title=title))
    if out is not None:
        write_record(out / "mixed_plan.json", result.best[0].plan, MIXED_PLAN_SCHEMA)
        say(f"wrote {out / 'mixed_plan.json'}")


def mixed_json(estimate: MixedEstimate, setting: MixedSetting) -> dict[str, Any]:
    """One mixed plan as printed by ``--json``: seconds, GiB and plain ratios."""
    from costmodels.records import to_plain
    from costmodels.units import GIB

    names = [island.name for island in setting.cluster.islands]
    return {
        "slug": estimate.plan.slug,
        "plan": to_plain(estimate.plan),
        "step_s": estimate.step_s,
        "line_s": list(estimate.line_s),
        "memory_gib": estimate.memory_gib,
        "mfu": estimate.mfu,
        "tokens_per_s": estimate.tokens_per_s,
        "breakdown_s": dict(estimate.breakdown),
        "idle_devices": dict(estimate.idle_devices),
        "stages": [
            {
                "line": stage.line, "island": names[stage.island], "blocks": stage.blocks, "busy_s": stage.busy_s,
                "memory_gib": stage.memory_bytes / GIB, "memory_limit_gib": stage.memory_limit / GIB,
            }
            for stage in estimate.stages
        ],
    }  # fmt: skip
