"""The paper's cost tensor against recorded fixtures and the definition, and the Taylor coefficients."""

from math import factorial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from dpcache.measure import taylor_errors
from dpcache.plan.costs import sampler_cost, schedule_cost, schedule_costs
from dpcache.plan.predictors import Fitted, Taylor, chosen_ridge, taylor_coefficients
from dpcache.run.schedulers import step_influence

REFERENCE = Path(__file__).parent / "reference"


@pytest.mark.parametrize("order", [1, 2])
def test_paper_fixture(order):
    fixture = np.load(REFERENCE / f"paper_pact_t20_order{order}.npz")
    cost = dpcache.paper_cost(fixture["features"], order=int(fixture["order"]))
    assert cost.dtype == np.float64
    assert cost.shape == fixture["cost"].shape
    np.testing.assert_array_equal(np.isinf(cost), np.isinf(fixture["cost"]))
    finite = np.isfinite(cost)
    np.testing.assert_allclose(cost[finite], fixture["cost"][finite], rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_cost_follows_its_definition_entry_by_entry(order):
    rng = np.random.default_rng(order)
    steps = 14
    features = rng.normal(size=(steps, 2, 3, 5)).cumsum(axis=0)
    cost = dpcache.paper_cost(features, order=order)
    flat = features.reshape(steps, -1)
    i, j = 3, 6
    history = [*range(i - order + 1, i + 1), j]
    total = 0.0
    for t in range(j + 1, steps):
        prediction = taylor_coefficients(history, t, order) @ flat[history]
        total += np.abs(prediction - flat[t]).mean() / 2
        assert cost[i, j, t] == pytest.approx(total, rel=1e-9)


def test_cost_is_the_same_from_a_torch_tensor_in_half_precision():
    features = torch.randn(10, 7, 300).cumsum(dim=0).to(torch.bfloat16)
    from_half = dpcache.paper_cost(features)
    from_full = dpcache.paper_cost(features.to(torch.float64).numpy())
    finite = np.isfinite(from_full)
    np.testing.assert_allclose(from_half[finite], from_full[finite], rtol=1e-5)


def test_cost_is_the_same_however_the_columns_are_divided(monkeypatch):
    features = torch.randn(12, 700, dtype=torch.float64).cumsum(dim=0)
    whole = dpcache.paper_cost(features)
    monkeypatch.setattr(taylor_errors, "_COLUMNS", {"cpu": 64})
    monkeypatch.setattr(taylor_errors, "_ERRORS", {"cpu": 128})
    np.testing.assert_allclose(dpcache.paper_cost(features, device="cpu"), whole, rtol=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_sampler_cost_follows_its_definition_entry_by_entry(order, power):
    """The error of a hop is the weighted sum of its predictions' errors, formed here from the values themselves."""
    rng = np.random.default_rng(order)
    steps, runs = 12, 3
    received = rng.normal(size=(runs, steps, 40)).cumsum(axis=1)
    weights = rng.normal(size=steps)
    gram = np.einsum("rtd,rsd->rts", received, received) / 40
    cost = sampler_cost(gram, weights, Taylor(order), power=power)
    for i, j in [(0, 0), (0, 1), (0, 4), (1, 2), (3, 6), (9, 11)]:
        history = [*range(max(i - order + 1, 0), i + 1), j] if i < j and order else [j]
        error = np.zeros((runs, 40))
        for k in range(j + 1, steps + 1):
            rms = np.sqrt((error**2).mean(axis=1))
            assert cost[i, j, k] == pytest.approx((rms**power).mean(), rel=1e-6, abs=1e-9)
            if k < steps:  # step k is skipped by every longer hop
                prediction = np.einsum("a,rad->rd", taylor_coefficients(history, k, order), received[:, history])
                error += weights[k] * (prediction - received[:, k])
    assert np.isinf(cost[5, 5, :]).all() and np.isinf(cost[2, 6, :7]).all() and np.isinf(cost[7, 3, :]).all()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_schedules_cost_is_that_of_its_path_where_the_tensor_knows_its_history(power):
    """Of order 1 the tensor knows every key step that is used."""
    rng = np.random.default_rng(0)
    received = rng.normal(size=(2, 12, 40)).cumsum(axis=1)
    gram, weights = np.einsum("rtd,rsd->rts", received, received) / 40, rng.normal(size=12)
    cost = sampler_cost(gram, weights, Taylor(1), power=power)
    plan = dpcache.plan(cost, 5, first_key_steps=1)
    schedule = dpcache.Schedule.from_key_steps(plan.key_steps, 12, order=1)
    assert schedule_cost(gram, weights, schedule, power=power) == pytest.approx(plan.cost)
    alone = [schedule_cost(one[None], weights, schedule, power=power) for one in gram]
    assert schedule_costs(gram, weights, schedule, power=power).tolist() == pytest.approx(alone)


def test_the_ridge_that_errs_least_on_other_runs_is_chosen():
    """Noise at every step had better not be followed; smooth curves that all runs share can be, closely."""
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 1, 30)

    def ridge(noise: float) -> float:
        curves = rng.normal(size=(6, 3, 40)).transpose(0, 2, 1) @ np.stack([steps**0, steps, steps**2])
        runs = curves.transpose(0, 2, 1) + noise * rng.normal(size=(6, 30, 40))
        return chosen_ridge(np.einsum("rtd,rsd->rts", runs, runs) / 40, 2)

    assert ridge(0.3) > ridge(1e-4)
    assert chosen_ridge(np.eye(30)[None], 2, default=0.5) == 0.5


@pytest.mark.parametrize("order", [0, 1, 2])
def test_fitted_predictions_are_the_least_squares_ones(order):
    """Against numpy's own least squares on the recorded values; no other linear prediction costs less."""
    rng = np.random.default_rng(order)
    values = rng.normal(size=(10, 300)).cumsum(axis=0)
    gram = values @ values.T / 300
    predictor = Fitted(gram, order, ridge=0.0)
    coefficients = predictor.coefficients([0, 2, 3, 6], [7, 9])
    keys = [0, 2, 3, 6][-(order + 1) :]
    for row, step in zip(coefficients, [7, 9], strict=True):
        np.testing.assert_allclose(row, np.linalg.lstsq(values[keys].T, values[step])[0], rtol=1e-6)
    fitted, taylor = (sampler_cost(gram[None], np.ones(10), p) for p in (predictor, Taylor(order)))
    finite = np.isfinite(taylor)
    assert (fitted[finite] <= taylor[finite] + 1e-9).all()
    shrunk = Fitted(gram, order, ridge=0.1).coefficients([0, 2, 3, 6], [9])
    assert np.linalg.norm(shrunk) < np.linalg.norm(coefficients[1])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda s, n: s.sigmas[n + 1] - s.sigmas[n]),
        (EulerDiscreteScheduler(), lambda s, n: s.sigmas[n + 1] - s.sigmas[n]),
        (DDIMScheduler(clip_sample=False), lambda s, n: ddim_factor(s, n)),
    ],
    ids=["flow-euler", "euler", "ddim"],
)
def test_influence_is_exact_where_a_step_is_linear(scheduler, expected):
    scheduler.set_timesteps(10)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for n, t in enumerate(scheduler.timesteps):
        output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(n + 1))
        after = scheduler.step(output, t, sample, return_dict=False)[0]
        assert step_influence(output, sample, after) == pytest.approx(float(expected(scheduler, n)), rel=1e-3)
        sample = after


def ddim_factor(scheduler, n):
    """What DDIM multiplies the predicted noise by (Song et al. 2020, equation 12, eta = 0)."""
    t = int(scheduler.timesteps[n])
    before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    a = scheduler.alphas_cumprod[t]
    b = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    return (1 - b).sqrt() - (b / a).sqrt() * (1 - a).sqrt()


def test_cost_rejects_what_it_cannot_measure():
    features = np.ones((10, 4))
    features[7, 2] = np.nan
    with pytest.raises(ValueError, match="step 7"):
        dpcache.paper_cost(features)
    with pytest.raises(ValueError, match="more than 2 steps"):
        dpcache.paper_cost(np.ones((2, 4)))


def recurrence(values: np.ndarray, keys: list[int], step: int, order: int) -> float:
    """The paper's recurrence, run forwards over the key steps with numbers instead of coefficients."""
    differences: list[float] = []
    previous = None
    for key in keys:
        current = [float(values[key])]
        for m in range(1, min(order, len(differences)) + 1):
            current.append((current[m - 1] - differences[m - 1]) / (key - previous))
        differences, previous = current, key
    return sum(d * (step - keys[-1]) ** m / factorial(m) for m, d in enumerate(differences))


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(0, 1000),
)
def test_taylor_coefficients_equal_the_recurrence(steps, ahead, order, seed):
    keys = sorted(steps)
    values = np.random.default_rng(seed).normal(size=64)
    coefficients = taylor_coefficients(keys, keys[-1] + ahead, order)
    assert len(coefficients) == min(order + 1, len(keys))
    used = values[keys[-len(coefficients) :]]
    expected = recurrence(values, keys, keys[-1] + ahead, order)
    assert coefficients @ used == pytest.approx(expected, rel=1e-9, abs=1e-9 * np.abs(coefficients).sum())


def test_taylor_coefficients_reject_bad_keys():
    for keys in ([], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="keys"):
            taylor_coefficients(keys, 9)
    with pytest.raises(ValueError, match="order"):
        taylor_coefficients([1, 2], 9, order=-1)
