"""Key steps that follow the sample, and telling when a calibration does not fit, on the trained tiny-flux."""

import itertools
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import dpcache
from dpcache.judge.metrics import psnr
from dpcache.run.adaptive import Found, Guide, _student
from dpcache.zoo import BUNDLED
from tests.conftest import PROMPT, STEPS, draw

FLUX = BUNDLED["tiny-flux"]
CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def calibration(loaded_flux):
    return dpcache.calibrate(loaded_flux, FLUX.calibration_inputs(6), progress=False, **CALL)


@pytest.fixture(scope="module")
def guide(calibration):
    return Guide(calibration, calibration.plan(5), dpcache.Recipe(), adaptive=True)


@contextmanager
def restless(flux):
    """A model whose outputs jump from step to step, as none did that was calibrated."""
    noise = torch.Generator().manual_seed(3)

    def disturb(_, args, kwargs):
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden + torch.randn(hidden.shape, generator=noise)}

    handle = flux.transformer.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_the_next_key_step_is_the_best_at_every_price(guide):
    """The table holds optimal paths: no choice of key steps costs less, full calls included."""
    cost = guide.calibration.cost()
    for log_price in (guide._log_price - 3, guide._log_price, guide._log_price + 3):
        price = 2.0 ** (round(log_price / np.log(2) * 4) / 4)

        def total(keys, price=price):
            ends = [*keys, STEPS]
            hops = zip([0, *keys], keys, ends[1:], strict=False)
            return sum(cost[i, j, k] for i, j, k in hops) + price * (len(keys) - 1)

        table, found = guide._table(log_price), [0]
        while (after := table[found[-2] if len(found) > 1 else 0, found[-1]]) < STEPS:
            found.append(int(after))
        others = itertools.chain.from_iterable(itertools.combinations(range(1, STEPS), n) for n in range(STEPS))
        assert total(found) <= min(total((0, *keys)) for keys in others) * (1 + 1e-9)


def test_harder_samples_get_more_key_steps_and_ordinary_ones_the_number_asked_for(guide, calibration):
    counts = [len(guide.path(3, [0, 1, 3], [residual] * 2)) for residual in (-2.0, 0.0, 2.0)]
    assert counts[0] < counts[1] < counts[2]
    assert guide._mean_calls() == pytest.approx(5, abs=0.7)
    assert guide.path(3, [0, 1, 3, 7], [0.3, 0.1])[:3] == [0, 1, 3]


def test_a_generation_tells_what_it_decided(flux, calibration):
    with dpcache.enabled(flux, calibration, num_key_steps=5, adaptive=True):
        first = draw(flux)
        stats = dpcache.stats(flux)
        np.testing.assert_array_equal(draw(flux), first)
        assert dpcache.stats(flux).decisions == stats.decisions
    steps = tuple(decision.step for decision in stats.decisions)
    assert steps == tuple(step for step in stats.computed_steps if step)
    assert [d.next_key_step for d in stats.decisions] == [*steps[1:], STEPS]
    assert all(d.ratio is not None and 0.1 < d.ratio < 10 for d in stats.decisions)
    assert "times the usual" in str(stats.decisions[0])
    full = draw(flux)
    assert psnr(full[0], first[0]) > 30


def test_where_every_step_is_computed_nothing_is_decided(flux, calibration):
    full = draw(flux)
    with dpcache.enabled(flux, calibration, num_key_steps=STEPS, adaptive=True):
        np.testing.assert_array_equal(draw(flux), full)
        assert dpcache.stats(flux).decisions == ()


def test_watching_changes_nothing_and_no_more_values_are_held(flux, calibration):
    held = []

    def count(pipe, index, timestep, kwargs):
        held.append(dpcache.stats(pipe).cached_values)
        return kwargs

    plan = calibration.plan(5)
    with dpcache.enabled(flux, plan):
        expected = draw(flux)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in ("ignore", "warn", "full"):
            with dpcache.enabled(flux, calibration, num_key_steps=5, on_drift=policy):
                np.testing.assert_array_equal(draw(flux, callback_on_step_end=count), expected)
                drift = dpcache.stats(flux).drift
                assert (drift is None) == (policy == "ignore")
        with dpcache.enabled(flux, calibration, num_key_steps=5, adaptive=True):
            draw(flux, callback_on_step_end=count)
    assert max(held) == 3


def test_drift_is_told_once_and_ends_in_full_steps(flux, calibration):
    with dpcache.enabled(flux, calibration, num_key_steps=5, on_drift="warn"), restless(flux):
        with pytest.warns(UserWarning, match="does not fit this generation") as caught:
            draw(flux)
            draw(flux)
        assert len(caught) == 1
        assert dpcache.stats(flux).drift > 1.5
        assert len(dpcache.stats(flux).computed_steps) == 5
    with dpcache.enabled(flux, calibration, num_key_steps=5, on_drift="full"):
        with restless(flux), pytest.warns(UserWarning, match="computed in full"):
            draw(flux)
        stats = dpcache.stats(flux)
        assert len(stats.computed_steps) > 5
        assert stats.computed_steps[-1] == STEPS - 1
        # The next one, which is ordinary, follows the plan again.
        draw(flux)
        assert dpcache.stats(flux).computed_steps == calibration.plan(5).key_steps


def test_what_it_takes(flux, calibration):
    plan = calibration.plan(5)
    for how, name in (({"adaptive": True}, "adaptive"), ({"on_drift": "warn"}, "on_drift")):
        with pytest.raises(TypeError, match=f"{name} can be given with a calibration only"):
            dpcache.enable(flux, plan, **how)
    few = dpcache.calibrate(flux, [PROMPT], progress=False, **CALL)
    with pytest.raises(dpcache.CalibrationError, match="calibrate on 4 or more"):
        dpcache.enable(flux, few, num_key_steps=5, adaptive=True)
    with dpcache.enabled(flux, few, num_key_steps=5):
        draw(flux)
        assert dpcache.stats(flux).drift is None
    with pytest.raises(TypeError, match="adaptive plans have no max_gap"):
        dpcache.enable(flux, calibration, num_key_steps=5, adaptive=True, recipe=dpcache.Recipe(max_gap=4))


def test_the_limit_is_a_quantile_of_ordinary_inputs():
    # Of Student's t, from tables.
    for degrees, expected in ((9, 3.690), (5, 4.773), (29, 3.038)):
        assert _student(0.9975, degrees) == pytest.approx(expected, rel=0.02)
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        inputs, found = rng.normal(0, 0.2, size=10), Found()
        new = rng.normal(0, 0.2)
        for _ in range(4):
            found.add(inputs, new)
        alarms += found.has_drifted()
    assert alarms <= 4
