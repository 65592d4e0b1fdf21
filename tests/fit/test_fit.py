"""The fit finds what was put in, refits without a part, and writes back without touching anything else."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, replace

import numpy as np
import pytest

from autopar.errors import InputError
from autopar.fit import architecture, fit, leave_out, predict, prepare
from autopar.fit.constants import Constant, Quantity, parse_path, spec_values
from autopar.fit.fork import fork_map
from autopar.fit.leave_out import model_keys
from autopar.fit.solve import Terms, linear_minimum, minimise, objective
from autopar.fit.write_back import origin_keys, set_value
from autopar.model.load import load_model
from autopar.model.spec import ModelSpec
from autopar.plan import Plan, parse_slug
from autopar.workload import Workload
from costmodels.hardware import Cluster, load_cluster, load_device
from costmodels.shipped import replaced
from costmodels.units import GIB


@dataclass(frozen=True)
class Run:
    id: str
    source: str
    spec: ModelSpec
    workload: Workload
    cluster: Cluster
    plan: Plan
    stack: str = "megatron-core"
    measured_s: float | None = None
    measured_memory_gib: float | None = None


LEVEL = Constant(
    name="devices.a100-80g.matmul.peak_fraction", start=0.8, low=0.4, high=1.0, prior_sigma=0.3, why="level of products"
)
NETWORK = Constant(name="fabrics.infiniband.efficiency", start=0.75, low=0.2, high=1.0, prior_sigma=0.5, why="network")
RESERVE = Constant(
    name="stacks.megatron-core.memory.reserve_bytes", start=2e9, low=1e8, high=2e10, prior_sigma=1.0, why="libraries",
    quantity=Quantity.MEMORY,
)  # fmt: skip


def _runs() -> list[Run]:
    small, large = load_model("gpt3-1.3b"), load_model("gpt3-175b")
    workload = Workload(global_batch=64, seq_len=1024)
    return [
        *(
            Run(f"small-{i}", "small", small, workload, load_cluster("a100-80g:4x8"), parse_slug(slug))
            for i, slug in enumerate(("tp1.dp32.z1.mb1.ac-none", "tp4.dp8.z1.mb2.ac-none", "tp8.dp4.z1.mb4.ac-full"))
        ),
        *(
            Run(f"large-{i}", "large", large, workload, load_cluster("a100-80g:8x8"), parse_slug(slug))
            for i, slug in enumerate(("tp8.pp8.mb1.ac-full", "tp8.pp4.dp2.z1.mb1.ac-full"))
        ),
    ]


def _measured(level: float, network: float, reserve: float) -> list[Run]:
    truth = {LEVEL.name: level, NETWORK.name: network, RESERVE.name: reserve}
    runs = _runs()
    found = predict(prepare(runs), spec_values((LEVEL, NETWORK, RESERVE), truth))
    return [
        replace(run, measured_s=float(found.step_s[i]), measured_memory_gib=float(found.memory_bytes[i]) / GIB)
        for i, run in enumerate(runs)
    ]


def test_fit_recovers_what_was_put_in() -> None:
    runs = _measured(0.68, 0.5, 5e9)
    weak = [replace(c, prior_sigma=5.0) for c in (LEVEL, NETWORK, RESERVE)]
    result = fit(runs, weak, processes=1)
    assert result.values[LEVEL.name] == pytest.approx(0.68, rel=0.01)
    assert result.values[NETWORK.name] == pytest.approx(0.5, rel=0.05)
    assert result.values[RESERVE.name] == pytest.approx(5e9, rel=0.03)
    assert np.max(np.abs(result.solution.residuals)) < 0.01


def test_prior_bounds_and_sources_hold_a_constant_back() -> None:
    runs = _measured(0.6, 0.75, 2e9)
    held = fit(runs, [replace(LEVEL, prior_sigma=1e-3)], processes=1).values[LEVEL.name]
    assert held == pytest.approx(0.8, rel=0.01)
    bounded = fit(runs, [replace(LEVEL, low=0.7, prior_sigma=5.0)], processes=1).values[LEVEL.name]
    assert bounded == pytest.approx(0.7, abs=1e-6)
    elsewhere = fit(runs, [replace(LEVEL, sources=("nowhere",))], processes=1).values[LEVEL.name]
    assert elsewhere == pytest.approx(0.8, abs=1e-9)


def test_two_processes_find_the_same() -> None:
    runs = _measured(0.68, 0.5, 5e9)
    one, two = (fit(runs, (LEVEL, NETWORK), processes=n) for n in (1, 2))
    assert one.values == two.values


def test_leaving_a_model_out_equals_a_fit_without_it() -> None:
    runs = _measured(0.68, 0.5, 5e9)
    runs = [replace(r, measured_s=(r.measured_s or 0) * (1.06 if r.source == "large" else 1.0)) for r in runs]
    result = fit(runs, (LEVEL, NETWORK), processes=1)
    left = leave_out(result, [architecture(run) for run in runs], processes=1)
    without = fit([r for r in runs if r.source == "small"], (LEVEL, NETWORK), processes=1)
    values = left.values[architecture(runs[-1])]
    assert values == pytest.approx(without.values, rel=0.03)
    found = predict(result.problem, spec_values((LEVEL, NETWORK), values))
    expected = math.log(found.step_s[-1] / (runs[-1].measured_s or 0))
    row = [o.case for o in result.observations].index(len(runs) - 1)
    assert left.residuals[row] == pytest.approx(expected, abs=1e-6)
    assert abs(left.residuals[row]) > abs(result.solution.residuals[row])


def test_equal_configurations_share_one_weight_and_a_source_is_capped() -> None:
    runs = _measured(0.7, 0.6, 2e9)
    doubled = [*runs, replace(runs[0], id="again")]
    weights = {o.case: o.weight for o in fit(doubled, (LEVEL,), processes=1).observations}
    assert weights[0] == weights[5] == pytest.approx(0.5)
    assert weights[1] == 1.0
    capped = fit(doubled, (LEVEL,), processes=1, source_cap=1.5).observations
    assert sum(o.weight for o in capped if o.case in (0, 1, 2, 5)) == pytest.approx(1.5)


def test_a_run_that_cannot_be_priced_does_not_end_the_rest() -> None:
    runs = [*_runs(), replace(_runs()[0], id="bad", plan=parse_slug("tp7.dp4.z1.mb1.ac-none"))]
    problem = prepare(runs)
    assert list(problem.failures) == [5]
    assert "ranks" in problem.failures[5]
    found = predict(problem)
    assert np.isnan(found.step_s[5]) and np.all(np.isfinite(found.step_s[:5]))
    assert sum(found.terms.values())[:5] == pytest.approx(found.step_s[:5])


def test_a_case_keeps_its_own_link_where_the_specification_changes() -> None:
    runs = _runs()
    slow = replace(runs[0].cluster, network_link=replace(runs[0].cluster.network_link, bandwidth=1e9))
    problem = prepare([replace(runs[0], cluster=slow)])
    base = predict(problem).step_s[0]
    faster = predict(problem, {parse_path(NETWORK.name): 1.0}).step_s[0]
    assert faster < base


def test_replaced_values_end_with_their_block() -> None:
    before = load_device("h100").matmul.peak_fraction
    with replaced({("devices", "h100", "matmul", "peak_fraction"): 0.123}):
        assert load_device("h100").matmul.peak_fraction == 0.123
    assert load_device("h100").matmul.peak_fraction == before


def test_constants_are_checked() -> None:
    with pytest.raises(InputError, match="between"):
        replace(LEVEL, start=2.0)
    with pytest.raises(InputError, match="no path"):
        replace(LEVEL, name="a100.matmul")
    assert parse_path('stacks.x.traffic."norm.backward"') == ("stacks", "x", "traffic", "norm.backward")


def test_robust_minimum_ignores_a_far_row_and_meets_the_normal_equations() -> None:
    rng = np.random.default_rng(3)
    jacobian = rng.normal(size=(40, 3))
    truth = np.asarray([0.3, -0.2, 0.1])
    residuals = -jacobian @ truth
    residuals[0] += 5.0
    wide = Terms(
        weights=np.ones(40), noise=0.05, sigma=np.full(3, 100.0), low=np.full(3, -9.0), high=np.full(3, 9.0)
    )  # fmt: skip
    found = minimise(wide, lambda x: residuals + jacobian @ x, lambda x, r: jacobian)
    assert found.x == pytest.approx(truth, abs=0.02)
    plain = np.linalg.lstsq(jacobian, -residuals, rcond=None)[0]
    assert np.linalg.norm(plain - truth) > 5 * np.linalg.norm(found.x - truth)
    for nudge in np.eye(3) * 1e-3:
        moved = objective(wide, found.x + nudge, residuals + jacobian @ (found.x + nudge))
        assert moved >= found.objective - 1e-9
    fixed = replace(wide, high=np.asarray([0.1, 9.0, 9.0]))
    assert linear_minimum(fixed, np.zeros(3), residuals, jacobian)[0] == pytest.approx(0.1)


def test_fork_map_keeps_order_and_raises() -> None:
    assert fork_map(lambda x: x * x, list(range(7)), 2) == [x * x for x in range(7)]
    with pytest.raises(ZeroDivisionError):
        fork_map(lambda x: 1 // (x - 3), list(range(7)), 2)


TOML = """\
name = "x"  # stays
matmul_of = { fp8 = 1, bf16 = 2.5 }

[matmul]
peak_fraction = 0.8  # of the peak

[node_link]
efficiency = 0.7

[node_link.origins]
efficiency = "table"

[origins]
"matmul.peak_fraction" = "assumed"
"""


def test_write_back_changes_one_value_and_nothing_else() -> None:
    changed = set_value(TOML, ("matmul", "peak_fraction"), 0.77)
    assert changed == TOML.replace("0.8  #", "0.77  #")
    changed = set_value(TOML, ("matmul_of", "bf16"), 3.0)
    assert changed == TOML.replace("2.5", "3.0")
    changed = set_value(TOML, ("origins", "matmul.peak_fraction"), 'fitted on "x", 5%')
    assert tomllib.loads(changed)["origins"]["matmul.peak_fraction"] == 'fitted on "x", 5%'
    assert len(changed.splitlines()) == len(TOML.splitlines())


def test_write_back_adds_what_is_missing() -> None:
    changed = set_value(TOML, ("matmul", "k_half"), 143.0)
    assert changed == TOML.replace("# of the peak\n", "# of the peak\nk_half = 143.0\n")
    changed = set_value(TOML, ("host", "calls", "a.b"), 2.0)
    assert tomllib.loads(changed)["host"]["calls"]["a.b"] == 2.0
    assert tomllib.loads(changed)["origins"] == tomllib.loads(TOML)["origins"]
    assert tomllib.loads(set_value('name = "x"\n', ("size",), 1.0)) == {"name": "x", "size": 1.0}


def test_origins_go_to_the_deepest_table_of_origins() -> None:
    assert origin_keys(TOML, ("node_link", "efficiency")) == ("node_link", "origins", "efficiency")
    assert origin_keys(TOML, ("matmul", "k_half")) == ("origins", "matmul.k_half")


def test_a_source_of_a_single_model_leaves_by_layout() -> None:
    runs = _measured(0.68, 0.5, 5e9)
    other = replace(runs[0], id="memory", source="large", measured_s=None)
    small_keys, large_keys = model_keys([*runs, other])[:3], model_keys([*runs, other])[3:5]
    assert len(set(small_keys)) == 3 and len(set(large_keys)) == 2
    mixed = [replace(run, source="all") for run in runs]
    assert list(model_keys(mixed)) == [architecture(run) for run in runs]
