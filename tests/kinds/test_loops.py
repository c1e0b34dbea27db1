"""Loops of every shape: other noise levels, loops nobody can see, gradients, conditions that change."""

import copy
import itertools
import threading
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import dpcache
from tests.conftest import PROMPT, STEPS, draw
from tests.kinds.conftest import KEYS, OTHER, twin_of

# -------------------------------------------------------------------------------------------------- other noise levels

LEVELS: dict[str, Any] = {
    "shift": lambda pipe: (_with(pipe, shift=0.5), {}),
    "Karras": lambda pipe: (_with(pipe, use_karras_sigmas=True), {}),
    "beta": lambda pipe: (_with(pipe, use_beta_sigmas=True), {}),
    "own sigmas": lambda pipe: (None, {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS) ** 2}),
}


def _with(pipe: Any, **change: Any) -> None:
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **change)


@pytest.fixture(scope="module")
def calibration(loaded_flux: Any) -> dpcache.Calibration:
    return dpcache.calibrate(
        loaded_flux, [PROMPT, OTHER], num_inference_steps=STEPS, max_sequence_length=24, progress=False
    )


@pytest.mark.parametrize("name", list(LEVELS))
def test_other_levels_are_told_or_planned_for(flux: Any, calibration: dpcache.Calibration, name: str) -> None:
    planned, original = calibration.plan(5), flux.scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with dpcache.enabled(flux, planned):
            draw(flux)
    _, more = LEVELS[name](flux)
    try:
        with dpcache.enabled(flux, planned):
            with pytest.warns(UserWarning, match="planned for noise levels") as told:
                draw(flux, **more)
                draw(flux, seed=1, **more)
            assert len(told) == 1
            assert dpcache.stats(flux).computed_steps == planned.key_steps
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with dpcache.enabled(flux, calibration, num_key_steps=5):
                draw(flux, **more)
                assert len(dpcache.stats(flux).computed_steps) == 5
    finally:
        flux.scheduler = original


def test_levels_beyond_a_calibration_are_computed_in_full(flux: Any) -> None:
    late = np.linspace(0.6, 0.05, 8).tolist()
    calibration = dpcache.calibrate(
        flux, [PROMPT], num_inference_steps=8, sigmas=late, max_sequence_length=24, progress=False
    )
    full = draw(flux)
    with dpcache.enabled(flux, calibration, num_key_steps=3):
        with pytest.warns(UserWarning, match="every step is computed in full.*Calibrate") as told:
            assert np.array_equal(draw(flux), full)
            draw(flux)
        assert len(told) == 1
        draw(flux, num_inference_steps=8, sigmas=late)
        assert len(dpcache.stats(flux).computed_steps) == 3


# ------------------------------------------------------------------------------------- loops of pipelines of one's own


class Own(diffusers.FluxPipeline):
    """A FLUX with its loop written out; subclasses change the loop."""

    def __call__(self, prompt: str, steps: int = STEPS, generator: Any = None, **_: Any) -> torch.Tensor:
        embeds, pooled, text_ids = self.encode_prompt(prompt, None, max_sequence_length=24)
        self.scheduler.set_timesteps(sigmas=self.levels(steps), mu=0.5)
        latents, ids = self.prepare_latents(1, 8, 32, 32, embeds.dtype, torch.device("cpu"), generator)
        given = {"pooled_projections": pooled, "encoder_hidden_states": embeds, "txt_ids": text_ids, "img_ids": ids}

        def model(latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.transformer(latents, timestep=level.reshape(1), return_dict=False, **given)[0]

        return self.loop(latents, model)

    @staticmethod
    def levels(steps: int) -> list[float]:
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(model(latents, t / 1000), t, latents, return_dict=False)[0]
        return latents


class CopiesItsScheduler(Own):
    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        scheduler = copy.deepcopy(self.scheduler)
        for t in scheduler.timesteps:
            latents = scheduler.step(model(latents, t / 1000), t, latents, return_dict=False)[0]
        return latents


class ReplacesItsScheduler(Own):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept, self.scheduler = self.scheduler, copy.deepcopy(self.scheduler)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.scheduler = kept


class MakesItsScheduler(Own):
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept, self.scheduler = self.scheduler, type(self.scheduler).from_config(self.scheduler.config)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.scheduler = kept


class LeavesTheLastStep(Own):
    @staticmethod
    def levels(steps: int) -> list[float]:
        return np.linspace(1.0, 1 / (steps + 1), steps + 1).tolist()

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        for t in self.scheduler.timesteps[:-1]:
            latents = self.scheduler.step(model(latents, t / 1000), t, latents, return_dict=False)[0]
        return latents


class StepsTwice(Own):
    """As Cosmos 1: the scheduler steps twice from one place."""

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        for t in self.scheduler.timesteps:
            velocity = model(latents, t / 1000)
            self.scheduler.step(velocity, t, latents)
            self.scheduler._step_index -= 1
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents


class SetsTimestepsAgain(Own):
    """As WanAnimate, after the loop."""

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        latents = super().loop(latents, model)
        self.scheduler.set_timesteps(sigmas=self.levels(STEPS), mu=0.5)
        return latents


class ASecondScheduler(Own):
    """As LTX-2, for sound next to pictures."""

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        other = copy.deepcopy(self.scheduler)
        sound = torch.zeros(1, 3)
        for t in self.scheduler.timesteps:
            velocity = model(latents, t / 1000)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            sound = other.step(sound, t, sound, return_dict=False)[0]
        return latents


SEEN = [
    Own,
    CopiesItsScheduler,
    ReplacesItsScheduler,
    MakesItsScheduler,
    LeavesTheLastStep,
    StepsTwice,
    SetsTimestepsAgain,
    ASecondScheduler,
]


class TwoLoops(Own):
    """As VisualCloze."""

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        first = super().loop(latents, model)
        self.scheduler.set_timesteps(sigmas=self.levels(STEPS), mu=0.5)
        return super().loop(0.1 * first + latents, model)


class OwnEuler(Own):
    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        levels = self.scheduler.sigmas
        for level, after in itertools.pairwise(levels):
            latents = latents + (after - level) * model(latents, level)
        return latents


class InAnotherThread(Own):
    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(Own.loop(self, latents, model)))
        thread.start()
        thread.join()
        return found[0]


class AfterItsSteps(Own):
    """An editing loop that goes on calling the model when its steps are taken."""

    def loop(self, latents: torch.Tensor, model: Any) -> torch.Tensor:
        latents = super().loop(latents, model)
        for level in (0.3, 0.2, 0.1):
            latents = latents + 0.01 * model(latents, torch.tensor(level))
        return latents


def own(flux: Any, kind: Any) -> Any:
    return twin_of(flux, own_scheduler=True, kind=kind)


def go(pipe: Any) -> torch.Tensor:
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SEEN)
def test_loops_that_are_followed(flux: Any, kind: Any) -> None:
    pipe = own(flux, kind)
    full = go(pipe)
    runs = dpcache.Schedule.from_key_steps((0, 1, 2, 5, 8), STEPS, boundary="output")
    every = dpcache.Schedule.from_key_steps(range(STEPS), STEPS)
    calibration = dpcache.calibrate(
        pipe, [PROMPT], num_inference_steps=STEPS, boundary="output", progress=False, max_sequence_length=24
    )
    assert calibration.facts.num_inference_steps == STEPS and len(calibration.gram) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for schedule in (calibration.plan(5), *([runs] if kind is not LeavesTheLastStep else [])):
            with dpcache.enabled(pipe, schedule):
                cached = go(pipe)
                assert dpcache.stats(pipe).computed_steps == schedule.key_steps
                assert dpcache.stats(pipe).generations == 1
                assert dpcache.stats(pipe).cached_values == 0
                assert torch.equal(go(pipe), cached) and not torch.equal(cached, full)
        if kind is not LeavesTheLastStep:
            with dpcache.enabled(pipe, every):
                assert torch.equal(go(pipe), full)
    assert torch.equal(go(pipe), full)
    assert all("step" not in vars(scheduler) for scheduler in (pipe.scheduler, flux.scheduler))


def test_two_loops_in_one_call_are_two_generations(flux: Any) -> None:
    pipe = own(flux, TwoLoops)
    with dpcache.enabled(pipe, KEYS):
        go(pipe)
        stats = dpcache.stats(pipe)
    assert stats.generations == 2
    assert stats.full_calls == 2 * len(KEYS.key_steps)
    calibration = dpcache.calibrate(pipe, [PROMPT], num_inference_steps=STEPS, progress=False)
    assert calibration.facts.num_inference_steps == STEPS


UNSEEN = {
    OwnEuler: "never took a step",
    InAnotherThread: "without calling its denoiser where dpcache could see it",
    AfterItsSteps: "3 times outside of its scheduler's steps",
}


@pytest.mark.parametrize("kind", list(UNSEEN))
def test_loops_that_are_not_seen_say_so_once(flux: Any, kind: Any) -> None:
    pipe = own(flux, kind)
    full = go(pipe)
    with dpcache.enabled(pipe, KEYS):
        with pytest.warns(UserWarning, match=UNSEEN[kind] + ".*dpcache.following") as told:
            picture = go(pipe)
            go(pipe)
        assert len(told) == 1
        assert dpcache.stats(pipe).cached_values == 0
    assert torch.equal(picture, full) == (kind is not AfterItsSteps)


def test_a_bare_loop_under_an_enabled_pipeline_says_so_once(flux: Any) -> None:
    pipe = own(flux, Own)
    model = None

    class Taking(Own):
        def loop(self, latents: torch.Tensor, inner: Any) -> torch.Tensor:
            nonlocal model
            model = inner
            return latents

    latents = go(own(flux, Taking))
    assert model is not None
    with dpcache.enabled(pipe, KEYS):
        with pytest.warns(UserWarning, match="outside of a call of the pipeline") as told:
            for level in np.linspace(1, 0.1, 8):
                latents = latents - 0.1 * model(latents, torch.tensor(level, dtype=torch.float32))
        assert len(told) == 1
        assert dpcache.stats(pipe).generations == 0


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_gradients_are_those_of_what_was_computed(boundary: str) -> None:
    """Against a difference quotient of the same cached loop; the scheduler computes in float32."""
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu").to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    schedule = dpcache.Schedule.from_key_steps((0, 1, 4), 7, boundary=boundary)
    start = torch.randn(1, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(1, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    embeds, pooled, _ = (part.double() for part in pipe.encode_prompt(PROMPT, None, max_sequence_length=24))
    inner = type(pipe).__call__.__wrapped__  # without torch.no_grad

    class WithGradients(type(pipe)):
        __call__ = inner

    pipe.__class__ = WithGradients
    weight = pipe.transformer.single_transformer_blocks[0].attn.to_q.weight
    change = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def outcome(latents: torch.Tensor) -> torch.Tensor:
        found = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            latents=latents,
            num_inference_steps=7,
            output_type="latent",
            return_dict=False,
        )[0]
        return found.square().sum()

    for parameter in pipe.transformer.parameters():
        parameter.requires_grad_(parameter is weight)
    with dpcache.enabled(pipe, schedule):
        latents = start.clone().requires_grad_()
        outcome(latents).backward()
        assert dpcache.stats(pipe).computed_steps == schedule.key_steps
        assert dpcache.stats(pipe).cached_values == 0
        with torch.no_grad():
            near = 1e-3
            quotient = (outcome(start + near * direction) - outcome(start - near * direction)) / (2 * near)
            weight += near * change
            above = outcome(start)
            weight -= 2 * near * change
            below = outcome(start)
            weight += near * change
    assert float((latents.grad * direction).sum()) == pytest.approx(float(quotient), rel=5e-3)
    assert float((weight.grad * change).sum()) == pytest.approx(float(above - below) / (2 * near), rel=5e-3)


# ---------------------------------------------------------------------------------------------- conditions that change


@pytest.mark.parametrize("how", ["replaced", "in place"])
@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_a_callback_that_replaces_the_prompt(flux: Any, boundary: str, how: str) -> None:
    """From there on it begins anew: nothing of the old prompt predicts the new one."""
    embeds, pooled, _ = flux.encode_prompt(OTHER, None, max_sequence_length=24)
    schedule = dpcache.Schedule.from_key_steps((0, 1, 2, 5), STEPS, boundary=boundary)

    def swap(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 6:
            if how == "replaced":
                return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            given["prompt_embeds"].copy_(embeds)
        return {}

    settings = {
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with dpcache.enabled(flux, schedule):
        draw(flux, **settings)
        assert dpcache.stats(flux).computed_steps == (0, 1, 2, 5, 7, 8, 9)
        draw(flux)
        assert dpcache.stats(flux).computed_steps == schedule.key_steps


def test_a_callback_that_changes_the_latents_alone_changes_no_step(flux: Any) -> None:
    def change(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] * 0.99}

    with dpcache.enabled(flux, KEYS):
        draw(flux, callback_on_step_end=change)
        assert dpcache.stats(flux).computed_steps == KEYS.key_steps
