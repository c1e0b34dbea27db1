"""The invariants of docs/architecture.md, each on the real, trained FLUX pipeline."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import dpcache
from dpcache.measure.recording import record
from tests.conftest import PROMPT, QUICK, STEPS, draw, traces

BOUNDARIES = ["blocks", "output"]
KEYS = (0, 1, 2, 5, 8)


def schedule_for(boundary: str = "blocks", keys: tuple[int, ...] = KEYS, order: int = 2) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, STEPS, order=order, boundary=boundary)


class Spy:
    """Watches, from inside the network, the value the head reads and how often each block really runs."""

    def __init__(self, pipe: Any) -> None:
        transformer = pipe.transformer
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.runs = [0] * len(self.blocks)
        self.head_inputs: list[torch.Tensor] = []
        self.handles = [transformer.norm_out.register_forward_pre_hook(self._head)]
        for number, block in enumerate(self.blocks):
            self.handles.append(block.attn.register_forward_pre_hook(lambda *_, n=number: self._ran(n)))

    def _head(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.head_inputs.append(args[0].clone())

    def _ran(self, number: int) -> None:
        self.runs[number] += 1

    def __enter__(self) -> "Spy":
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_1_all_key_steps_give_the_same_bits(flux, boundary):
    plain = draw(flux)
    with dpcache.enabled(flux, schedule_for(boundary, tuple(range(STEPS)))):
        assert np.array_equal(draw(flux), plain)
    with dpcache.enabled(flux, schedule_for(boundary)):
        assert not np.array_equal(draw(flux), plain)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_2_recording_changes_nothing(flux, boundary):
    plain, before = draw(flux), traces(flux)
    run = record(flux, {"prompt": PROMPT, "generator": torch.Generator().manual_seed(0), **QUICK}, boundary=boundary)
    assert np.array_equal(run.output[0], plain)
    assert traces(flux) == before
    assert np.array_equal(draw(flux), plain)
    (values,) = run.complete_branches()
    assert values.shape[0] == STEPS == run.num_steps


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_3_disable_leaves_no_trace(flux, boundary):
    plain, before = draw(flux), traces(flux)
    dpcache.enable(flux, schedule_for(boundary))
    assert traces(flux) != before
    draw(flux)
    dpcache.disable(flux)
    assert traces(flux) == before
    assert np.array_equal(draw(flux), plain)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("guided", [False, True])
def test_4_blocks_run_once_per_key_step_and_branch(flux, boundary, guided):
    branches = 2 if guided else 1
    more = {"negative_prompt": "", "true_cfg_scale": 2.0} if guided else {}
    with dpcache.enabled(flux, schedule_for(boundary)), Spy(flux) as spy:
        for generation in (1, 2, 3):
            draw(flux, **more)
            assert spy.runs == [len(KEYS) * branches * generation] * len(spy.blocks)
        stats = dpcache.stats(flux)
    assert stats.generations == 3
    assert stats.full_calls == len(KEYS) * branches * 3
    assert stats.predicted_calls == (STEPS - len(KEYS)) * branches * 3
    assert stats.computed_steps == KEYS
    assert stats.predicted_steps == tuple(sorted(set(range(STEPS)) - set(KEYS)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_5_a_prediction_is_the_weighted_sum_of_the_cached_values(dtype, order):
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu").to(dtype)
    pipe.set_progress_bar_config(disable=True)
    schedule = schedule_for(order=order)
    with dpcache.enabled(pipe, schedule), Spy(pipe) as spy:
        draw(pipe, output_type="latent")
    assert len(spy.head_inputs) == STEPS
    for step, terms in schedule.predictions.items():
        weighted = [spy.head_inputs[term.key_step].double() * term.coefficient for term in terms]
        exact, scale = sum(weighted), sum(w.abs() for w in weighted)
        got = spy.head_inputs[step]
        assert got.dtype == dtype
        # One rounding to the dtype, and the float32 arithmetic before it.
        bound = torch.finfo(dtype).eps * exact.abs() / 2 + 4 * torch.finfo(torch.float32).eps * scale
        assert bool(((got.double() - exact).abs() <= bound).all())


class Stop(Exception):
    pass


def raise_at(step: int, error: BaseException):
    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise error
        return kwargs

    return callback


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("at", [0, 3, STEPS - 1])
def test_6_the_generation_after_an_exception_is_like_any_other(flux, boundary, at, error):
    plain = draw(flux)
    with dpcache.enabled(flux, schedule_for(boundary)):
        expected = draw(flux, seed=5)
    with dpcache.enabled(flux, schedule_for(boundary)):
        with pytest.raises(type(error)):
            draw(flux, callback_on_step_end=raise_at(at, error))
        assert np.array_equal(draw(flux, seed=5), expected)
        with pytest.raises(type(error)):
            draw(flux, callback_on_step_end=raise_at(at, error))
    assert np.array_equal(draw(flux), plain)


def test_6_exception_inside_the_denoiser(flux):
    schedule = schedule_for()
    with dpcache.enabled(flux, schedule):
        expected = draw(flux)
        calls = iter(range(100))

        def fail(*_: Any) -> None:
            if next(calls) == 4:
                raise Stop

        handle = flux.transformer.proj_out.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            draw(flux)
        handle.remove()
        assert np.array_equal(draw(flux), expected)


def test_6_interrupted_from_a_callback(flux):
    def interrupt(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index >= 4
        return kwargs

    with dpcache.enabled(flux, schedule_for()):
        expected = draw(flux)
        draw(flux, callback_on_step_end=interrupt)
        assert np.array_equal(draw(flux), expected)


def test_7_pipelines_that_share_a_transformer_never_share_a_cache(flux):
    other = FluxPipeline(**{**flux.components, "scheduler": type(flux.scheduler).from_config(flux.scheduler.config)})
    other.default_sample_size = flux.default_sample_size
    other.set_progress_bar_config(disable=True)
    first, second = schedule_for(), schedule_for("output", (0, 1, 4, 7), order=1)
    plain = draw(flux)
    with dpcache.enabled(flux, first):
        expected_first = draw(flux)
    with dpcache.enabled(other, second):
        expected_second = draw(other)
        assert np.array_equal(draw(flux), plain)
    dpcache.enable(flux, first)
    dpcache.enable(other, second)
    assert np.array_equal(draw(flux), expected_first)
    assert np.array_equal(draw(other), expected_second)
    # Half-way through one, the other draws a picture.
    inner = []

    def draw_other(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 6:
            inner.append(draw(other))
        return kwargs

    assert np.array_equal(draw(flux, callback_on_step_end=draw_other), expected_first)
    assert np.array_equal(inner[0], expected_second)
    # Left half-way, a generation must not leak into a pipeline of the same transformer.
    with pytest.raises(Stop):
        draw(flux, callback_on_step_end=raise_at(4, Stop()))
    assert np.array_equal(draw(other), expected_second)
    dpcache.disable(other)
    assert np.array_equal(draw(other), plain)
    dpcache.disable(flux)
    assert np.array_equal(draw(flux), plain)


def test_7_one_pipeline_with_one_schedule_after_another(flux):
    schedules = [schedule_for(), schedule_for(keys=(0, 1, 4, 7)), schedule_for(order=1)]
    expected = []
    for schedule in schedules:
        with dpcache.enabled(flux, schedule):
            expected.append(draw(flux))
    for schedule, picture in zip(schedules[::-1], expected[::-1], strict=True):
        with dpcache.enabled(flux, schedule):
            assert np.array_equal(draw(flux), picture)


def test_a_pipeline_made_from_another_shares_its_scheduler(flux):
    twin = FluxPipeline(**flux.components)
    twin.default_sample_size = flux.default_sample_size
    twin.set_progress_bar_config(disable=True)
    first, second = schedule_for(), schedule_for(keys=(0, 1, 4, 7))
    dpcache.enable(flux, first)
    dpcache.enable(twin, second)
    dpcache.disable(flux)
    with_second = draw(twin)
    dpcache.disable(twin)
    with dpcache.enabled(flux, second):
        assert np.array_equal(draw(flux), with_second)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_no_more_than_order_plus_one_values_per_branch(flux, boundary, order):
    held = []

    def count(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        held.append(dpcache.stats(pipe).cached_values)
        return kwargs

    schedule = schedule_for(boundary, order=order)
    run = record(flux, {"prompt": PROMPT, **QUICK}, boundary=boundary)
    one_value = run.complete_branches()[0][0].nbytes
    with dpcache.enabled(flux, schedule):
        draw(flux, negative_prompt="", true_cfg_scale=2.0, callback_on_step_end=count)
        stats = dpcache.stats(flux)
    assert max(held) == 2 * (order + 1)
    assert stats.peak_cached_bytes == 2 * (order + 1) * one_value
    assert stats.cached_values == 0


def test_values_of_another_shape_are_never_used(flux):
    """A loop that changes its batch half-way begins anew with the values of the new shape."""
    with dpcache.following(flux.transformer, schedule_for()) as loop, Spy(flux) as spy:
        flux.scheduler.set_timesteps(STEPS, mu=0.5, sigmas=np.linspace(1, 1 / STEPS, STEPS))
        embeds, pooled, text_ids = flux.encode_prompt(
            [PROMPT, "a large blue circle on a white background, left"], max_sequence_length=24
        )
        latents, image_ids = flux.prepare_latents(
            2,
            flux.transformer.config.in_channels // 4,
            32,
            32,
            embeds.dtype,
            torch.device("cpu"),
            torch.Generator().manual_seed(0),
        )
        sizes = [2] * 4 + [1] * (STEPS - 4)
        for t, size in zip(flux.scheduler.timesteps, sizes, strict=True):
            latents = latents[:size]
            with torch.no_grad():
                velocity = flux.transformer(
                    hidden_states=latents,
                    timestep=t.expand(size) / 1000,
                    pooled_projections=pooled[:size],
                    encoder_hidden_states=embeds[:size],
                    txt_ids=text_ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
            latents = flux.scheduler.step(velocity, t, latents, return_dict=False)[0]
        stats = loop.stats()
    # From step 4 on the batch is smaller: as at step 0, three steps in a row are computed, then the schedule's own.
    assert stats.predicted_steps == (3, 7, 9, 10, 11)
    assert stats.computed_steps == (0, 1, 2, 4, 5, 6, 8)
    assert spy.runs[0] == 7


def test_another_number_of_steps_is_computed_in_full_with_one_warning(flux):
    plain = draw(flux, num_inference_steps=7)
    with dpcache.enabled(flux, schedule_for()):
        with pytest.warns(UserWarning, match="covers 12 steps.*called for 7.*num_inference_steps=12") as caught:
            assert np.array_equal(draw(flux, num_inference_steps=7), plain)
        assert len(caught) == 1
        assert dpcache.stats(flux).computed_steps == tuple(range(7))


def test_another_thread_is_not_disturbed(flux):
    """A bare call of the transformer from elsewhere, in the middle of a generation, runs in full."""
    results = []

    def call_elsewhere(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 6:
            embeds, pooled, text_ids = pipe.encode_prompt(PROMPT, max_sequence_length=24)
            ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)

            def work() -> None:
                with torch.no_grad():
                    results.append(
                        pipe.transformer(
                            hidden_states=kwargs["latents"],
                            timestep=torch.ones(1),
                            pooled_projections=pooled,
                            encoder_hidden_states=embeds,
                            txt_ids=text_ids,
                            img_ids=ids,
                            return_dict=False,
                        )[0]
                    )

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return kwargs

    with dpcache.enabled(flux, schedule_for()), Spy(flux) as spy:
        expected = draw(flux)
        before = spy.runs[0]
        assert np.array_equal(draw(flux, callback_on_step_end=call_elsewhere), expected)
        assert len(results) == 1
        assert spy.runs[0] == before + len(KEYS) + 1


def test_enable_and_disable_in_the_wrong_order(flux):
    with pytest.raises(dpcache.CacheStateError, match=r"enable\(pipe, num_key_steps=13\) first"):
        dpcache.disable(flux)
    with pytest.raises(dpcache.CacheStateError, match="not enabled"):
        dpcache.stats(flux)
    with dpcache.enabled(flux, schedule_for()):
        with pytest.raises(dpcache.CacheStateError, match=r"disable\(pipe\) first"):
            dpcache.enable(flux, schedule_for())
        with pytest.raises(dpcache.CacheStateError, match=r"disable\(pipe\) first"):
            dpcache.calibrate(flux, [PROMPT], progress=False, **QUICK)


def test_a_schedule_for_another_model_is_refused(flux):
    calibration = dpcache.calibrate(flux, [PROMPT], progress=False, **QUICK)
    schedule = calibration.plan(5)
    stranger = schedule.model_copy(update={"model": schedule.model.model_copy(update={"config": "0" * 16})})
    with pytest.raises(dpcache.ScheduleMismatchError, match="calibrate this model"):
        dpcache.enable(flux, stranger)
    with dpcache.enabled(flux, schedule):
        draw(flux)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(dpcache.UnsupportedPipelineError, match="Pass a diffusers pipeline"):
        dpcache.enable(object(), schedule_for())
