"""What was published of FLUX.1-dev in full: the curve is near it, no default forbids it."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from benchmarks import golden

import dpcache
from dpcache.measure.anchor_limit import forbids_good_gaps
from dpcache.plan.costs import sampler_cost
from dpcache.plan.curves import smooth_key_steps
from dpcache.plan.predictors import Taylor, Trend

from .test_planner import path_cost

STEPS = golden.STEPS


@pytest.fixture(scope="module")
def best() -> list[tuple[int, ...]]:
    """The 64 best."""
    return [tuple(row) for row in golden.best().tolist()]


def searched() -> list[tuple[int, ...]]:
    return [golden.golden_path(), golden.by_method("budcache_search", 13), golden.by_method("budcache_search", 21)]


@pytest.mark.parametrize("found", searched(), ids=len)
def test_the_curve_is_near_what_search_found(found):
    assert golden.steps_a_key(smooth_key_steps(len(found), STEPS), found) <= golden.NEAR


def test_all_that_was_run_is_ranked(best):
    schedules = golden.every()
    assert schedules.shape == (golden.published()["exhaustive"]["schedules_tried"], golden.KEYS)
    assert len({*best}) == 64 and golden.golden_path() in best
    assert {tuple(row) for row in schedules[:: len(schedules) - 1].tolist()} == {
        (0, 1, 2, 3, 4, 5, 6, 7, 49),
        (0, 1, 2, 44, 45, 46, 47, 48, 49),
    }
    limited = golden.costs()[0]
    tensor = np.load(golden.REFERENCE / "flux1_dev_t50_cost.npz")["cost"]
    np.testing.assert_allclose(limited.of(np.array(best)), [path_cost(tensor, keys) for keys in best], rtol=1e-9)
    assert np.isinf(limited.of(np.array(best))).sum() == 41
    assert all(np.isfinite(cost.of(np.array(best))).all() for cost in golden.costs()[1:])
    # What the planner finds is the cheapest of all that were run.
    forced = {"first_key_steps": 3, "last_key_steps": 1}
    planned = dpcache.plan(tensor, golden.KEYS, **forced).key_steps
    assert planned == tuple(schedules[limited.of(schedules).argmin()].tolist())


def test_noise_levels_are_those_of_the_pipeline():
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=golden.published()["mu"])
    np.testing.assert_allclose(golden.sigmas(), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize("predictor", [Taylor(0), Taylor(1), Taylor(2), Trend()], ids=str)
def test_no_default_forbids_one_of_the_best(best, predictor):
    """Neither the sampler's cost nor what `Recipe()` and `dpcache.plan` force: with a bonus each is the plan."""
    values = np.random.default_rng(0).normal(size=(STEPS, 80))
    cost = sampler_cost((values @ values.T / 80)[None], golden.sigmas()[:-1], predictor)
    recipe = dpcache.Recipe()
    assert (recipe.method, recipe.max_gap, recipe.last_key_steps) == ("sampler", None, 0)
    for keys in best:
        assert np.isfinite(path_cost(cost, keys))
        assert keys[: recipe.forced_first] == tuple(range(recipe.forced_first))
    for keys in best[::16]:
        favoured = cost.copy()
        stops = [*keys, STEPS]
        for n in range(len(keys)):
            favoured[stops[max(n - 1, 0)], stops[n], stops[n + 1]] = -1e6
        assert dpcache.plan(favoured, len(keys)).key_steps == keys
        assert dpcache.plan(favoured, len(keys), first_key_steps=recipe.forced_first).key_steps == keys


def test_the_limit_is_of_the_papers_cost_alone_and_can_be_lifted(best):
    values = np.random.default_rng(0).normal(size=(STEPS, 80))
    limited, lifted = dpcache.paper_cost(values), dpcache.paper_cost(values, anchor_limit=1.0)
    assert sum(np.isinf(path_cost(limited, keys)) for keys in best) == 41
    assert all(np.isfinite(path_cost(lifted, keys)) for keys in best)


def test_when_the_limit_is_too_short():
    assert [k for k in range(1, STEPS + 1) if forbids_good_gaps(k, STEPS)] == list(range(2, 11))
    assert forbids_good_gaps(4, 12) and not forbids_good_gaps(11, 12)  # of 12 steps there is one to skip
    assert not any(forbids_good_gaps(k, STEPS, 1.0) for k in range(1, STEPS + 1))


def test_planning_by_the_paper_with_few_key_steps_warns(loaded_flux):
    settings = {"num_inference_steps": 12, "max_sequence_length": 24}
    calibration = dpcache.calibrate(loaded_flux, ["a small red ring"], progress=False, **settings)
    paper = dpcache.Recipe(method="paper")
    with pytest.warns(
        UserWarning, match="within 3 steps of each other, which forbids good schedules with 5 of"
    ) as caught:
        calibration.plan(5, recipe=paper)
    assert Path(caught[0].filename) == Path(__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.plan(5)  # no such limit
        calibration.plan(10, recipe=paper)
        calibration.plan(3, recipe=paper)  # nothing to choose
