"""Coefficients that are fitted hop by hop, in runs of a trained pipeline."""

import numpy as np
import pytest

import dpcache
from dpcache.measure.trials import relative_error
from dpcache.plan.corrections import by_gram, corrected
from dpcache.plan.predictors import Trend
from dpcache.run.entry import entered
from dpcache.run.inputs import call_arguments, seeded
from dpcache.search.full_runs import Draw, recorded
from dpcache.search.hops import fitted, steps_to_fit
from dpcache.search.objectives import Objective
from dpcache.search.sharing import Sharing
from tests.conftest import PROMPT, STEPS

CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24, "output_type": "latent"}
PROMPTS = [PROMPT, "a large blue star on a grey background, right", "a large red heart on a black background, top"]
KEYS = (0, 4, 7, 9)


@pytest.fixture(scope="module")
def full(loaded_flux):
    draws = [Draw(str(n), call, n) for n, call in enumerate(call_arguments(PROMPTS, CALL))]
    runs = [recorded(loaded_flux, draw, "blocks", Objective("mean"), samples=True) for draw in draws]
    return draws, runs


def bases(full):
    calibration = dpcache.Calibration.merged([run.calibration for run in full[1]])

    def correct(schedule):
        return corrected(schedule, calibration._frame, by_gram(calibration.gram.mean(axis=0), calibration._frame.moves))

    plain = dpcache.Schedule.from_key_steps(KEYS, STEPS, predictor=Trend())
    taylor = dpcache.Schedule.from_key_steps(KEYS, STEPS)
    return [(plain, lambda schedule: schedule), (correct(plain), correct), (correct(taylor), correct)]


def errors(flux, draws, runs, schedule):
    """Of the final samples."""
    found = []
    with dpcache.enabled(flux, schedule):
        for draw, run in zip(draws, runs, strict=True):
            output = Objective("mean").output(flux(**seeded(flux, draw.call, draw.seed)))
            found.append(relative_error(output, run.output))
    return np.array(found)


def test_fitted_runs_end_nearer_to_the_full_ones(flux, full):
    draws, runs = full
    for base, correct in bases(full):
        sharing = Sharing()
        with entered(flux, "blocks", sharing):
            shared = [sharing.runs(flux, seeded(flux, draw.call, draw.seed), ((0, STEPS - 1),)) for draw in draws]
            found = fitted(base, shared, [run.samples for run in runs], correct)
            at_end = [run.sample_at(STEPS, found).numpy() for run in shared]
        assert found.key_steps == base.key_steps and set(found.corrections) == set(base.corrections)
        # What was fitted is what is followed, and what is followed is nearer.
        reached = errors(flux, draws, runs, found)
        ends = [relative_error(end, run.samples[STEPS].numpy()) for end, run in zip(at_end, runs, strict=True)]
        np.testing.assert_allclose(reached, ends, rtol=1e-4)
        assert (reached < errors(flux, draws, runs, base)).all()


def test_a_fit_computes_every_key_step_once_for_each_input(flux, full):
    draws, runs = full
    layer, count = flux.transformer.single_transformer_blocks[-1].proj_out, []
    handle = layer.register_forward_pre_hook(lambda *call: count.append(1))
    base, correct = bases(full)[0]
    at_the_end = dpcache.Schedule.from_key_steps((0, 4, 7, STEPS - 1), STEPS, predictor=Trend())
    try:
        for schedule, steps in ((base, len(KEYS)), (at_the_end, len(KEYS) - 1)):
            sharing = Sharing()
            count.clear()
            with entered(flux, "blocks", sharing):
                shared = [sharing.runs(flux, seeded(flux, draw.call, draw.seed), ((0, STEPS - 1),)) for draw in draws]
                fitted(schedule, shared, [run.samples for run in runs], correct)
            assert len(count) == steps * len(draws) == steps_to_fit(schedule) * len(draws)
    finally:
        handle.remove()
