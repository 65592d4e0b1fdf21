"""How fast the search is and that it finds the best: ``python benchmarks/search.py``.

Prints, for Llama 3.1 405B on 64 to 65,536 H100 and DeepSeek-V3 on 2,048 H800, layouts considered, layouts priced one by
one and CPU seconds; the rate at which arrays of layouts are priced; and the regret of the search against an exhaustive
enumeration of uniform plans, each of which is priced. All figures are of one run on one core.
"""

from __future__ import annotations

import time

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Setting, estimate_many
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.search.exhaustive import search
from autopar.search.rules import plan_rules
from autopar.search.space import PLAIN, enumerate_plans
from autopar.workload import Workload
from costmodels.hardware import load_cluster
from costmodels.stack import load_stack

SIZES = (8, 32, 128, 512, 2048, 8192)
"""Nodes of 8."""
UNIFORM = (
    ("gpt3-13b", "a100-80g:4x8", 256, 2048),
    ("llama2-7b", "a100-80g:2x8", 64, 4096),
    ("llama3-8b", "h100:1x8", 128, 8192),
    ("llama3-70b", "h100:8x8", 256, 8192),
    ("mixtral-8x7b", "h100:8x8", 256, 4096),
)


def setting_of(model: str, cluster: str, batch: int, seq_len: int) -> Setting:
    return Setting(
        graph=build_graph(load_preset(model), seq_len=seq_len),
        workload=Workload(global_batch=batch, seq_len=seq_len),
        cluster=load_cluster(cluster),
        stack=load_stack("megatron-core"),
    )


def cpu_seconds(setting: Setting) -> tuple[float, str]:
    """Median of three searches, and what the last found."""
    taken, line = [], ""
    for _ in range(3):
        start = time.process_time()
        try:
            found = search(setting, distinct=True)
            line = f"{found.considered:>14,} {found.priced:>8,}  {found.best[0].plan.slug}"
        except NoFeasiblePlan:
            line = "nothing fits"
        taken.append(time.process_time() - start)
    return float(np.median(taken)), line


def growth() -> None:
    print(f"{'':28s} {'CPU s':>7s} {'considered':>14s} {'priced':>8s}  best")
    cases = [("llama3.1-405b", f"h100:{nodes}x8", max(512, nodes), 8192) for nodes in SIZES]
    cases += [("llama3.1-405b", "h100:2048x8", 2048, 8192), ("deepseek-v3", "h800:256x8", 4096, 4096)]
    for model, cluster, batch, seq_len in cases:
        seconds, line = cpu_seconds(setting_of(model, cluster, batch, seq_len))
        print(f"{model + ' ' + cluster:28s} {seconds:7.2f} {line}")


def uniform() -> None:
    print("\nExhaustive enumeration of uniform plans, all priced, against the search:")
    print(f"{'':28s} {'plans':>8s} {'plans/s':>9s} {'regret':>8s} {'whole space':>12s}")
    for model, cluster, batch, seq_len in UNIFORM:
        setting = setting_of(model, cluster, batch, seq_len)
        plans = enumerate_plans(setting, PLAIN)
        alive = plans.select(~np.any(list(plan_rules(setting, plans, PLAIN).values()), axis=0))
        start = time.process_time()
        costs = estimate_many(setting, alive)
        rate = len(alive) / (time.process_time() - start)
        best = costs.step_s[costs.fits(setting)].min()
        regret = search(setting, top=1, space=PLAIN).best[0].step_s / best - 1
        gain = search(setting, top=1).best[0].step_s / best - 1
        print(f"{model + ' ' + cluster:28s} {len(alive):8,} {rate:9,.0f} {regret:8.1%} {gain:12.1%}")


if __name__ == "__main__":
    growth()
    uniform()
