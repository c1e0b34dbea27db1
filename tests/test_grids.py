"""One calibration on other grids: more or fewer steps, another shift, another scheduler."""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import dpcache
from dpcache.judge.metrics import psnr
from dpcache.plan.grids import NoiseGrid, gram_between, interpolation_matrix, roughness
from dpcache.run.schedulers import noise_grid, stepped_influence
from dpcache.zoo import BUNDLED
from tests.conftest import draw

FLUX = BUNDLED["tiny-flux"]
LENGTH = {"max_sequence_length": 24}


@pytest.fixture(scope="module")
def calibration(loaded_flux):
    """50 steps of tiny-flux, sensitivity measured."""
    return dpcache.calibrate(
        loaded_flux, FLUX.calibration_inputs(5), sensitivity="measured", progress=False, **FLUX.call_defaults
    )


def test_interpolation_is_exact_for_cubics_and_at_the_knots():
    knots = np.cumsum(np.random.default_rng(0).uniform(0.5, 2, 12))
    points = np.linspace(knots[0], knots[-1], 31)
    for power in range(4):
        np.testing.assert_allclose(interpolation_matrix(knots, points) @ knots**power, points**power)
    np.testing.assert_array_equal(interpolation_matrix(knots, knots), np.eye(12))
    beyond = np.array([knots[0] - 1, knots[-1] + 1])
    np.testing.assert_allclose(interpolation_matrix(knots, beyond) @ (3 * knots + 1), 3 * beyond + 1)


def test_what_is_not_smooth_is_measured_and_kept():
    """A smooth curve plus white noise: interpolated, it is neither smoother nor much rougher than at other points."""
    rng = np.random.default_rng(0)
    knots, noise = np.linspace(0, 3, 50), 0.01

    def gram(at):
        values = rng.normal(size=(4, 20_000))
        curve = sum(np.outer(np.sin((n + 1) * at / 3), v) for n, v in enumerate(values))
        curve = curve + noise * rng.normal(size=curve.shape)
        return (curve @ curve.T / curve.shape[1])[None]

    grams = gram(knots)
    np.testing.assert_allclose(roughness(grams, knots), noise**2, rtol=0.2)
    np.testing.assert_allclose(gram_between(grams, knots, knots), grams, atol=1e-12)
    for count in (21, 80):
        points = np.linspace(0, 3, count)
        found = gram_between(grams, knots, points)
        assert np.linalg.eigvalsh(found[0]).min() > 0
        assert 0.8 < roughness(found, points).mean() / roughness(gram(points), points).mean() < 1.6
        matrix = interpolation_matrix(knots, points)
        assert roughness(matrix @ grams @ matrix.T, points).mean() < 0.9 * roughness(found, points).mean()


def test_stepping_a_scheduler_gives_its_influence(flux, calibration):
    draw(flux, num_inference_steps=50)
    state = copy.deepcopy({k: v for k, v in vars(flux.scheduler).items() if not callable(v)})
    grid = noise_grid(flux.scheduler)
    np.testing.assert_allclose(grid.influence, calibration.influence.mean(axis=0), rtol=1e-5)
    assert repr({k: v for k, v in vars(flux.scheduler).items() if not callable(v)}) == repr(state)
    assert calibration.on_grid(scheduler=flux.scheduler) is calibration
    # A solver that looks back, and one that keeps the sample larger: from sigma to sigma they move it as DDIM does.
    ddim, euler, solver = (
        DDIMScheduler(),
        EulerDiscreteScheduler(timestep_spacing="leading"),
        DPMSolverMultistepScheduler(),
    )
    for scheduler in (ddim, euler, solver):
        scheduler.set_timesteps(25)
        s = noise_grid(scheduler).sigmas
        expected = np.diff(s) / np.sqrt(1 + s[1:] ** 2)
        random = torch.get_rng_state()
        np.testing.assert_allclose(stepped_influence(scheduler), expected, rtol=1e-3, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("steps", [20, 28, 100])
def test_a_number_of_steps_gives_the_pipelines_own_grid(flux, calibration, steps):
    assert calibration.on_grid(50) is calibration
    draw(flux, num_inference_steps=steps)
    there = noise_grid(flux.scheduler)
    found = calibration.on_grid(steps).grid
    np.testing.assert_allclose(found.sigmas, there.sigmas, atol=1e-5)
    np.testing.assert_allclose(found.influence, there.influence, rtol=1e-3)


def test_interpolation_error_is_that_of_the_outputs(calibration):
    """Steps are a per cent from what their neighbours say; so much is not smooth in this model."""
    assert 0.002 < calibration.interpolation_error < 0.02


@pytest.mark.parametrize(("steps", "shift"), [(28, None), (50, 6.0)])
def test_plans_are_as_good_as_from_calibrating_there(flux, calibration, steps, shift):
    budget, recorded = round(steps / 3.85), flux.scheduler
    if shift is not None:
        flux.scheduler = FlowMatchEulerDiscreteScheduler.from_config(recorded.config, shift=shift)
    try:
        prompts = FLUX.held_out_inputs(16)
        arguments = {"num_inference_steps": steps, "output_type": "np", **LENGTH}

        def draw_all() -> np.ndarray:
            generators = [torch.Generator().manual_seed(1000 + n) for n in range(len(prompts))]
            return flux(prompts, generator=generators, **arguments)[0]

        full = draw_all()
        direct = dpcache.calibrate(
            flux,
            FLUX.calibration_inputs(5),
            num_inference_steps=steps,
            sensitivity="measured",
            progress=False,
            **LENGTH,
        )
        means = []
        for plan in (calibration.plan(budget, scheduler=flux.scheduler), direct.plan(budget)):
            with dpcache.enabled(flux, plan):
                means.append(np.mean([psnr(a, b) for a, b in zip(full, draw_all(), strict=True)]))
        assert means[0] > means[1] - 0.5, means
    finally:
        flux.scheduler = recorded


def test_enable_with_a_calibration_follows_every_call(flux, calibration):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dpcache.enabled(flux, calibration, num_key_steps=7):
            for steps, key_steps in ((20, 7), (28, 7), (50, 7), (28, 7), (5, 5)):
                draw(flux, num_inference_steps=steps)
                expected = calibration.plan(key_steps, num_inference_steps=steps).key_steps
                assert dpcache.stats(flux).computed_steps == expected
    full = draw(flux, num_inference_steps=5)
    with dpcache.enabled(flux, calibration, speedup=1):
        np.testing.assert_array_equal(draw(flux, num_inference_steps=5), full)


def test_each_grid_is_planned_once(flux, calibration, monkeypatch):
    planned = []
    whole = dpcache.Calibration.plan
    monkeypatch.setattr(dpcache.Calibration, "plan", lambda self, **how: planned.append(how) or whole(self, **how))
    with dpcache.enabled(flux, calibration, num_key_steps=5):
        for steps in (20, 12, 20, 50, 12):
            draw(flux, num_inference_steps=steps)
    assert len(planned) == 3  # its own grid at once, and two others


def test_errors_are_expected_on_other_grids(calibration):
    errors = [calibration.plan(k, num_inference_steps=28).expected_error for k in (5, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    within = calibration.plan(max_error=errors[1], num_inference_steps=28)
    assert (within.num_inference_steps, within.num_key_steps) == (28, 8)
    assert "interpolated from 50 steps" in within.source


def test_what_cannot_be_interpolated_is_told(flux, calibration):
    def refused(message, call):
        with pytest.raises(dpcache.GridError, match=message) as caught:
            call()
        assert isinstance(caught.value, dpcache.DPCacheError)

    refused(
        'method="sampler"', lambda: calibration.plan(7, recipe=dpcache.Recipe(method="paper"), num_inference_steps=28)
    )
    low = dpcache.calibrate(flux, FLUX.calibration_inputs(1), num_inference_steps=12, progress=False, **LENGTH)
    late = low.on_grid(sigmas=low.facts.sigmas[4:])
    assert late.facts.num_inference_steps == 8
    refused("go back to the one that was recorded", lambda: late.on_grid(28))
    noisy = NoiseGrid(np.array([1.4, 0.5, 0.2, 0.0]), "flow_prediction")
    refused(r"from 1.4 to 0.2.*Calibrate on a grid that reaches as far", lambda: low.on_grid(scheduler=noisy))
    refused("rise from one step", lambda: low.on_grid(sigmas=[1.0, 0.5, 0.6, 0.2, 0.0]))
    other = DDIMScheduler()
    other.set_timesteps(20)
    refused("returns flow_prediction, the scheduler takes epsilon", lambda: low.on_grid(scheduler=other))
    with pytest.raises(ValueError, match="give one of"):
        low.on_grid()
    with pytest.raises(TypeError, match="a schedule is planned already: num_key_steps"):
        dpcache.enable(flux, low.plan(4), num_key_steps=4)
    with pytest.raises(ValueError, match="one of num_key_steps, speedup and max_error"):
        dpcache.enable(flux, low)
