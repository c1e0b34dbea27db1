"""What is followed where nothing was measured: smooth key steps, the trend, and pipelines enabled with K alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from dpcache import Schedule
from dpcache.errors import GridError
from dpcache.plan.curves import smooth_key_steps
from dpcache.plan.levels import noise_levels
from dpcache.plan.predictors import Taylor, Trend
from dpcache.run.plans import Curves
from dpcache.zoo import load_pipeline


@given(st.integers(1, 120).flatmap(lambda t: st.tuples(st.integers(1, t), st.just(t))), st.floats(0.05, 3))
def test_smooth_key_steps_are_k_different_steps_whose_gaps_grow(numbers, tail):
    count, steps = numbers
    keys = smooth_key_steps(count, steps, tail=tail)
    assert len(keys) == count and keys[0] == 0 and keys[-1] < steps
    gaps = np.diff(keys)
    assert (gaps >= 1).all()
    if 3 * count < steps:  # with more, rounding shows
        assert (np.diff(gaps) >= -1).all()


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5, unique=True), st.floats(0.1, 5))
def test_the_trend_follows_the_line_at_first_and_never_runs_away(keys, rate):
    keys = sorted(keys)
    gap = keys[-1] - keys[-2]
    ahead = keys[-1] + np.arange(1, 200)
    trend = Trend(rate).coefficients(keys, ahead)
    assert trend.sum(axis=1) == pytest.approx(1)  # constants are predicted exactly
    moved = -trend[:, 0]  # multiples of the last difference
    assert (np.diff(moved) >= 0).all() and moved[-1] <= 1 / rate + 1e-12
    almost_straight = Trend(1e-6).coefficients(keys, ahead[: 3 * gap])
    assert almost_straight == pytest.approx(Taylor(1).coefficients(keys, ahead[: 3 * gap]), abs=1e-4)


def test_the_first_step_makes_no_trend():
    assert Trend().coefficients([0, 3], [4, 9]).tolist() == [[0, 1], [0, 1]]
    assert Trend().coefficients([3], [4, 9]).tolist() == [[1], [1]]


def test_a_trend_needs_a_rate_above_zero():
    with pytest.raises(ValueError, match="rate must be above 0"):
        Trend(0.0)


@pytest.fixture(scope="module")
def pipeline():
    found = load_pipeline("tiny-dit")
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipeline, steps):
    generator = torch.Generator().manual_seed(3)
    return pipeline(class_labels=[3], num_inference_steps=steps, generator=generator, output_type="np").images


@pytest.mark.parametrize("steps", [3, 8, 20, 50])
def test_a_number_of_key_steps_is_enough_for_calls_of_any_length(pipeline, steps):
    plain = draw(pipeline, steps)
    with dpcache.enabled(pipeline, num_key_steps=5):
        cached = draw(pipeline, steps)
        stats = dpcache.stats(pipeline)
    count = min(5, steps)
    assert stats.computed_steps == smooth_key_steps(count, steps)
    assert len(stats.predicted_steps) == steps - count
    assert np.array_equal(cached, plain) == (count == steps)


def test_a_speedup_is_enough(pipeline):
    with dpcache.enabled(pipeline, speedup=4):
        draw(pipeline, 20)
        assert dpcache.stats(pipeline).computed_steps == smooth_key_steps(5, 20)


def test_the_schedule_for_a_sampler_is_the_one_that_enable_follows(pipeline):
    with dpcache.enabled(pipeline, num_key_steps=4):
        expected = draw(pipeline, 20)
    schedule = Schedule.for_sampler(pipeline.scheduler, 4)
    assert schedule == Schedule.for_sampler(pipeline.scheduler, speedup=5)
    assert schedule.sigmas is not None and len(schedule.sigmas) == 21
    with dpcache.enabled(pipeline, schedule):
        assert np.array_equal(draw(pipeline, 20), expected)


def test_enable_also_corrects_where_that_is_safe(pipeline):
    """What it follows is `for_sampler`'s schedule, with corrections, and comes nearer to the full run."""
    full = draw(pipeline, 50)
    pipeline.scheduler.set_timesteps(50)
    corrected = Curves(13).of(50, pipeline.scheduler)
    assert corrected.corrections and Curves(12).of(50, pipeline.scheduler).corrections == {}
    without = corrected.model_copy(update={"corrections": {}, "sigmas": noise_levels(pipeline.scheduler)})
    assert without == Schedule.for_sampler(pipeline.scheduler, 13)
    with dpcache.enabled(pipeline, num_key_steps=13):
        followed = draw(pipeline, 50)
    with dpcache.enabled(pipeline, corrected):
        assert np.array_equal(draw(pipeline, 50), followed)
    with dpcache.enabled(pipeline, without):
        uncorrected = draw(pipeline, 50)
    assert np.square(followed - full).mean() < np.square(uncorrected - full).mean()


def test_nothing_is_corrected_where_steps_are_of_no_known_kind(pipeline):
    from diffusers import EulerAncestralDiscreteScheduler

    ancestral = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    ancestral.set_timesteps(50)
    assert Curves(13).of(50, ancestral).corrections == {}
    assert Curves(13).of(50).corrections == {}


def test_a_loop_of_ones_own_says_how_many_steps_it_takes(pipeline):
    with pytest.raises(TypeError, match="give sigmas"), dpcache.following(pipeline.transformer, num_key_steps=3):
        pass


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "num_key_steps=13"),
        ({"num_key_steps": 3, "speedup": 2.0}, "num_key_steps=13"),
        ({"num_key_steps": 3, "recipe": dpcache.Recipe()}, "with a calibration only"),
    ],
)
def test_what_to_follow_has_to_be_said_once(pipeline, how, message):
    with pytest.raises(TypeError, match=message):
        dpcache.enable(pipeline, **how)


def test_a_scheduler_that_knows_no_steps_is_refused():
    from diffusers import DDIMScheduler

    with pytest.raises(GridError, match="set_timesteps"):
        Schedule.for_sampler(DDIMScheduler(), 5)
