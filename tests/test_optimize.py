"""One search with one budget, on trained pipelines."""

import re
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import dpcache
from dpcache.measure.trials import Trial, average_error
from dpcache.plan.predictors import Taylor, Trend
from dpcache.run.entry import entered
from dpcache.run.inputs import as_numbers, call_arguments, seeded
from dpcache.search import budget as budgets
from dpcache.search.budget import Budget
from dpcache.search.candidates import TAYLOR, TREND, Candidate, Candidates, KeySteps, scaled
from dpcache.search.contest import Contest
from dpcache.search.full_runs import Draw, dealt, recorded
from dpcache.search.objectives import Objective, worst_error
from dpcache.search.sharing import Sharing, begins_late, steps_to_compute, turns
from tests.conftest import PROMPT, STEPS
from tests.pipelines.every import SMALL

PROMPTS = [
    PROMPT,
    "a large blue star on a grey background, right",
    "a medium pink cross on a black background, top",
    "a small green diamond on a white background, left",
    "a large red heart on a black background, top",
]
CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24}
QUICK = {"num_key_steps": 4, "budget": 10, "progress": False, **CALL}


class Counting:
    """Steps that a denoiser computes, counted inside its last block; one of them may be interrupted, as by Ctrl-C."""

    def __init__(self, layer):
        self.layer, self.runs, self.stop = layer, 0, None

    def __enter__(self):
        self.handle = self.layer.register_forward_pre_hook(self.denoise)
        return self

    def __exit__(self, *error):
        self.handle.remove()

    def denoise(self, *call):
        self.runs += 1
        if self.runs == self.stop:
            raise KeyboardInterrupt


def counting(flux):
    return Counting(flux.transformer.single_transformer_blocks[-1].proj_out)


# ------------------------------------------------------------------------------------------------------------ sharing


def spans_of(pipe, arguments, boundary):
    draw = Draw("", {name: value for name, value in arguments.items() if name != "generator"}, 0)
    return recorded(pipe, draw, boundary, Objective("mean")).spans


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "WanPipeline (2.2, two transformers)", "LTX2Pipeline", "FluxPipeline"]
)
@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_shared_runs_give_the_bits_of_runs_from_the_beginning(name, boundary):
    pipe, given = SMALL[name].build()
    arguments = seeded(pipe, {"output_type": "latent", **given, "num_inference_steps": 8, "return_dict": False}, 0)
    ways = (Taylor(0), Taylor(1), Taylor(2), Trend())
    made = [
        dpcache.Schedule.from_key_steps(keys, 8, predictor=way, boundary=boundary)
        for keys in ([0, 1, 2, 5], [0, 1, 2, 6], [0, 2, 5, 6], [0, 1, 4])
        for way in ways
    ]
    terms = made[0].predictions[3]
    made.append(made[0].model_copy(update={"corrections": {5: tuple(terms)}}))
    spans = ((0, 7),) if "two transformers" not in name else spans_of(pipe, arguments, boundary)
    assert begins_late(spans) == ("two transformers" in name)
    schedules = sorted(made, key=lambda one: (one.order if begins_late(spans) else 0, turns(one)))
    sharing, found = Sharing(), []
    with entered(pipe, boundary, sharing):
        runs = sharing.runs(pipe, arguments, spans)
        for before, schedule in pairwise([None, *schedules]):
            found.append(as_numbers(runs.run(schedule)))
            assert runs.computed == steps_to_compute(before, schedule, spans)
    trial = Trial(pipe, arguments)
    for schedule, output in zip(schedules, found, strict=True):
        with dpcache.enabled(pipe, schedule):
            np.testing.assert_array_equal(trial._run(), output)
    pairs = pairwise([None, *schedules])
    apart = sum(steps_to_compute(None, schedule, spans) for schedule in schedules)
    assert sum(steps_to_compute(*pair, spans) for pair in pairs) < 0.8 * apart


# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("budget", [1, 2, 3.5, 8, 25])
def test_a_budget_is_kept_and_told(flux, budget):
    with counting(flux) as count:
        schedule = dpcache.optimize(flux, PROMPTS, **{**QUICK, "budget": budget})
    spent = float(re.search(r"with ([0-9.]+) of [0-9.]+ full runs", schedule.source)[1])
    assert count.runs / STEPS <= budget
    assert spent == pytest.approx(count.runs / STEPS, abs=0.051)
    assert spent > 0.7 * budget or budget < 3
    assert schedule.num_key_steps == 4 and schedule.num_inference_steps == STEPS
    assert (schedule.error is None) == (budget == 1)


def test_a_budget_of_time(flux, capsys):
    start = time.perf_counter()
    schedule = dpcache.optimize(flux, PROMPTS, **{**QUICK, "budget": "3 s", "progress": True})
    assert time.perf_counter() - start < 6
    assert re.search(r"with [0-4] s of 3 s", schedule.source)
    assert "a full run takes" in capsys.readouterr().err


def test_times_and_what_runs_cost():
    assert [budgets.parsed(text) for text in (60, "2 h", "15 min", "90s", "7")] == [
        (60, False),
        (7200, True),
        (900, True),
        (90, True),
        (7, False),
    ]
    now = [0.0]
    budget = Budget("100 s", 50, clock=lambda: now[0])
    for steps, seconds in ((50, 30), (50, 20), (10, 5)):
        budget.count(steps, seconds)
        now[0] += seconds
    assert budget.cost(10) == 10 * 20 / 50 + 1
    assert budget.left() == 45 and budget.affords(100) and not budget.affords(100, reserve=10)
    runs = Budget(1.2, 50)
    for _ in range(6):
        assert runs.affords(10)
        runs.count(10, 1.0)
    assert not runs.affords(1) and str(runs) == "1.2 of 1.2 full runs"


# ------------------------------------------------------------------------------------------------------- what is found


def test_never_below_the_plain_ways(flux):
    """On the inputs that judge; and its error is what runs without any sharing give."""
    schedule = dpcache.optimize(flux, PROMPTS, **{**QUICK, "budget": 20})
    calls = call_arguments(PROMPTS, {**CALL, "output_type": "latent"})
    fitting, judging = dealt(calls, 6, 0)
    calibration = dpcache.calibrate(flux, PROMPTS[:2], progress=False, **CALL)
    even = [dpcache.Schedule.uniform(4, STEPS, order=order) for order in (0, 1, 2)]
    trials = [Trial(flux, seeded(flux, draw.call, draw.seed)) for draw in judging]
    for trial in trials:
        trial.run_in_full()

    def error(one):
        return average_error([trial.error(one) for trial in trials])

    assert [len(fitting), len(judging)] == [2, 4]
    assert schedule.error == pytest.approx(error(schedule), rel=1e-6)
    assert schedule.error <= min(map(error, even)) * (1 + 1e-5)
    assert schedule.sigmas == calibration.facts.sigmas and schedule.model == calibration.facts.model


class Made:
    """Candidates without schedules, for a contest with known errors."""

    second = TAYLOR[1]

    def __init__(self, errors):
        self.errors, self.made = errors, {}

    def make(self, keys, way):
        return self.made.setdefault((keys, way), Candidate(None, keys, way, is_plain=not keys.steps[1]))

    @property
    def key_steps(self):
        return [KeySteps((0, n), f"{n}") for n in range(self.errors.shape[0])]

    def ways(self):
        return [TREND, *TAYLOR]

    def usual(self):
        return [self.make(self.key_steps[0], way) for way in self.ways()]

    def error(self, one, number):
        return float(self.errors[one.keys.steps[1], self.ways().index(one.way), number])


class Looking:
    """Trials that look errors up, with a budget of runs."""

    def __init__(self, candidates, runs):
        self.candidates, self.left = candidates, runs

    def run(self, some, number, beside=0):
        for one in some:
            if number not in one.errors:
                if self.left <= beside:
                    return False
                self.left -= 1
                one.errors[number] = self.candidates.error(one, number)
        return True

    def affordable(self, beside=0, shared=True):
        return max(0, self.left - beside)

    runs_to_fit = 0


def test_a_contest_finds_what_is_best_and_more_runs_find_more():
    rng = np.random.default_rng(0)
    reached = {}
    for runs in (12, 60, 240, 2000):
        found = []
        for _ in range(60):
            worth = rng.normal(size=(24, 4))
            candidates = Made(np.exp(worth[..., None] + rng.normal(size=(24, 4, 6))))
            trials = Looking(candidates, runs)
            contest = Contest(candidates, 6, trials, average_error)
            best = contest.best()
            count = min(len(one.errors) for one in contest.finalists)
            plain = [one for one in candidates.usual() if len(one.errors) == count]
            if runs >= 60:
                assert count == 6 and plain
                assert average_error(list(best.errors.values())) <= min(
                    average_error(list(one.errors.values())) for one in plain
                )
                for one in candidates.usual():  # what was left out was far behind
                    on_two = [average_error([one.errors[n] for n in (0, 1)]) for one in (one, *plain)]
                    assert one in plain or on_two[0] > 3 * min(on_two)
            found.append(worth[best.keys.steps[1], candidates.ways().index(best.way)])
        reached[runs] = np.mean(found)
    assert all(more < less for less, more in pairwise(reached.values())), reached
    alike = Made(np.ones((24, 4, 6)))
    assert Contest(alike, 6, Looking(alike, 240), average_error).best() is alike.usual()[0]


@pytest.mark.parametrize(("gain", "wins"), [(0.02, "usual"), (0.05, "unusual")])
def test_of_a_near_tie_the_usual_way_wins(gain, wins):
    """It is one way of many that look better by chance."""
    errors = np.full((24, 4, 6), 2.0)
    errors[0, 2], errors[7, 1] = 1.0, 1.0 - gain
    candidates = Made(errors)
    best = Contest(candidates, 6, Looking(candidates, 2000), average_error).best()
    expected = {"usual": candidates.usual()[2], "unusual": candidates.make(candidates.key_steps[7], TAYLOR[0])}
    assert best is expected[wins]


def test_what_is_expected_of_a_candidate_is_what_its_dearest_inputs_cost(flux):
    calibration = dpcache.calibrate(flux, PROMPTS[:4], progress=False, **CALL)

    def expected(factors):
        gram = calibration.gram * np.array(factors)[:, None, None] ** 2
        known = {"boundary": "blocks", "model": calibration.facts.model, "sigmas": calibration.facts.sigmas}
        candidates = Candidates(4, STEPS, replace(calibration, gram=gram), **known)
        return candidates.make(candidates.key_steps[0], TREND).expected

    assert len(calibration.gram) == 4
    alone = [expected(np.eye(4)[n]) for n in range(4)]
    assert expected([1, 1, 1, 1]) == pytest.approx(max(alone))
    assert expected([1, 100, 1, 1]) == pytest.approx(100 * alone[1])


def test_several_numbers_of_key_steps_share_the_full_runs(flux):
    with counting(flux) as count:
        found = dpcache.optimize(flux, PROMPTS, **{**QUICK, "num_key_steps": (5, 3), "budget": 12})
    assert count.runs / STEPS <= 12
    assert {k: one.num_key_steps for k, one in found.items()} == {3: 3, 5: 5}
    assert found[5].error < found[3].error


def test_objectives(flux):
    seen = []

    def worst_pixel(output, reference):
        assert output.shape == reference.shape == (32, 32, 3) and output.min() >= 0 and output.max() <= 1
        seen.append(float(np.abs(output - reference).max()))
        return seen[-1]

    found = dpcache.optimize(flux, PROMPTS, objective=worst_pixel, **QUICK)
    assert found.error is None and "worst_pixel 0." in found.source and len(seen) > 10
    worst = dpcache.optimize(flux, PROMPTS, objective="worst", **QUICK)
    assert "worst error" in worst.source
    assert worst_error([1.0, 5.0, 3.0, 2.0, 9.0]) == 7.0 and worst_error([2.0]) == 2.0
    with pytest.raises(ValueError, match="gave nan: it must return a finite number"):
        dpcache.optimize(flux, PROMPTS, objective=lambda output, reference: float("nan"), **QUICK)


def test_on_noise_prediction_from_one_input_and_the_other_boundary():
    pipe = dpcache.load_pipeline("tiny-dit", device="cpu")
    given = {"num_inference_steps": 14, "guidance_scale": 3.0, "boundary": "output"}
    found = dpcache.optimize(pipe, [{"class_labels": [3]}], num_key_steps=4, budget=6, progress=False, **given)
    assert found.boundary == "output" and 0 < found.error < 1 and found.num_inference_steps == 14


def test_says_if_fewer_steps_of_the_sampler_are_nearer(flux, monkeypatch):
    monkeypatch.setattr("dpcache.search.optimize._Search._error_of_fewer_steps", lambda self, draw, k: 1e-9)
    with pytest.warns(UserWarning, match=r"4 steps of the sampler itself are nearer .* call the pipeline with"):
        dpcache.optimize(flux, PROMPTS, **QUICK)


def test_shapes_of_another_size():
    golden = (0, 1, 2, 4, 6, 11, 24, 41, 49)
    assert scaled(golden, 9, 50) == golden
    assert scaled(golden, 9, 100) == tuple(2 * step for step in golden)
    for count, steps in ((1, 1), (1, 50), (5, 5), (13, 50), (12, 13)):
        found = scaled(golden, count, steps)
        assert len(found) == count and found[-1] < steps and all(a < b for a, b in pairwise(found))


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_an_interrupted_search_goes_on_and_ends_in_the_same(flux, tmp_path):
    """Ctrl-C at any place: what was measured is not run again, and the schedule is that of an undisturbed search."""
    kept = {**QUICK, "checkpoint": tmp_path / "search.jsonl"}
    with counting(flux) as count:
        undisturbed = dpcache.optimize(flux, PROMPTS, **QUICK)
        total, done = count.runs, 0
        for stop in (20, 40, 30):
            count.runs, count.stop = 0, stop
            with pytest.raises(KeyboardInterrupt):
                dpcache.optimize(flux, PROMPTS, **kept)
            done += stop
        count.runs, count.stop = 0, None
        assert dpcache.optimize(flux, PROMPTS, **kept) == undisturbed
        # What is repeated: the calls that were cut short, and what the next run would have shared with them.
        assert 0 < count.runs < total - done / 2
        count.runs = 0
        assert dpcache.optimize(flux, PROMPTS, **kept) == undisturbed
        assert count.runs == 0
        # With a larger budget, or another K, what fits is used again.
        again = dpcache.optimize(flux, PROMPTS, **{**kept, "num_key_steps": 3})
        assert again == dpcache.optimize(flux, PROMPTS, **{**QUICK, "num_key_steps": 3})
    with pytest.raises(dpcache.FileFormatError, match="another search, with other inputs"):
        dpcache.optimize(flux, PROMPTS[::-1], **kept)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"budget": 0.5}, ValueError, "one full run or more"),
        ({"budget": "soon"}, ValueError, 'a time like "15 min"'),
        ({"budget": None}, TypeError, "budget must be a number"),
        ({"budget": -3}, ValueError, "budget must be above 0"),
        ({"objective": "best"}, ValueError, 'objective must be "mean" or "worst"'),
        ({"num_key_steps": ()}, ValueError, "num_key_steps is empty"),
        ({"num_key_steps": (3, 40)}, ValueError, "from 1 to the number of steps"),
        ({"num_trials": 8}, TypeError, "no argument num_trials any more: .* budget=60"),
        ({"tune": 0, "polish": 1}, TypeError, "no argument tune, polish any more"),
        ({"inputs": PROMPT}, dpcache.CalibrationError, "wrap it"),
        ({"inputs": []}, dpcache.CalibrationError, "no inputs"),
        (
            {"inputs": [PROMPT, {"prompt": PROMPT, "num_inference_steps": 9}]},
            dpcache.CalibrationError,
            "input 1 takes 9 steps and those before it 12",
        ),
        ({"checkpoint": "."}, ValueError, "checkpoint must be a file"),
    ],
)
def test_what_is_refused_before_anything_runs(flux, wrong, error, message):
    with counting(flux) as count, pytest.raises(error, match=message):
        dpcache.optimize(flux, wrong.pop("inputs", PROMPTS), **{**QUICK, **wrong})
    assert count.runs == 0
