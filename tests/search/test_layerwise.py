"""The layer-wise core against brute force, HiGHS and closed forms."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from autopar.errors import InputError, NoFeasiblePlan
from autopar.search.layerwise import solve
from autopar.search.layerwise.chain import ROUNDING, chain_of
from autopar.search.layerwise.hops import LONG_RUN, shortest_path
from autopar.search.layerwise.relaxation import path_of, relax
from autopar.search.layerwise.rounds import gathers, peel, proves, restore


def instance(kind, layers, strategies, seed):
    random = np.random.default_rng(seed)
    time, memory = random.random((2, layers, strategies))
    transition = 0.2 * random.random((strategies, strategies))
    if kind == "integers":
        time, memory = random.integers(0, 5, (2, layers, strategies)).astype(float)
        transition = random.integers(0, 3, (strategies, strategies)).astype(float)
    elif kind == "correlated":
        time = 1 - memory + 0.01 * random.random((layers, strategies))
    elif kind == "free moves":
        transition = np.zeros((strategies, strategies))
    elif kind == "forbidden":
        time = np.where(random.random(time.shape) < 0.2, np.inf, time)
        transition = np.where(random.random(transition.shape) < 0.2, np.inf, transition)
    elif kind == "alike":
        time, memory = np.repeat(time[:1], layers, axis=0), np.repeat(memory[:1], layers, axis=0)
    elif kind == "unlike moves":
        transition = random.random((max(layers - 1, 0), strategies, strategies))
    elif kind == "duplicates":
        time[:, 1:], memory[:, 1:] = time[:, :1], memory[:, :1]
        transition = np.full((strategies, strategies), 0.1)
    return time, memory, transition, random


KINDS = ("random", "integers", "correlated", "free moves", "forbidden", "alike", "unlike moves", "duplicates")


def every_choice(time, memory, transition):
    """(cost, memory) of all allowed choices, [choices, 2]."""
    layers, strategies = time.shape
    moves = np.broadcast_to(transition, (max(layers - 1, 0), strategies, strategies))
    choices = np.asarray(list(product(range(strategies), repeat=layers)))
    at = np.arange(layers)
    cost = time[at, choices].sum(axis=1) + moves[at[:-1], choices[:, :-1], choices[:, 1:]].sum(axis=1)
    return np.stack([cost, memory[at, choices].sum(axis=1)], axis=1)[np.isfinite(cost)]


def highs(time, memory, transition, limit):
    """The same by mixed integer programming: flow through the layers, one unit."""
    layers, strategies = time.shape
    arcs = [(layer, a, b) for layer in range(layers - 1) for a in range(strategies) for b in range(strategies)]
    num_nodes = layers * strategies
    cost = np.concatenate([time.ravel(), [transition[a, b] for _, a, b in arcs]])
    rows, columns, values, upper = [], [], [], []

    def equation(terms, bound):
        for column, value in terms:
            rows.append(len(upper))
            columns.append(column)
            values.append(value)
        upper.append(bound)

    equation([(node, 1) for node in range(strategies)], 1)
    leaving, arriving = {}, {}
    for number, (layer, a, b) in enumerate(arcs):
        leaving.setdefault((layer, a), []).append((num_nodes + number, 1))
        arriving.setdefault((layer + 1, b), []).append((num_nodes + number, 1))
    for (layer, node), terms in [*leaving.items(), *arriving.items()]:
        equation([(layer * strategies + node, -1), *terms], 0)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(upper), len(cost)))
    weights = np.concatenate([memory.ravel(), np.zeros(len(arcs))])[None]
    found = milp(
        cost, bounds=Bounds(0, 1), integrality=np.concatenate([np.ones(num_nodes), np.zeros(len(arcs))]),
        constraints=[LinearConstraint(matrix, upper, upper), LinearConstraint(weights, -np.inf, limit)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    return found.fun


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_equals_brute_force(kind, layers, strategies, seed):
    time, memory, transition, random = instance(kind, layers, strategies, seed)
    allowed = every_choice(time, memory, transition)
    if not len(allowed):
        with pytest.raises(NoFeasiblePlan, match="allowed"):
            solve(time, memory, transition, 1e9)
        return
    limit = random.choice(allowed[:, 1])
    found = solve(time, memory, transition, limit)
    best = allowed[allowed[:, 1] <= limit * (1 + ROUNDING), 0].min()
    assert found.cost == pytest.approx(best, rel=1e-11, abs=1e-12)
    assert found.bound == found.cost
    assert found.memory <= limit * (1 + ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_passes_and_short_runs_lose_nothing(kind, monkeypatch):
    """Passes that thin out from two labels on, and runs that count as long from six layers on."""
    monkeypatch.setattr("autopar.search.layerwise.exact.FIRST_WIDTH", 2)
    monkeypatch.setattr("autopar.search.layerwise.hops.LONG_RUN", 6)
    monkeypatch.setattr("autopar.search.layerwise.rounds.LONG_RUN", 6)
    monkeypatch.setattr("autopar.search.layerwise.KEPT_LAYERS", (1, 2))
    for seed in range(25):
        time, memory, transition, random = instance(kind, 9, 3, seed)
        if seed % 2 and transition.ndim == 2:
            time[2:], memory[2:] = time[2], memory[2]
        allowed = every_choice(time, memory, transition)
        if not len(allowed):
            continue
        limit = np.quantile(allowed[:, 1], random.choice([0.001, 0.01, 0.1, 0.5]))
        found = solve(time, memory, transition, limit)
        best = allowed[allowed[:, 1] <= limit * (1 + ROUNDING), 0].min()
        assert found.cost == pytest.approx(best, rel=1e-11)
        assert found.bound == found.cost


@pytest.mark.parametrize("kind", ["random", "integers", "correlated", "free moves", "alike"])
def test_equals_highs(kind):
    time, memory, transition, _ = instance(kind, 12, 8, 3)
    limit = 0.4 * memory.min(axis=1).sum() + 0.6 * memory[np.arange(12), time.argmin(axis=1)].sum()
    assert solve(time, memory, transition, limit).cost == pytest.approx(highs(time, memory, transition, limit), 1e-6)


def test_a_limit_that_equals_a_sum_is_met_in_any_order_of_summation():
    random = np.random.default_rng(0)
    for _ in range(30):
        memory = random.integers(1, 40, (20, 3)) / 10
        time = 10 - memory
        least = memory.min(axis=1)
        for limit in (least.sum(), sum(least.tolist()), sum(least[::-1].tolist())):
            assert solve(time, memory, np.zeros((3, 3)), limit).cost == pytest.approx(200 - least.sum(), rel=1e-12)


def test_what_does_not_fit_names_the_least_memory_that_does():
    time, memory, transition, _ = instance("random", 5, 3, 0)
    least = memory.min(axis=1).sum()
    with pytest.raises(NoFeasiblePlan, match="the least that would do is") as raised:
        solve(time, memory, transition, 0.9 * least)
    named = float(str(raised.value).rsplit(" ", 1)[1])
    assert solve(time, memory, transition, named).memory == named
    assert named == pytest.approx(least)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": np.zeros((2, 2))}, "memory has shape"),
        ({"time": np.zeros(3)}, "time has shape"),
        ({"transition": np.zeros((2, 2))}, "transition has shape"),
        ({"time": np.full((4, 3), np.nan)}, "nan"),
        ({"memory_limit": np.nan}, "memory_limit is nan"),
    ],
)
def test_wrong_arrays_are_named(change, message):
    given_ = {"time": np.ones((4, 3)), "memory": np.ones((4, 3)), "transition": np.zeros((3, 3)), "memory_limit": 9.0}
    with pytest.raises(InputError, match=message):
        solve(**(given_ | change))


def test_ties_go_to_the_lower_number_and_answers_repeat():
    time, memory, transition, _ = instance("duplicates", 6, 4, 1)
    found = solve(time, memory, transition, memory.max() * 6)
    assert found.choice.tolist() == [0] * 6
    time, memory, transition, _ = instance("integers", 8, 6, 2)
    first, second = (solve(time, memory, transition, memory.mean() * 5) for _ in range(2))
    assert first.choice.tolist() == second.choice.tolist()


def test_greedy_is_worse_and_the_relaxed_bound_is_never_above():
    worse = 0
    for seed in range(20):
        time, memory, transition, _ = instance("random", 6, 4, seed)
        limit = memory.min(axis=1).sum() * 1.6
        best = solve(time, memory, transition, limit).cost
        chain = chain_of(time, memory, transition)
        light, heavy = (path_of(chain, array.argmin(axis=1)) for array in (memory, time))
        heavy = path_of(chain, shortest_path(chain, time)[1])
        if heavy.memory <= limit:
            continue
        assert relax(chain, limit, 0.0, light, heavy).bound <= best + 1e-12
        choice, used = [], 0.0
        least = memory.min(axis=1)
        for layer in range(6):
            room = limit - used - least[layer + 1 :].sum()
            choice.append(int(np.where(memory[layer] <= room, time[layer], np.inf).argmin()))
            used += memory[layer, choice[-1]]
        greedy = path_of(chain, np.asarray(choice)).cost
        assert greedy >= best - 1e-12
        worse += greedy > best + 1e-9
    assert worse > 5


def test_without_enough_labels_the_bound_says_so():
    random = np.random.default_rng(0)
    memory = random.random((40, 30))
    limit = 0.5 * (memory.min(axis=1) + memory.max(axis=1)).sum()
    found = solve(1 - memory, memory, np.zeros((30, 30)), limit, effort=1000)
    assert found.bound < found.cost < found.bound * (1 + 1e-3)
    assert found.bound >= 40 - limit - 1e-9


@pytest.mark.parametrize("free", [True, False])
def test_long_runs_are_solved_by_a_short_one(free):
    random = np.random.default_rng(4)
    time, memory = np.repeat(random.random((2, 1, 6)), 2 * LONG_RUN, axis=1)
    transition = np.zeros((6, 6)) if free else 0.3 * np.abs(np.arange(6)[:, None] - np.arange(6))
    limit = 0.5 * (memory[:, time[0].argmin()].sum() + memory.min(axis=1).sum())
    found = solve(time, memory, transition, limit)
    whole = np.random.default_rng(5).random((2 * LONG_RUN, 6)) * 1e-13
    unlike = solve(time + whole, memory, transition, limit)
    assert found.cost == pytest.approx(unlike.cost, rel=1e-10)
    assert found.states < unlike.states


def test_peeled_rounds_are_put_back_and_a_false_claim_is_not_proved():
    time, memory = np.tile([1.0, 2.0], (400, 1)), np.tile([2.0, 1.0], (400, 1))
    transition = np.asarray([[0.0, 0.5], [0.5, 0.0]])
    chain = chain_of(time, memory, transition)
    light, heavy = (path_of(chain, np.full(400, strategy)) for strategy in (1, 0))
    relaxation = relax(chain, 600.0, 0.0, light, heavy)
    short = peel(chain, 600.0, relaxation, 16)
    assert short is not None
    assert short.chain.num_layers < 50
    half = np.repeat([0, 1], 200)
    best = path_of(chain, half)
    assert best.cost == 600.5
    assert proves(chain, 600.0, short, relaxation, best, 1e-9)
    assert not proves(chain, 600.0, short, relaxation, path_of(chain, np.full(400, 1)), 1e-9)
    restored = restore(short, half[200 - short.chain.num_layers // 2 :][: short.chain.num_layers])
    assert restored is not None
    assert len(restored) == 400
    assert gathers(transition, 0)
    assert not gathers(np.asarray([[0.0, 0.1, 9.0], [0.1, 0.0, 0.1], [9.0, 0.1, 0.0]]), 1)


def test_hops_equal_steps():
    random = np.random.default_rng(0)
    cost = np.repeat(random.random((1, 5)), 300, axis=0)
    moves = random.random((5, 5))
    value, nodes = shortest_path(chain_of(cost, cost, moves), cost)
    reached = cost[0]
    for layer in range(1, 300):
        reached = (reached[:, None] + moves).min(axis=0) + cost[layer]
    assert value == pytest.approx(reached.min(), rel=1e-12)
    assert path_of(chain_of(cost, cost, moves), nodes).cost == pytest.approx(value, rel=1e-12)
