"""Loops that are left half-way, calls that fail, pipelines that are deleted: nothing stays behind."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import dpcache
from dpcache.run.plans import _KEPT
from tests.conftest import PROMPT, QUICK, STEPS, draw, traces
from tests.kinds.conftest import FEW, KEYS, OTHER, at_step, twin_of


class Stop(Exception):
    pass


def raising(error: BaseException) -> Any:
    def do(_: Any) -> None:
        raise error

    return do


# ------------------------------------------------------------------------------------------------------ left half-way


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), SystemExit()], ids=["exception", "ctrl-c", "exit"])
@pytest.mark.parametrize("whose", ["own", "twin", "enabled twin"])
def test_left_by_an_exception(flux: Any, cached: np.ndarray, whose: str, error: BaseException) -> None:
    twin, third = twin_of(flux), twin_of(flux, own_scheduler=True)
    full = draw(third, OTHER, 5)
    with dpcache.enabled(flux, KEYS):
        if whose == "enabled twin":
            dpcache.enable(twin, FEW)
        left = flux if whose == "own" else twin
        with pytest.raises(type(error)):
            draw(left, callback_on_step_end=at_step(6, raising(error)))
        assert dpcache.stats(flux).cached_values == dpcache.stats(flux).cached_bytes == 0
        if whose == "enabled twin":
            assert dpcache.stats(twin).cached_values == 0
            dpcache.disable(twin)
        assert np.array_equal(draw(third, OTHER, 5), full)
        assert np.array_equal(draw(flux), cached)
        assert np.array_equal(draw(twin, OTHER, 5), full)


def test_left_inside_the_denoiser(flux: Any, cached: np.ndarray) -> None:
    full = draw(flux, OTHER, 5)
    third = twin_of(flux, own_scheduler=True)
    calls = iter(range(10**6))

    def fail(*_: Any) -> None:
        if next(calls) == 3:
            raise Stop

    with dpcache.enabled(flux, KEYS):
        handle = flux.transformer.single_transformer_blocks[-1].attn.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            draw(flux)
        handle.remove()
        assert dpcache.stats(flux).cached_values == 0
        assert np.array_equal(draw(third, OTHER, 5), full)
        assert np.array_equal(draw(flux), cached)


class Yielding(diffusers.FluxPipeline):
    """Yields latents as it goes: every step is a call of one step of the parent's loop, as seen from a callback."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        kwargs = {**QUICK, **kwargs}
        embeds, pooled, text_ids = self.encode_prompt(args[0], None, max_sequence_length=24)
        self.scheduler.set_timesteps(STEPS, mu=0.5, sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
        latents, ids = self.prepare_latents(1, 8, 32, 32, embeds.dtype, torch.device("cpu"), kwargs["generator"])
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                velocity = self.transformer(
                    hidden_states=latents,
                    timestep=t.expand(1) / 1000,
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=ids,
                    return_dict=False,
                )[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            yield latents


def test_a_generator_is_followed_and_may_be_dropped(flux: Any) -> None:
    pipe = twin_of(flux, own_scheduler=True, kind=Yielding)

    def go() -> Iterator[Any]:
        return pipe(PROMPT, generator=torch.Generator().manual_seed(0))

    full = list(go())[-1]
    full_flux = draw(flux)
    with dpcache.enabled(pipe, KEYS):
        expected = list(go())
        assert len(expected) == STEPS and not torch.equal(expected[-1], full)
        assert dpcache.stats(pipe).computed_steps == KEYS.key_steps
        go()  # never begun, it counts as no call
        assert not pipe._dpcache_entry.is_busy
        half = go()
        for _ in range(6):
            next(half)
        assert dpcache.stats(pipe).cached_values > 0
        # Between its steps another pipeline of the same transformer draws in full.
        assert np.array_equal(draw(twin_of(flux, own_scheduler=True)), full_flux)
        del half
        gc.collect()
        assert dpcache.stats(pipe).cached_values == 0
        assert torch.equal(list(go())[-1], expected[-1])
    assert torch.equal(list(go())[-1], full)


# --------------------------------------------------------------------------------------------------- failed beginnings


def _no_scheduler(pipe: Any) -> None:
    pipe.scheduler = None


def _odd_blocks(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])


def _other_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


FAULTS = {"no scheduler": _no_scheduler, "odd blocks": _odd_blocks, "another cache": _other_cache}


@pytest.mark.parametrize("call", ["enable", "calibrate", "compare"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_fails_at_once_leaves_nothing(fault: str, call: str) -> None:
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    scheduler = pipe.scheduler
    FAULTS[fault](pipe)
    before = _traces(pipe), sorted(vars(scheduler))
    with pytest.raises(dpcache.UnsupportedPipelineError):
        if call == "enable":
            dpcache.enable(pipe, KEYS)
        elif call == "calibrate":
            dpcache.calibrate(pipe, [PROMPT], progress=False, num_inference_steps=4)
        else:
            dpcache.compare(pipe, KEYS, [PROMPT], progress=False)
    assert (_traces(pipe), sorted(vars(scheduler))) == before
    assert type(pipe) is diffusers.FluxPipeline


def _traces(pipe: Any) -> list[Any]:
    found = [sorted(set(vars(pipe)) - {"_progress_bar_config"})]
    return found + [
        (sorted(vars(module)), sorted(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})))
        for module in pipe.transformer.modules()
    ]


def test_a_schedule_of_another_model_leaves_nothing(flux: Any) -> None:
    before = traces(flux)
    schedule = dpcache.calibrate(flux, [PROMPT], progress=False, num_inference_steps=6, max_sequence_length=24).plan(3)
    stranger = schedule.model_copy(update={"model": schedule.model.model_copy(update={"denoiser": "Other"})})
    with pytest.raises(dpcache.ScheduleMismatchError):
        dpcache.enable(flux, stranger)
    assert traces(flux) == before and type(flux) is diffusers.FluxPipeline


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("call", ["calibrate", "measured", "compare", "optimize"])
def test_what_fails_later_leaves_nothing(flux: Any, call: str, number: int, error: BaseException) -> None:
    """Whichever of its denoiser calls it is that fails."""
    before, full = traces(flux), draw(flux)
    calls = iter(range(10**6))

    def fail(*_: Any) -> None:
        if next(calls) == number * 3:
            raise error

    settings = {"num_inference_steps": 6, "max_sequence_length": 24, "progress": False}
    handle = flux.transformer.proj_out.register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            if call == "compare":
                dpcache.compare(flux, dpcache.Schedule.uniform(3, 6), [PROMPT, OTHER], **settings)
            elif call == "optimize":
                dpcache.optimize(flux, [PROMPT, OTHER], num_key_steps=3, **settings)
            else:
                sensitivity = "measured" if call == "measured" else "sampler"
                dpcache.calibrate(flux, [PROMPT, OTHER, PROMPT, OTHER], sensitivity=sensitivity, **settings)
    finally:
        handle.remove()
    assert traces(flux) == before and type(flux) is diffusers.FluxPipeline
    assert np.array_equal(draw(flux), full)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("boundary", ["blocks", "output"])
@pytest.mark.parametrize("name", ["tiny-flux", "tiny-dit"])
def test_a_deleted_pipeline_is_freed(name: str, boundary: str, used: bool) -> None:
    pipe = dpcache.load_pipeline(name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    dpcache.enable(pipe, dpcache.Schedule.uniform(2, 4, boundary=boundary))
    if used:
        given = {"prompt": PROMPT, "max_sequence_length": 24} if name == "tiny-flux" else {"class_labels": [1]}
        pipe(num_inference_steps=4, **given)
    parts = [weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler), weakref.ref(pipe)]
    # The pipeline itself goes at once; modules of torch and diffusers refer to themselves.
    del pipe
    assert parts[2]() is None
    gc.collect()
    assert [part() for part in parts] == [None, None, None]


def test_a_deleted_twin_takes_its_hooks_along(flux: Any) -> None:
    before, full = traces(flux), draw(flux)
    twin = twin_of(flux)
    dpcache.enable(twin, KEYS)
    draw(twin)
    assert traces(flux) != before
    del twin
    assert traces(flux) == before
    assert np.array_equal(draw(flux), full)


def test_a_replaced_transformer_is_not_held(flux: Any) -> None:
    import copy

    original = flux.transformer
    with dpcache.enabled(flux, KEYS):
        flux.transformer = copy.deepcopy(original)
        draw(flux)
        old = weakref.ref(flux.transformer)
        flux.transformer = original
        gc.collect()
        assert old() is None
        draw(flux)


def test_plans_for_many_resolutions_are_bounded(flux: Any) -> None:
    """Every resolution has noise levels of its own."""
    calibration = dpcache.calibrate(
        flux, [PROMPT, OTHER], num_inference_steps=12, max_sequence_length=24, progress=False
    )
    dpcache.enable(flux, calibration, num_key_steps=4)
    plans = flux._dpcache_entry.watcher.plans
    for number in range(_KEPT + 40):
        flux.scheduler.set_timesteps(12, sigmas=np.linspace(1.0, 1 / (12 + number / 10), 12), mu=0.5)
        levels = tuple(flux.scheduler.sigmas.tolist())
        plans.on(flux.scheduler, levels, 0)
    assert len(plans._known) == _KEPT
    dpcache.disable(flux)
