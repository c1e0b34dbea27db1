"""Schedule and calibration files: what is written is read back, and nothing else is."""

import dataclasses
import json
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dpcache
from dpcache.files.whole import write_whole
from dpcache.measure.calibration_file import Facts
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import ModelIdentity

MODEL = ModelIdentity(denoiser="FluxTransformer2DModel", config="0123456789abcdef")
SIGMAS = 1 - np.append(0, np.linspace(0.1, 0.2, 20).cumsum()) / 3


@pytest.fixture
def calibration() -> dpcache.Calibration:
    features = np.random.default_rng(0).normal(size=(20, 64)).cumsum(axis=0)
    facts = Facts(
        num_inference_steps=20,
        boundary="blocks",
        order=2,
        model=MODEL,
        pipeline="FluxPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=tuple(np.linspace(1000, 50, 20)),
        sigmas=tuple(SIGMAS.tolist()),
        prediction="flow_prediction",
        num_inputs=1,
        num_branches=1,
        calls=({"prompt": "a red ring"},),
    )
    gram = features @ features.T / features.shape[1]
    return dpcache.Calibration(
        facts=facts,
        paper_cost=dpcache.paper_cost(features),
        gram=gram[None],
        value_gram=gram[None],
        influence=np.diff(SIGMAS)[None],
        probes=np.linspace(4, 1, 20)[None],
        tried=np.eye(20)[:1] + np.eye(20)[7] + np.eye(20)[12],
        tried_error=np.array([0.1]),
    )


@given(st.data())
def test_schedule_round_trip(data):
    steps = data.draw(st.integers(1, 60))
    rest = data.draw(st.sets(st.integers(1, steps - 1))) if steps > 1 else set()
    order = data.draw(st.integers(0, 3))
    model = data.draw(st.sampled_from([None, MODEL]))
    schedule = dpcache.Schedule.from_key_steps(sorted({0} | rest), steps, order=order, model=model, cost=0.1)
    with tempfile.TemporaryDirectory() as folder:
        schedule.save(Path(folder) / "s.json")
        assert dpcache.Schedule.load(Path(folder) / "s.json") == schedule


def test_calibration_round_trip_and_plan(calibration, tmp_path):
    calibration.save(tmp_path / "c.safetensors")
    loaded = dpcache.Calibration.load(tmp_path / "c.safetensors")
    for recipe in (Recipe(), Recipe(measured=1.0), Recipe(method="paper"), Recipe(predictor="fitted")):
        np.testing.assert_array_equal(loaded.cost(recipe), calibration.cost(recipe))
    assert loaded.facts == calibration.facts
    schedule = loaded.plan(num_key_steps=7, recipe=Recipe("taylor", max_gap=5))
    best = dpcache.plan(calibration.cost(), 7, first_key_steps=1, max_gap=5)
    assert schedule.key_steps == best.key_steps
    assert schedule.cost == best.cost
    assert (schedule.model, schedule.boundary, schedule.order) == (MODEL, "blocks", 2)
    assert loaded.plan_all(Recipe("taylor"))[7] == dpcache.plan(calibration.cost(), 7, first_key_steps=1)
    assert loaded.interpolation_error == calibration.interpolation_error
    loaded.on_grid(12).save(tmp_path / "interpolated.safetensors")
    interpolated = dpcache.Calibration.load(tmp_path / "interpolated.safetensors")
    assert (interpolated.facts.num_inference_steps, interpolated.facts.recorded_steps) == (12, 20)
    assert interpolated.plan(4) == calibration.plan(4, num_inference_steps=12)
    by_paper = loaded.plan(num_key_steps=7, recipe=Recipe(method="paper", max_gap=5))
    assert by_paper.key_steps == dpcache.plan(calibration.paper_cost, 7, max_gap=5).key_steps != schedule.key_steps


def test_method_is_checked(calibration):
    with pytest.raises(dpcache.CalibrationError, match="Taylor predictions of order 2 alone"):
        calibration.plan(7, recipe=Recipe(method="paper", order=1))
    unprobed = dataclasses.replace(calibration, probes=np.empty((0, 20)), tried=np.empty((0, 20)))
    np.testing.assert_array_equal(unprobed.cost(), calibration.cost(Recipe(measured=0)))
    for asked in ({"num_key_steps": 7, "recipe": Recipe(measured=0.5)}, {"max_error": 0.1}):
        with pytest.raises(dpcache.CalibrationError, match='calibrate with sensitivity="measured"'):
            unprobed.plan(**asked)
    unseen = dataclasses.replace(unprobed, gram=np.empty((0, 20, 20)))
    with pytest.raises(dpcache.CalibrationError, match=r'plan with Recipe\(method="paper"\)'):
        unseen.plan(7)
    assert unseen.plan(7, recipe=Recipe(method="paper")) == unprobed.plan(7, recipe=Recipe(method="paper"))


@pytest.fixture
def written(calibration, tmp_path):
    calibration.save(tmp_path / "c.safetensors")
    calibration.plan(7).save(tmp_path / "s.json")
    return {"calibration": tmp_path / "c.safetensors", "schedule": tmp_path / "s.json"}


LOADERS = {"calibration": dpcache.Calibration.load, "schedule": dpcache.Schedule.load}


@pytest.mark.parametrize("kind", LOADERS)
def test_truncated_at_any_point(kind, written):
    whole = written[kind].read_bytes()
    for size in sorted({0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2}):
        written[kind].write_bytes(whole[:size])
        with pytest.raises(dpcache.FileFormatError, match="Make it anew with"):
            LOADERS[kind](written[kind])


@pytest.mark.parametrize("kind", LOADERS)
def test_pickles_are_refused_unread(kind, written, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for dump in (pickle.dumps(Bomb()), None):
        if dump is None:
            torch.save({"cost": torch.zeros(2)}, written[kind])
        else:
            written[kind].write_bytes(dump)
        with pytest.raises(dpcache.FileFormatError, match="pickle"):
            LOADERS[kind](written[kind])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_the_other_kind_is_refused(kind, written):
    (other,) = set(LOADERS) - {kind}
    with pytest.raises(dpcache.FileFormatError, match=f"{kind}|whole"):
        LOADERS[kind](written[other])


def edit_schedule(path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99; this release reads version"),
        (lambda d: d["key_steps"].append(3), "key_steps must increase"),
        (lambda d: d["predictions"].popitem(), "cover the skipped steps"),
        (lambda d: next(iter(d["predictions"].values()))[0].update(coefficient=7.0), "edited"),
        (lambda d: d.update(boundary="somewhere"), "boundary"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(cost=1.0), "edited"),
        (lambda d: d.pop("key_steps"), "key_steps"),
    ],
)
def test_edited_schedules(written, change, message):
    edit_schedule(written["schedule"], change)
    with pytest.raises(dpcache.FileFormatError, match=message) as caught:
        dpcache.Schedule.load(written["schedule"])
    assert "Make it anew" in str(caught.value)


def test_edited_calibrations(written):
    path = written["calibration"]
    whole = path.read_bytes()
    # One bit of one cost.
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(dpcache.FileFormatError, match="edited"):
        dpcache.Calibration.load(path)
    (size,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + size]
    path.write_bytes(whole[:8] + header.replace(b'"version":"4"', b'"version":"9"') + whole[8 + size :])
    with pytest.raises(dpcache.FileFormatError, match="version 9; this release reads version 4"):
        dpcache.Calibration.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(dpcache.FileFormatError, match="not a dpcache calibration"):
        dpcache.Calibration.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part):
        part.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_files():
    for load in LOADERS.values():
        with pytest.raises(FileNotFoundError):
            load("nowhere")


@pytest.mark.parametrize(
    ("keys", "message"),
    [((), "start with 0"), ((1, 2), "start with 0"), ((0, 2, 2), "increase"), ((0, 20), "not one of the 20")],
)
def test_bad_key_steps(keys, message):
    with pytest.raises(ValueError, match=message):
        dpcache.Schedule.from_key_steps(keys, 20)


def test_uniform_schedule():
    assert dpcache.Schedule.uniform(5, 50).key_steps == (0, 10, 20, 30, 40)
    assert dpcache.Schedule.uniform(13, 50).num_key_steps == 13
    assert dpcache.Schedule.uniform(50, 50).predictions == {}
    with pytest.raises(ValueError, match="from 1 to 50"):
        dpcache.Schedule.uniform(0, 50)


def test_schedule_keeps_its_noise_levels(tmp_path):
    plain = dpcache.Schedule.from_key_steps([0, 2], 4)
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    schedule = plain.model_copy(update={"sigmas": levels})
    schedule.save(tmp_path / "levels.json")
    assert dpcache.Schedule.load(tmp_path / "levels.json") == schedule
    assert schedule.from_step(2).sigmas == levels[2:]
    with pytest.raises(ValueError, match="5 noise levels"):
        dpcache.Schedule.model_validate(schedule.model_dump() | {"sigmas": levels[1:]})
