"""The planner against published figures, brute force, and bad input."""

import itertools
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpcache
from dpcache import InfeasibleBudgetError

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def flux() -> tuple[np.ndarray, dict]:
    schedules = json.loads((REFERENCE / "flux1_dev_t50_schedules.json").read_text())
    return np.load(REFERENCE / "flux1_dev_t50_cost.npz")["cost"], schedules


def path_cost(cost: np.ndarray, keys: tuple[int, ...]) -> float:
    steps = cost.shape[1] - 1
    stops = [*keys, steps]
    return sum(cost[stops[max(n - 1, 0)], stops[n], stops[n + 1]] for n in range(len(keys)))


def test_published_flux_tensor_every_budget(flux):
    cost, published = flux
    plans = dpcache.plan_all(
        cost,
        first_key_steps=published["first_full_steps"],
        last_key_steps=published["last_full_steps"],
        max_gap=published["max_gap"],
    )
    assert len(published["by_full_steps"]) == 20
    for budget, expected in published["by_full_steps"].items():
        found = plans[int(budget)]
        assert found.cost == pytest.approx(expected["optimal_cost"], rel=1e-9)
        assert path_cost(cost, found.key_steps) == pytest.approx(found.cost, rel=1e-12)
        assert found.cost <= expected["paper_cost"] * (1 + 1e-12)
        assert dpcache.plan(cost, int(budget), first_key_steps=3, max_gap=15) == found


def test_all_budgets_at_fifty_steps_under_10_ms(flux):
    """Of processor time, and the best of several: other tests may run on the same machine."""
    cost, _ = flux
    times = []
    for _ in range(20):
        start = time.thread_time()
        plans = dpcache.plan_all(cost)
        times.append(time.thread_time() - start)
    assert len(plans) > 40
    assert min(times) < 0.01


def test_all_budgets_to_63_at_250_steps_within_2_s():
    """With gaps to 64: time and memory beside the costs grow with the gaps, not with the steps."""
    cost = np.random.default_rng(0).random((250, 251, 251))
    tracemalloc.start()
    start = time.thread_time()
    plans = dpcache.plan_all(cost, max_gap=64, max_key_steps=63)
    seconds = time.thread_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 100e6
    assert max(plans) == 63
    for found in plans.values():
        assert path_cost(cost, found.key_steps) == pytest.approx(found.cost)
        assert np.diff([*found.key_steps, 250]).max() <= 64


@st.composite
def problems(draw):
    steps = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Small integers give many ties; infinities give forbidden hops.
    cost = rng.integers(0, 12, size=(steps + draw(st.integers(0, 1)), steps + 1, steps + 1)).astype(float)
    cost[rng.random(cost.shape) < draw(st.sampled_from([0.0, 0.2, 0.6]))] = np.inf
    constraints = {
        "first_key_steps": draw(st.integers(0, steps)),
        "last_key_steps": draw(st.integers(0, steps)),
        "max_gap": draw(st.none() | st.integers(1, steps)),
    }
    return cost, constraints


def brute_force(cost: np.ndarray, first_key_steps: int, last_key_steps: int, max_gap: int | None) -> dict[int, float]:
    steps = cost.shape[1] - 1
    forced = {*range(first_key_steps), *range(steps - last_key_steps, steps)}
    best: dict[int, float] = {}
    for size in range(steps):
        for rest in itertools.combinations(range(1, steps), size):
            keys = (0, *rest)
            gaps = np.diff([*keys, steps])
            if forced <= set(keys) and gaps.max() <= (max_gap or steps):
                best[len(keys)] = min(best.get(len(keys), np.inf), path_cost(cost, keys))
    return {budget: value for budget, value in best.items() if np.isfinite(value)}


@settings(max_examples=300, deadline=None)
@given(problems())
def test_equals_brute_force(problem):
    cost, constraints = problem
    expected = brute_force(cost, **constraints)
    plans = dpcache.plan_all(cost, **constraints)
    assert {budget: found.cost for budget, found in plans.items()} == pytest.approx(expected)
    for budget in range(1, cost.shape[1]):
        if budget in expected:
            found = dpcache.plan(cost, budget, **constraints)
            assert len(found.key_steps) == budget
            assert path_cost(cost, found.key_steps) == pytest.approx(found.cost)
        else:
            with pytest.raises(InfeasibleBudgetError):
                dpcache.plan(cost, budget, **constraints)


def test_infeasible_budget_names_the_smallest_feasible(flux):
    cost, _ = flux
    smallest = min(dpcache.plan_all(cost, max_gap=15))
    with pytest.raises(InfeasibleBudgetError, match=f"smallest feasible number is {smallest}"):
        dpcache.plan(cost, smallest - 1, max_gap=15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_key_steps": 0}, "from 1 to the number of steps"),
        ({"num_key_steps": 51}, "from 1 to the number of steps"),
        ({"num_key_steps": 9, "first_key_steps": 51}, "first_key_steps"),
        ({"num_key_steps": 9, "last_key_steps": -1}, "last_key_steps"),
        ({"num_key_steps": 9, "max_gap": 0}, "max_gap"),
    ],
)
def test_bad_arguments(flux, arguments, message):
    with pytest.raises(ValueError, match=message):
        dpcache.plan(flux[0], **arguments)


def test_bad_tensors():
    with pytest.raises(ValueError, match="shape"):
        dpcache.plan(np.zeros((5, 5)), 2)
    with pytest.raises(ValueError, match="shape"):
        dpcache.plan(np.zeros((3, 5, 5)), 2)
    with pytest.raises(ValueError, match="NaN"):
        dpcache.plan(np.full((5, 6, 6), np.nan), 2)
    with pytest.raises(ValueError, match="max_key_steps"):
        dpcache.plan_all(np.zeros((5, 6, 6)), max_key_steps=0)
