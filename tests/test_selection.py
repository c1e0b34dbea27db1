"""Selecting among plans by running them, on the trained tiny-flux."""

import numpy as np
import pytest

import dpcache
from dpcache.judge.metrics import psnr
from dpcache.plan.recipe import Recipe
from dpcache.search.selection import RECIPES
from tests.conftest import PROMPT, QUICK, STEPS, draw

PROMPTS = [PROMPT, "a large blue star on a grey background, right", "a medium pink cross on a black background, top"]
CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24}
FEW = (Recipe("taylor", 1), Recipe("taylor", 2), Recipe("fitted", 1), Recipe("taylor", 2, first_key_steps=4))


class Interrupting:
    """Calls of a pipeline, counted; one of them is interrupted in the middle, as by Ctrl-C."""

    def __init__(self, pipe):
        self.pipe, self.runs, self.stop = pipe, 0, None

    def __enter__(self):
        self.handle = self.pipe.transformer.register_forward_pre_hook(self.denoise)
        return self

    def __exit__(self, *error):
        self.handle.remove()

    def denoise(self, *call):
        self.runs += 1
        if self.runs == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def calibration(loaded_flux):
    return dpcache.calibrate(loaded_flux, PROMPTS[:2], progress=False, **CALL)


def error(pipe, schedule, prompt, seed):
    full = draw(pipe, prompt, seed)
    with dpcache.enabled(pipe, schedule):
        return -psnr(full[0], draw(pipe, prompt, seed)[0])


def test_the_best_when_run_is_chosen(flux, calibration):
    """Of plans of very different worth, on inputs that it never saw, the one chosen is at least second best."""
    settings = {"inputs": PROMPTS, "recipes": FEW, "tune": 0, "progress": False, **CALL}
    chosen = dpcache.select(flux, calibration, 5, **settings)
    assert chosen == dpcache.select(flux, calibration, 5, **settings)
    plans = [calibration.plan(5, recipe=recipe) for recipe in FEW]
    keys = [(plan.key_steps, plan.predictions) for plan in plans]
    assert (chosen.key_steps, chosen.predictions) in keys
    assert chosen.num_key_steps == 5
    others = ["a small green diamond on a white background, left", "a large red heart on a black background, top"]
    errors = [np.mean([error(flux, plan, prompt, seed) for seed, prompt in enumerate(others)]) for plan in plans]
    assert errors[keys.index((chosen.key_steps, chosen.predictions))] <= sorted(errors)[1]
    assert 0 < chosen.error < 1
    assert "9 trials" in chosen.source


def test_tuning_never_returns_a_worse_schedule(flux, calibration):
    settings = {"inputs": PROMPTS[2:], "recipes": FEW[3:], "num_trials": 2, "progress": False, **CALL}
    plain, once, twice = (dpcache.select(flux, calibration, 5, tune=rounds, **settings) for rounds in (0, 1, 2))
    assert plain.error > once.error >= twice.error
    assert once.key_steps == plain.key_steps
    assert "tuned in 2 more" in once.source


def test_an_interrupted_search_goes_on_and_ends_in_the_same(flux, tmp_path):
    """Ctrl-C at any place: what was measured is not run again, and the schedule is that of an undisturbed search."""
    settings = {"num_key_steps": 4, "num_trials": 2, "progress": False, **CALL}
    kept = {**settings, "checkpoint": tmp_path / "c"}
    with Interrupting(flux) as counter:
        undisturbed = dpcache.optimize(flux, PROMPTS, **settings)
        total, done = counter.runs, 0
        for stop in (20, 90, 300, 500):
            counter.runs, counter.stop = 0, stop
            with pytest.raises(KeyboardInterrupt):
                dpcache.optimize(flux, PROMPTS, **kept)
            done += stop
        counter.runs, counter.stop = 0, None
        assert dpcache.optimize(flux, PROMPTS, **kept) == undisturbed
        # What is repeated: the calls that were cut short, and the full runs that trials compare with.
        assert 0 < counter.runs < total - done / 2
        counter.runs = 0
        assert dpcache.optimize(flux, PROMPTS, **kept) == undisturbed
        assert counter.runs == 0
    with pytest.raises(dpcache.CalibrationError, match="another input 0"):
        dpcache.optimize(flux, PROMPTS[::-1], **kept)


def test_optimize_does_it_all(flux, tmp_path):
    quick = {"num_key_steps": 5, "num_trials": 2, "progress": False, **CALL}
    schedule = dpcache.optimize(flux, PROMPTS, **quick)
    assert schedule.num_inference_steps == STEPS
    assert schedule.num_key_steps == 5
    schedule.save(tmp_path / "s.json")
    assert dpcache.Schedule.load(tmp_path / "s.json") == schedule
    with dpcache.enabled(flux, schedule):
        draw(flux)
        assert dpcache.stats(flux).computed_steps == schedule.key_steps
    from_one = dpcache.optimize(flux, PROMPTS[0:1], boundary="output", **quick)
    assert from_one.boundary == "output"


def test_the_calibration_knows_its_inputs(flux, calibration, tmp_path):
    calibration.save(tmp_path / "c.safetensors")
    loaded = dpcache.Calibration.load(tmp_path / "c.safetensors")
    assert [call["prompt"] for call in loaded.facts.calls] == PROMPTS[:2]
    quick = {"recipes": FEW[:2], "num_trials": 2, "tune": 1, "progress": False}
    given = {"inputs": PROMPTS[:2], "fitting_inputs": PROMPTS[:2]}
    assert dpcache.select(flux, loaded, 5, **quick) == dpcache.select(flux, calibration, 5, **given, **quick, **CALL)
    embeds, pooled, _ = flux.encode_prompt(PROMPT, max_sequence_length=24)
    tensors = [{"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}]
    unknown = dpcache.calibrate(flux, tensors, progress=False, **{**QUICK, "output_type": "latent"})
    with pytest.raises(dpcache.CalibrationError, match="inputs="):
        dpcache.select(flux, unknown, 5)


def test_what_cannot_be_selected(flux, calibration):
    with pytest.raises(dpcache.InfeasibleBudgetError, match="smallest feasible"):
        dpcache.select(flux, calibration, 2, recipes=[Recipe(first_key_steps=4)], progress=False)
    with pytest.raises(dpcache.CalibrationError, match="no recipes"):
        dpcache.select(flux, calibration, 5, recipes=[], progress=False)
    with pytest.raises(dpcache.CalibrationError, match="wrap it"):
        dpcache.select(flux, calibration, 5, inputs=PROMPT, progress=False)
    for wrong, message in (({"prompt": PROMPT}, "wrap it"), (PROMPT, "wrap it"), ([], "no inputs")):
        with pytest.raises(dpcache.CalibrationError, match=message):
            dpcache.optimize(flux, wrong, progress=False)
    assert len(set(RECIPES)) == len(RECIPES)
