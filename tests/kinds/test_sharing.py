"""Parts that pipelines share, calls inside callbacks, copies, replaced parts, threads."""

import copy
import io
import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback

import dpcache
from tests.conftest import STEPS, draw, traces
from tests.kinds.conftest import FEW, KEYS, OTHER, at_step, bare_call, twin_of

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

TWINS = {
    "one scheduler, one transformer": twin_of,
    "own scheduler": lambda pipe: twin_of(pipe, own_scheduler=True),
    "from_pipe": lambda pipe: _settled(diffusers.FluxPipeline.from_pipe(pipe), pipe),
    "AutoPipeline": lambda pipe: _settled(diffusers.AutoPipelineForText2Image.from_pipe(pipe), pipe),
}


def _settled(twin: Any, pipe: Any) -> Any:
    twin.set_progress_bar_config(disable=True)
    twin.default_sample_size = pipe.default_sample_size
    return twin


# ------------------------------------------------------------------------------------------------- shared components


@pytest.mark.parametrize("boundary", ["blocks", "output"])
@pytest.mark.parametrize("made", list(TWINS))
def test_a_twin_that_is_not_enabled_draws_as_ever(flux: Any, made: str, boundary: str) -> None:
    full = draw(flux)
    schedule = dpcache.Schedule.from_key_steps(KEYS.key_steps, STEPS, boundary=boundary)
    before = TWINS[made](flux)
    with dpcache.enabled(flux, schedule):
        after = TWINS[made](flux)
        expected = draw(flux)
        for twin in (before, after):
            assert np.array_equal(draw(twin), full)
            assert np.array_equal(draw(flux), expected)
            with pytest.raises(dpcache.CacheStateError):
                dpcache.stats(twin)
    assert np.array_equal(draw(after), full)


@pytest.mark.parametrize("first_enabled", [0, 1])
@pytest.mark.parametrize("made", list(TWINS))
def test_two_enabled_twins_follow_their_own(flux: Any, made: str, first_enabled: int) -> None:
    pipes, schedules = [flux, TWINS[made](flux)], [KEYS, FEW]
    expected = []
    for pipe, schedule in zip(pipes, schedules, strict=True):
        with dpcache.enabled(pipe, schedule):
            expected.append(draw(pipe))
    for number in (first_enabled, 1 - first_enabled):
        dpcache.enable(pipes[number], schedules[number])
    for number in (0, 1, 1, 0):
        assert np.array_equal(draw(pipes[number]), expected[number])
    for number in (0, 1):
        assert dpcache.stats(pipes[number]).computed_steps == schedules[number].key_steps
        assert dpcache.stats(pipes[number]).generations == 2
    dpcache.disable(pipes[first_enabled])
    assert np.array_equal(draw(pipes[1 - first_enabled]), expected[1 - first_enabled])
    dpcache.disable(pipes[1 - first_enabled])


# ----------------------------------------------------------------------------------------------- calls in callbacks


@pytest.mark.parametrize("step", [0, 6, STEPS - 1])
def test_another_pipeline_in_a_callback_draws_in_full(flux: Any, cached: np.ndarray, step: int) -> None:
    inner = twin_of(flux, own_scheduler=True)
    full = draw(inner, OTHER, 5)
    drawn: list[np.ndarray] = []
    with dpcache.enabled(flux, KEYS):
        picture = draw(flux, callback_on_step_end=at_step(step, lambda _: drawn.append(draw(inner, OTHER, 5))))
        assert dpcache.stats(flux).computed_steps == KEYS.key_steps
        assert dpcache.stats(flux).generations == 1
    assert np.array_equal(drawn[0], full)
    assert np.array_equal(picture, cached)


@pytest.mark.parametrize("step", [0, 2, 6])
def test_a_bare_call_in_a_callback_is_computed(flux: Any, cached: np.ndarray, step: int) -> None:
    latents = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))
    expected, found = bare_call(flux, latents), []
    with dpcache.enabled(flux, KEYS):
        for _ in range(2):
            picture = draw(
                flux,
                callback_on_step_end=at_step(step, lambda _: found.extend(bare_call(flux, latents) for _ in range(4))),
            )
            assert np.array_equal(picture, cached)
        assert dpcache.stats(flux).full_calls == 2 * len(KEYS.key_steps)
    assert all(torch.equal(output, expected) for output in found) and len(found) == 8


class Counting(PipelineCallback):
    """A callback of diffusers' own kind, with a state of its own."""

    seen = 0

    @property
    def tensor_inputs(self) -> list[str]:
        return ["latents"]

    def callback_fn(self, pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        self.seen += 1
        if step == 4:
            self.full = draw(self.inner)
        return given


def test_a_callback_object_stays_one(flux: Any, cached: np.ndarray) -> None:
    callback = Counting()
    callback.inner = twin_of(flux, own_scheduler=True)
    full = draw(flux)
    with dpcache.enabled(flux, KEYS):
        assert np.array_equal(draw(flux, callback_on_step_end=callback), cached)
    assert callback.seen == STEPS
    assert np.array_equal(callback.full, full)


# --------------------------------------------------------------------------------------- copies and replaced parts


def test_a_shallow_copy_follows_as_well(flux: Any, cached: np.ndarray) -> None:
    full = draw(flux)
    with dpcache.enabled(flux, KEYS):
        request = copy.copy(flux)
        request.scheduler = type(flux.scheduler).from_config(flux.scheduler.config)
        assert np.array_equal(draw(request), cached)
        assert np.array_equal(draw(flux), cached)
        assert dpcache.stats(request).generations == 2
        dpcache.disable(request)
        assert np.array_equal(draw(request), full)
        assert np.array_equal(draw(flux), cached)
        late = copy.copy(flux)
    with pytest.warns(UserWarning, match="disabled on the pipeline that this one is a copy of"):
        assert np.array_equal(draw(late), full)
    assert np.array_equal(draw(flux), full)


def test_a_copy_with_another_transformer(flux: Any, cached: np.ndarray) -> None:
    with dpcache.enabled(flux, KEYS):
        request = copy.copy(flux)
        request.transformer = copy.deepcopy(flux.transformer)
        for _ in range(2):
            assert np.array_equal(draw(request), cached)
            assert np.array_equal(draw(flux), cached)
    assert traces_of(request.transformer) == traces_of(copy.deepcopy(flux.transformer))


def traces_of(transformer: Any) -> list[Any]:
    return [sorted(set(vars(module)) - {"_diffusers_hook"}) for module in transformer.modules()]


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_a_replaced_transformer_is_followed(flux: Any, boundary: str) -> None:
    schedule = dpcache.Schedule.from_key_steps(KEYS.key_steps, STEPS, boundary=boundary)
    original = flux.transformer
    with dpcache.enabled(flux, schedule):
        expected = draw(flux)
        flux.transformer = copy.deepcopy(original)
        assert np.array_equal(draw(flux), expected)
        assert dpcache.stats(flux).computed_steps == schedule.key_steps
    replaced, flux.transformer = flux.transformer, original
    assert traces_of(replaced) == traces_of(original)


def test_a_transformer_of_another_model_is_computed_in_full(flux: Any) -> None:
    model = dpcache.calibrate(flux, ["x"], num_inference_steps=4, max_sequence_length=24, progress=False).facts.model
    schedule = dpcache.Schedule.from_key_steps(KEYS.key_steps, STEPS, model=model)
    original, other = flux.transformer, copy.deepcopy(flux.transformer)
    other.register_to_config(axes_dims_rope=(2, 14, 16))
    with dpcache.enabled(flux, schedule):
        flux.transformer = other
        with pytest.warns(UserWarning, match="computes every step in full.*made for FluxTransformer2DModel"):
            draw(flux)
        draw(flux)  # one warning
        assert dpcache.stats(flux).predicted_calls == 0
        flux.transformer = original
        draw(flux)
        assert dpcache.stats(flux).computed_steps == KEYS.key_steps


@pytest.mark.parametrize("how", ["another object", "another kind"])
def test_a_replaced_scheduler_is_followed(flux: Any, cached: np.ndarray, how: str) -> None:
    original = flux.scheduler
    kind = type(original) if how == "another object" else diffusers.FlowMatchLCMScheduler
    with dpcache.enabled(flux, KEYS):
        flux.scheduler = kind.from_config(original.config)
        if how == "another object":
            assert np.array_equal(draw(flux), cached)
            assert dpcache.stats(flux).computed_steps == KEYS.key_steps
        else:
            draw(flux)
            assert dpcache.stats(flux).computed_steps == KEYS.key_steps
        assert "step" not in vars(original)
        replaced, flux.scheduler = flux.scheduler, original
        assert np.array_equal(draw(flux), cached)
    assert "step" not in vars(replaced)


def test_pickled_it_is_a_plain_pipeline(flux: Any) -> None:
    full = draw(flux)
    with dpcache.enabled(flux, KEYS):
        draw(flux)
        file = io.BytesIO()
        torch.save({"pipe": flux.transformer, "scheduler": flux.scheduler, "call": flux}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["call"]
    assert type(loaded) is diffusers.FluxPipeline
    assert np.array_equal(draw(loaded), full)
    assert {name: kept for name, kept in traces(loaded).items() if name not in ("pipeline", "scheduler")}.keys()


def test_it_still_is_a_pipeline_of_its_class(flux: Any) -> None:
    with dpcache.enabled(flux, KEYS):
        assert isinstance(flux, diffusers.FluxPipeline)
        assert type(flux).__name__ == "FluxPipeline" and type(flux).__module__ == diffusers.FluxPipeline.__module__
        assert flux.components.keys() == twin_of(flux).components.keys()
        assert "prompt" in __import__("inspect").signature(flux.__call__).parameters
    assert type(flux) is diffusers.FluxPipeline


# ------------------------------------------------------------------------------------------------------------ threads


def in_threads(works: list[Any]) -> list[Any]:
    """What each work returns or raises, all run at a time."""
    found: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_one_pipeline_in_several_threads(boundary: str) -> None:
    pipe = dpcache.load_pipeline("tiny-dit", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    schedule = dpcache.Schedule.from_key_steps((0, 1, 2, 5, 8), STEPS, boundary=boundary)

    def one(labels: list[int]) -> np.ndarray:
        generator = torch.Generator().manual_seed(labels[0])
        return pipe(class_labels=labels, num_inference_steps=STEPS, generator=generator, output_type="np").images

    batches = [[0], [3, 4], [7]]  # of different shapes
    with dpcache.enabled(pipe, schedule):
        alone = [one(labels) for labels in batches]
        found = in_threads([lambda labels=labels: one(labels) for labels in batches * 3])
        assert dpcache.stats(pipe).generations == 12
        assert dpcache.stats(pipe).cached_values == 0
    for number, picture in enumerate(found):
        assert np.array_equal(picture, alone[number % len(batches)])


@pytest.mark.parametrize("how", ["one pipeline", "copies"])
def test_threads_with_a_scheduler_that_counts(flux: Any, cached: np.ndarray, how: str) -> None:
    """The text encoder's tokenizer cannot be borrowed twice: prompts are encoded before."""
    embeds, pooled, _ = flux.encode_prompt(OTHER, None, max_sequence_length=24)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    with dpcache.enabled(flux, KEYS):
        expected = draw(flux, **given)

        def work() -> np.ndarray:
            pipe = flux
            if how == "copies":
                pipe = copy.copy(flux)
                pipe.scheduler = type(flux.scheduler).from_config(flux.scheduler.config)
            return draw(pipe, **given)

        found = in_threads([work] * 4)
    assert all(np.array_equal(picture, expected) for picture in found)
