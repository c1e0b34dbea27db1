"""The one way to say how to plan: every field is checked, by name and by value, before anything runs."""

import dataclasses
import pickle

import pytest

import dpcache
from dpcache.plan.recipe import RECIPE_FIELDS, Recipe
from tests.test_hub import made_calibration


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"predictor": "tailor"}, ValueError, 'predictor must be "taylor", "trend" or "fitted", got \'tailor\''),
        ({"method": "magic"}, ValueError, 'method must be "sampler" or "paper", got \'magic\''),
        ({"order": -1}, ValueError, "order must be 0 or more, got -1"),
        ({"order": 1.5}, TypeError, "order must be a whole number, 0 or more; got 1.5"),
        ({"measured": 1.5}, ValueError, "measured must be from 0 to 1, got 1.5"),
        ({"measured": float("nan")}, ValueError, "measured must be from 0 to 1, got nan"),
        ({"measured": "half"}, TypeError, "measured must be a number, got 'half'"),
        ({"power": 0}, ValueError, "power must be above 0, got 0"),
        ({"power": float("inf")}, ValueError, "power must be above 0, got inf"),
        ({"first_key_steps": True}, TypeError, "first_key_steps must be a whole number"),
        ({"last_key_steps": -2}, ValueError, "last_key_steps must be 0 or more, got -2"),
        ({"last_key_steps": None}, TypeError, "last_key_steps must be a whole number"),
        ({"max_gap": 0}, ValueError, "max_gap must be 1 or more, got 0"),
        ({"correct": "yes"}, TypeError, "correct must be True, False or None, got 'yes'"),
        ({"ordre": 1}, TypeError, "a Recipe has no ordre: it has predictor, order, measured, method"),
    ],
)
def test_what_is_wrong_is_said_with_the_value_and_what_is_allowed(fields, error, message):
    with pytest.raises(error) as caught:
        Recipe(**fields)
    assert message in str(caught.value)
    if set(fields) <= set(RECIPE_FIELDS):
        with pytest.raises(error):
            dataclasses.replace(Recipe(), **fields)


def test_every_field_is_documented_once():
    for name in RECIPE_FIELDS:
        assert Recipe.__doc__.count(f"        {name}: ") == 1, name


def test_it_is_a_value():
    recipe = Recipe("fitted", 1, 0.5, first_key_steps=2)
    assert recipe == pickle.loads(pickle.dumps(recipe)) == dataclasses.replace(recipe)
    assert len({recipe, Recipe("fitted", 1, 0.5, first_key_steps=2), Recipe()}) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: c.plan(5, method="paper"),
            r"plan\(\) has no argument method: .*recipe=dpcache.Recipe\(method",
        ),
        (lambda c: c.plan(5, steps=20), r"plan\(\) has no argument steps: it takes num_key_steps, speedup, max_error"),
        (
            lambda c: dpcache.enable(object(), c, key_steps=5),
            r"enable\(\) has no argument key_steps: it takes",
        ),
        (lambda c: dpcache.enable(object(), c, num_key_steps=5, order=1), r"recipe=dpcache.Recipe\(order=1\)"),
    ],
)
def test_unknown_arguments_are_told_from_the_known(call, message):
    with pytest.raises(TypeError, match=message):
        call(made_calibration())


def test_the_defaults_of_a_recipe_depend_on_its_method():
    assert Recipe().forced_first == 1
    assert Recipe(method="paper").forced_first == 3
    calibration = made_calibration()
    assert calibration.plan(5, recipe=Recipe("taylor")) == calibration.plan(5, recipe=Recipe(order=2))
    assert set(calibration.plan_all(Recipe(max_gap=4))) < set(calibration.plan_all())
    assert calibration.schedule([0, 3, 9], Recipe(correct=False)).corrections == {}
