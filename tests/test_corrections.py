"""What key steps make up for, on trained pipelines."""

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

import dpcache
from dpcache.plan.corrections import by_gram, corrected
from dpcache.plan.grids import FLOW, Frame, NoiseGrid, frame
from dpcache.plan.schedule import Term
from dpcache.zoo import BUNDLED
from tests.conftest import PROMPT, STEPS, draw
from tests.pipelines.test_flux import Spy

KEYS = (0, 1, 4, 8)


@pytest.fixture(scope="module")
def calibration(loaded_flux):
    call = {"num_inference_steps": STEPS, "max_sequence_length": 24}
    return dpcache.calibrate(loaded_flux, [PROMPT, "a large blue star, center"], progress=False, **call)


def test_of_curves_that_interpolation_knows_the_whole_hop_is_made_up_for():
    """Outputs in a space of three dimensions follow from four of them; then nothing of a hop's error is left."""
    times, steps = np.linspace(0, 1, 20), 20
    curves = np.stack([np.ones(steps), np.sin(2 * times), times**3])
    values = curves.T @ np.random.default_rng(0).normal(size=(3, 500))
    gram = values @ values.T / 500
    moves = -np.linspace(0.02, 0.08, steps)
    schedule = dpcache.Schedule.from_key_steps((0, 2, 5, 9, 14), steps)
    assert schedule.last_uses[0] == 8  # known before the schedule is changed
    made = corrected(schedule, Frame(moves, np.zeros(steps)), by_gram(gram, moves))
    assert list(made.corrections) == [2, 5, 9, 14]
    assert made.last_uses[0] == 9  # a correction needs it longer
    assert corrected(schedule, Frame(moves, np.full(steps, 1e3)), by_gram(gram, moves)).corrections == {}

    def missed(schedule, before, key):
        hop = range(before + 1, key)
        predicted = {t: sum(term.coefficient * values[term.key_step] for term in schedule.predictions[t]) for t in hop}
        error = sum(moves[t] * (values[t] - predicted[t]) for t in hop)
        return error - moves[key] * sum(
            term.coefficient * values[term.key_step] for term in schedule.corrections.get(key, ())
        )

    for before, key in ((5, 9), (9, 14)):  # with four values known
        assert np.linalg.norm(missed(made, before, key)) < 1e-3 * np.linalg.norm(missed(schedule, before, key))
    np.testing.assert_allclose(by_gram(gram, moves)([], [2, 5]), 0)


@pytest.mark.parametrize("prediction", [FLOW, "epsilon", "v_prediction"])
def test_in_the_frame_a_step_only_adds(prediction):
    """Stepped as diffusers does, with an error in one output: the sample, in the frame's scale, is off by its move."""
    sigmas = (
        np.append(np.linspace(0.95, 0.1, 9), 0.0) if prediction == FLOW else np.append(np.geomspace(9, 0.1, 9), 0.0)
    )
    signal = 1 / np.sqrt(1 + sigmas**2)
    outputs = np.random.default_rng(0).normal(size=9)

    def run(outputs):
        sample = 1.0  # of clean picture and noise in the scale of the picture
        for t, output in enumerate(outputs):
            step = sigmas[t + 1] - sigmas[t]
            if prediction == "v_prediction":
                output = signal[t] * output + sigmas[t] * signal[t] ** 2 * sample
            sample = sample + step * output
        return sample

    influence = np.diff(sigmas) * (1 if prediction != "v_prediction" else signal[:-1])
    found = frame(NoiseGrid(sigmas, prediction, influence))
    off = np.array([run(outputs + np.eye(9)[t]) - run(outputs) for t in range(9)])
    np.testing.assert_allclose(off / off[0], found.moves / found.moves[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_step_hands_on_its_value_and_the_correction(loaded_flux, calibration, dtype):
    schedule = calibration.schedule(KEYS)
    assert list(schedule.corrections) == [4]
    try:
        loaded_flux.to(dtype)
        plain, handed = [], []
        for found, sums in ((plain, {}), (handed, schedule.corrections)):
            with (
                dpcache.enabled(loaded_flux, schedule.model_copy(update={"corrections": sums})),
                Spy(loaded_flux) as spy,
            ):
                draw(loaded_flux, output_type="latent")
                found.extend(spy.head_inputs)
    finally:
        loaded_flux.to(torch.float32)
    # The first correction comes after all values it is made of: until then both runs are the same. The head is run on
    # the computed value first.
    step = 4
    value, got = plain[step], handed[step + 1]
    shares = {term.key_step: term.coefficient for term in schedule.corrections[step]}
    exact = value.double() + sum(plain[key].double() * share for key, share in shares.items())
    scale = value.double().abs() + sum((plain[key].double() * share).abs() for key, share in shares.items())
    assert torch.equal(handed[step], value) and got.dtype == dtype
    bound = torch.finfo(dtype).eps * exact.abs() / 2 + 4 * torch.finfo(torch.float32).eps * scale
    assert bool(((got.double() - exact).abs() <= bound).all())


def test_no_more_values_are_held_for_it(flux, calibration):
    held = []

    def count(pipe, index, timestep, kwargs):
        held.append(dpcache.stats(pipe).cached_values)
        return kwargs

    schedule = calibration.schedule((0, 2, 4, 6, 9))
    assert len(schedule.corrections) >= 3
    with dpcache.enabled(flux, schedule):
        draw(flux, callback_on_step_end=count)
        stats = dpcache.stats(flux)
    assert max(held) == 3 and stats.cached_values == 0
    assert stats.computed_steps == (0, 2, 4, 6, 9)


@pytest.mark.parametrize(("model", "decibels"), [("tiny-flux", 3), ("tiny-dit", 0.5)])
def test_held_out_pictures_are_nearer_to_the_full_run(model, decibels):
    bundled = BUNDLED[model]
    pipe = dpcache.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    calibration = dpcache.calibrate(
        pipe, bundled.calibration_inputs(3), sensitivity="measured", progress=False, **bundled.call_defaults
    )
    inputs = bundled.held_out_inputs(12)
    plans = [calibration.plan(9, recipe=dpcache.Recipe(correct=correct)) for correct in (False, True)]
    assert plans[0].key_steps == plans[1].key_steps
    without, with_corrections = (
        dpcache.compare(pipe, plan, inputs, progress=False, **bundled.call_defaults).psnr_mean for plan in plans
    )
    assert with_corrections > without + decibels, (without, with_corrections)


def test_where_there_are_none(flux, calibration):
    assert calibration.plan(STEPS).corrections == {}
    assert calibration.plan(5, recipe=dpcache.Recipe(method="paper")).corrections == {}
    assert calibration.plan(5, recipe=dpcache.Recipe(correct=False)).corrections == {}
    assert calibration.plan(5).corrections
    late = calibration.schedule(KEYS).from_step(3)
    assert set(late.corrections) <= {8 - 3} and all(t.key_step >= 0 for ts in late.corrections.values() for t in ts)
    dit = BUNDLED["tiny-dit"]
    pipe = dpcache.load_pipeline("tiny-dit")
    config = pipe.scheduler.config
    for kind, known in ((EulerAncestralDiscreteScheduler, False), (EulerDiscreteScheduler, True)):
        pipe.scheduler = kind.from_config(config)
        there = dpcache.calibrate(pipe, dit.calibration_inputs(1), progress=False, **dit.call_defaults)
        assert bool(there.plan(13).corrections) == known


def test_corrections_are_kept_and_checked(calibration, tmp_path):
    schedule = calibration.plan(5)
    schedule.save(tmp_path / "s.json")
    assert dpcache.Schedule.load(tmp_path / "s.json") == schedule
    key, skipped = schedule.key_steps[2], next(iter(schedule.predictions))
    for bad, message in (
        ({skipped: (Term(key_step=0, coefficient=1),)}, "must be corrected by"),
        ({key: ()}, "must be corrected by"),
        ({key: (Term(key_step=schedule.key_steps[3], coefficient=1),)}, "up to itself"),
    ):
        with pytest.raises(ValueError, match=message):
            dpcache.Schedule.model_validate({**schedule.model_dump(), "corrections": bad})


def test_a_run_with_corrections_can_be_repeated(flux, calibration):
    with dpcache.enabled(flux, calibration.schedule(KEYS)):
        first = draw(flux)
        np.testing.assert_array_equal(draw(flux), first)
