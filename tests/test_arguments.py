"""Wrong arguments of public functions: refused before anything runs, in words of this library's own."""

import os
import re
from typing import Any

import numpy as np
import pytest

import dpcache
from dpcache.plan.costs import sampler_cost, schedule_cost
from dpcache.plan.predictors import Fitted, Taylor, chosen_ridge
from dpcache.plan.recipe import Recipe
from tests.conftest import PROMPT, STEPS
from tests.test_hub import made_calibration, made_schedule

CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24, "progress": False}
GRAM, WEIGHTS = np.eye(4)[None], np.ones(4)


class Refusing:
    """A pipeline that must not be called."""

    def __call__(self, prompt: str, num_inference_steps: int, output_type: str, max_sequence_length: int) -> None:
        raise AssertionError("it has run")


def calibrate(**wrong: Any) -> Any:
    return dpcache.calibrate(Refusing(), wrong.pop("inputs", [PROMPT]), **{**CALL, **wrong})


def optimize(**wrong: Any) -> Any:
    return dpcache.optimize(Refusing(), wrong.pop("inputs", [PROMPT]), **{**CALL, "num_key_steps": 4, **wrong})


def from_key_steps(keys: Any = (0, 2), steps: Any = 5, **wrong: Any) -> Any:
    return dpcache.Schedule.from_key_steps(keys, steps, **wrong)


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    (
        "calibrate",
        lambda: calibrate(boundary="block"),
        ValueError,
        'boundary must be "blocks" or "output", got \'block\'',
    ),
    ("calibrate", lambda: calibrate(sensitivity="all"), ValueError, 'sensitivity must be "sampler" or "measured"'),
    ("calibrate", lambda: calibrate(order=-1), ValueError, "order must be 0 or more, got -1"),
    ("calibrate", lambda: calibrate(order=STEPS), ValueError, "order=12 needs more than 12 steps"),
    ("calibrate", lambda: calibrate(num_inference_steps=0), ValueError, "num_inference_steps must be 1 or more, got 0"),
    ("calibrate", lambda: calibrate(num_inference_steps=9.5), TypeError, "num_inference_steps must be a whole number"),
    ("calibrate", lambda: calibrate(seed="0"), TypeError, "seed must be a whole number"),
    ("calibrate", lambda: calibrate(inputs=[]), dpcache.CalibrationError, "there are no inputs"),
    ("calibrate", lambda: calibrate(inputs=[3]), dpcache.CalibrationError, "input 0 is a int: give a prompt"),
    (
        "calibrate",
        lambda: calibrate(max_sequence=3),
        TypeError,
        "no argument 'max_sequence': did you mean max",
    ),
    ("calibrate", lambda: calibrate(inputs=[{"promt": ""}]), TypeError, "input 0: Refusing takes no argument 'promt'"),
    ("optimize", lambda: optimize(boundary=None), ValueError, 'boundary must be "blocks" or "output", got None'),
    ("optimize", lambda: optimize(num_key_steps=13), ValueError, r"from 1 to the number of steps \(12\), got 13"),
    ("optimize", lambda: optimize(num_key_steps="4"), TypeError, "num_key_steps must be a whole number"),
    ("optimize", lambda: optimize(budget="soon"), ValueError, "budget must be a number of full runs, or a time"),
    ("optimize", lambda: optimize(polish=4), TypeError, "no argument polish any more: .* budget=60"),
    ("optimize", lambda: optimize(guidance=4), TypeError, "takes no argument 'guidance'"),
    ("plan", lambda: made_calibration().plan(4.5), TypeError, "num_key_steps must be a whole number"),
    ("plan", lambda: made_calibration().plan(4, recipe="paper"), TypeError, "recipe must be a dpcache.Recipe"),
    ("plan", lambda: made_calibration().plan(speedup="fast"), TypeError, "speedup must be a number, got 'fast'"),
    ("plan", lambda: made_calibration().plan(speedup=float("nan")), ValueError, "speedup"),
    ("plan", lambda: made_calibration().plan(max_error=None), ValueError, "give one of num_key_steps, speedup and"),
    ("cost", lambda: made_calibration().cost("paper"), TypeError, "recipe must be a dpcache.Recipe"),
    ("plan_all", lambda: made_calibration().plan_all({}), TypeError, "recipe must be a dpcache.Recipe"),
    ("schedule", lambda: made_calibration().schedule([0, 3], 2), TypeError, "recipe must be a dpcache.Recipe"),
    ("schedule", lambda: made_calibration().schedule([0, 30]), ValueError, "not one of the 20 steps"),
    ("predictor", lambda: made_calibration().predictor("newton"), ValueError, 'predictor must be "taylor", "trend" or'),
    ("weights", lambda: made_calibration().weights(2), ValueError, "measured must be from 0 to 1, got 2"),
    ("on_grid", lambda: made_calibration().on_grid("30"), TypeError, "num_inference_steps must be a whole number"),
    ("merged", lambda: dpcache.Calibration.merged([3]), TypeError, "only calibrations can be merged"),
    ("from_key_steps", lambda: from_key_steps([0, 2.5]), TypeError, r"key_steps must be whole numbers.*got \[0, 2.5\]"),
    ("from_key_steps", lambda: from_key_steps("012"), TypeError, "key_steps must be whole numbers"),
    ("from_key_steps", lambda: from_key_steps(3), TypeError, "key_steps must be whole numbers"),
    ("from_key_steps", lambda: from_key_steps([0, -2]), ValueError, "must increase and start with 0"),
    ("from_key_steps", lambda: from_key_steps([0, 2, 2]), ValueError, "must increase and start with 0"),
    ("from_key_steps", lambda: from_key_steps(steps="5"), TypeError, "num_inference_steps must be a whole number"),
    ("from_key_steps", lambda: from_key_steps(order=-1), ValueError, "order must be 0 or more, got -1"),
    ("from_key_steps", lambda: from_key_steps(boundary="middle"), ValueError, 'boundary must be "blocks" or "output"'),
    (
        "uniform",
        lambda: dpcache.Schedule.uniform(2.0, 5),
        TypeError,
        "num_key_steps must be a whole number, from 1 to 5",
    ),
    ("from_step", lambda: made_schedule().from_step(50), ValueError, "start must be from 0 to 49, got 50"),
    ("from_step", lambda: made_schedule().from_step(None), TypeError, "start must be a whole number"),
    ("builtin", lambda: dpcache.Schedule.builtin("flux", 13), dpcache.UnknownModelError, "there are flux1-dev"),
    ("builtin", lambda: dpcache.Schedule.builtin("flux1-dev", "13"), TypeError, "num_key_steps must be a whole number"),
    ("dpcache.plan", lambda: dpcache.plan("cost", 3), ValueError, "cost must be an array of numbers"),
    (
        "dpcache.plan",
        lambda: dpcache.plan(np.zeros((5, 6, 6)), None),
        TypeError,
        "num_key_steps must be a whole number",
    ),
    (
        "dpcache.plan_all",
        lambda: dpcache.plan_all(np.zeros((5, 6, 6)), max_gap=1.5),
        TypeError,
        "max_gap must be a whole",
    ),
    ("paper_cost", lambda: dpcache.paper_cost(np.zeros((5, 3)), order="2"), TypeError, "order must be a whole number"),
    ("paper_cost", lambda: dpcache.paper_cost(np.zeros(5)), ValueError, r"features must be \[T, ...\]"),
    ("paper_cost", lambda: dpcache.paper_cost(np.zeros((5, 0))), ValueError, "more than 2 steps of values"),
    ("sampler_cost", lambda: sampler_cost(GRAM, WEIGHTS[1:]), ValueError, r"gram must be \[runs, T, T\]"),
    ("sampler_cost", lambda: sampler_cost(GRAM, WEIGHTS, power=-1), ValueError, "power must be above 0, got -1"),
    (
        "schedule_cost",
        lambda: schedule_cost(GRAM, WEIGHTS, made_schedule()),
        ValueError,
        "the schedule is for 50 steps",
    ),
    ("Taylor", lambda: Taylor(1.5), TypeError, "order must be a whole number"),
    ("Fitted", lambda: Fitted(np.eye(3), ridge=-1.0), ValueError, "ridge must be 0 or more, got -1"),
    ("Fitted", lambda: Fitted(GRAM), ValueError, r"gram must be \[T, T\]"),
    ("chosen_ridge", lambda: chosen_ridge(np.eye(3), 1), ValueError, r"grams must be \[runs, T, T\]"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [w[1:] for w in WRONG], ids=[f"{n}-{w[0]}" for n, w in enumerate(WRONG)]
)
def test_refused_before_anything_runs(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)
    own = f"{os.sep}dpcache{os.sep}"
    assert own in str(caught.traceback[-1].path), "raised by some other library"


def test_what_counts_as_a_whole_number() -> None:
    keys = np.array([0, 2, 3])
    assert from_key_steps(keys, np.int64(5)) == from_key_steps([0, 2, 3])
    assert all(type(key) is int for key in from_key_steps(keys).key_steps)
    assert made_calibration().plan(np.int64(5)) == made_calibration().plan(5)
    assert Recipe(order=np.int32(1)) == Recipe(order=1)


def test_they_print_on_one_line() -> None:
    schedule, calibration = made_schedule(), made_calibration()
    assert repr(schedule) == ("Schedule(K=13 of 50, boundary='blocks', taylor order 2, for FluxTransformer2DModel)")
    assert repr(calibration) == "Calibration(T=20, 1 input, boundary='blocks', for FluxTransformer2DModel)"


def test_calibrations_are_equal_where_all_they_hold_is() -> None:
    one, other = made_calibration(), made_calibration()
    assert one == other and one != "calibration"
    other.gram[0, 0, 0] += 1e-9
    assert one != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
