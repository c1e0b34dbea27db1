"""Tuning coefficients by what they do to the final sample, on the trained tiny-flux."""

import numpy as np
import pytest

import dpcache
from dpcache.measure.trials import Trial, average_error
from dpcache.run.inputs import call_arguments, seeded
from dpcache.search import tuning
from tests.conftest import PROMPT, QUICK, STEPS
from tests.pipelines.every import SMALL

PROMPTS = [PROMPT, "a large blue star on a grey background, right", "a medium pink cross on a black background, top"]
CALL = {**QUICK, "output_type": "latent"}


@pytest.fixture(scope="module")
def calibration(loaded_flux):
    return dpcache.calibrate(loaded_flux, PROMPTS[:2], sensitivity="measured", progress=False, **QUICK)


def trials(pipe, seed, **more):
    calls = call_arguments(PROMPTS, {**CALL, **more})
    found = [Trial(pipe, seeded(pipe, call, seed + n)) for n, call in enumerate(calls)]
    for trial in found:
        trial.run_in_full()
    return found


def test_what_is_remembered_is_what_would_be_computed(flux, calibration):
    """A variant finished from memory gives the bits of a run from the beginning, and computes only what is left."""
    schedule = calibration.plan(5)
    ways = tuning.directions(schedule, calibration)
    (trial,) = trials(flux, 5)[:1]
    runs = []
    handle = flux.transformer.single_transformer_blocks[-1].proj_out.register_forward_hook(lambda *call: runs.append(1))
    try:
        variants = [(way.start, tuning.moved(schedule, [way], [0.5])) for way in ways]
        output, others = trial.responses(schedule, variants)
    finally:
        handle.remove()
    assert len(runs) == 5 + sum(sum(key >= way.start for key in schedule.key_steps) for way in ways)
    for (_, variant), found in zip([(0, schedule), *variants], [output, *others], strict=True):
        with dpcache.enabled(flux, variant):
            np.testing.assert_array_equal(trial._run(), found)
    assert len({found.tobytes() for found in others}) == len(others)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "WanPipeline (2.2, two transformers)", "LTX2Pipeline"])
@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_remembered_with_several_branches_denoisers_and_streams(name, boundary):
    pipe, given = SMALL[name].build()
    arguments = {"output_type": "latent", **given, "num_inference_steps": 8, "return_dict": False}
    trial = Trial(pipe, seeded(pipe, arguments, 0))
    trial.run_in_full()
    schedule, other = (dpcache.Schedule.from_key_steps([0, 2, 5], 8, order=o, boundary=boundary) for o in (1, 0))
    late = schedule.model_copy(update={"predictions": {**schedule.predictions, 7: other.predictions[7]}})
    output, (found,) = trial.responses(schedule, [(7, late)])
    for variant, expected in ((schedule, output), (late, found)):
        with dpcache.enabled(pipe, variant):
            np.testing.assert_array_equal(trial._run(), expected)


def test_tuned_coefficients_help_inputs_they_were_not_fitted_to(flux):
    usual = {"num_inference_steps": 50}
    calibration = dpcache.calibrate(flux, PROMPTS, progress=False, **{**QUICK, **usual})
    schedule = calibration.plan(9, recipe=dpcache.Recipe(correct=False))
    ways = tuning.directions(schedule, calibration)
    equations = [tuning.normal_equations(trial, schedule, ways) for trial in trials(flux, 100, **usual)]
    others = trials(flux, 500, **usual)

    def error(one):
        return average_error([trial.error(one) for trial in others])

    tuned = min(tuning.proposals(schedule, ways, equations), key=error)
    assert error(tuned) < 0.8 * error(schedule)
    assert tuned.key_steps == schedule.key_steps


def test_effects_are_derivatives(flux, calibration):
    """What least squares expects of a small change is what a run with it does."""
    schedule = calibration.plan(4, recipe=dpcache.Recipe(correct=False))
    ways = tuning.directions(schedule, calibration)
    (trial,) = trials(flux, 9)[:1]
    matrix, vector = tuning.normal_equations(trial, schedule, ways)
    before = trial.error(schedule)
    amounts = -0.02 * vector / np.abs(vector).max()
    after = trial.error(tuning.moved(schedule, ways, amounts))
    expected = (2 * amounts @ vector + amounts @ matrix @ amounts) / (before ** (0.5 - 2))
    assert after**2 - before**2 == pytest.approx(expected, rel=0.1)


def test_directions_change_only_their_hop(calibration):
    schedule = calibration.schedule([0, 1, 2, 6, 9])
    ways = tuning.directions(schedule, calibration)
    assert [(way.start, sorted(way.changes)) for way in ways] == [(3, [3, 4, 5]), (7, [7, 8]), (10, [10, 11])]
    changed = tuning.moved(schedule, ways, [0.0, 1.0, 0.0])
    different = [t for t in schedule.predictions if schedule.predictions[t] != changed.predictions[t]]
    assert different == [7, 8]
    # Differences of the values: what is constant over the steps stays as predicted.
    for terms, old in ((changed.predictions[t], schedule.predictions[t]) for t in different):
        assert sum(term.coefficient for term in terms) == pytest.approx(sum(term.coefficient for term in old))
    assert tuning.directions(calibration.schedule(range(STEPS)), calibration) == []


def test_average_error_lies_between_mean_logarithm_and_mean_square():
    errors = [1e-3, 1e-2, 1e-1]
    assert 1e-2 < average_error(errors) < np.sqrt(np.mean(np.square(errors)))
    assert average_error([0.3]) == pytest.approx(0.3)
