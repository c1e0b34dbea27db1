"""The ComfyUI integration on a stand-in of its interface (see comfyui_stand_in.py), around the trained small models."""

import importlib.util
import json
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

import dpcache
from dpcache.errors import CacheStateError, CalibrationError, ScheduleMismatchError
from dpcache.integrations.comfyui import apply, calibrate, identity, plan_and_apply
from dpcache.integrations.comfyui.voice import LOG
from dpcache.judge.metrics import psnr

from . import comfyui_stand_in as comfy

STEPS, KEYS = 20, 8
NODES = Path(__file__).parent.parent / "integrations" / "comfyui"
PROMPTS = ("a small red ring on a striped background, top left", "a large blue star on a white background, center")
HELD_OUT = "a small green cross on a dotted background, center"


class FluxNetwork(nn.Module):
    """tiny-flux's transformer as ComfyUI would call it, on unpacked latents."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.calls = 0

    def forward(self, x: Any, timestep: Any, context: Any, y: Any, control: Any, transformer_options: Any) -> Any:
        self.calls += 1
        batch, channels, height, width = x.shape
        output = self.transformer(
            hidden_states=FluxPipeline._pack_latents(x, batch, channels, height, width),
            timestep=timestep / 1000,
            encoder_hidden_states=context,
            pooled_projections=y,
            txt_ids=torch.zeros(context.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, height * 4, width * 4, 4)


class DiTNetwork(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Any, timestep: Any, context: Any, y: Any, control: Any, transformer_options: Any) -> Any:
        return self.transformer(x, timestep=timestep, class_labels=y[:, 0].long(), return_dict=False)[0]


class Studio:
    """A MODEL, its conditions and levels, and pictures drawn as KSampler does."""

    def __init__(self, pipe: Any, model: Any) -> None:
        self.pipe, self.model = pipe, comfy.ModelPatcher(model)
        self.network = model.diffusion_model

    def sigmas(self, steps: int = STEPS) -> torch.Tensor:
        return comfy.simple_scheduler(self.model.model.model_sampling, steps)

    def condition(self, prompt: str) -> Any:
        context, pooled, _ = self.pipe.encode_prompt(prompt, None, max_sequence_length=24)
        return comfy.condition(c_crossattn=context.detach(), y=pooled.detach())

    def draw(self, model: Any = None, prompt: Any = HELD_OUT, seed: int = 7, **more: Any) -> torch.Tensor:
        guider = comfy.CFGGuider(model if model is not None else self.model)
        positive = self.condition(prompt) if isinstance(prompt, str) else prompt
        guider.set_conds(positive, more.get("negative") or self.condition(""))
        guider.set_cfg(more.get("cfg", 2.0))
        noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        return guider.sample(
            noise if more.get("noise", True) else torch.zeros_like(noise),
            more.get("latent", torch.zeros(2, 8, 8, 8)),
            comfy.KSAMPLER(more.get("sampler", comfy.sample_euler)),
            more.get("sigmas", self.sigmas()),
            more.get("callback"),
        )

    def picture(self, latents: torch.Tensor) -> np.ndarray:
        config = self.pipe.vae.config
        with torch.no_grad():
            decoded = self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def studio() -> Studio:
    torch.set_num_threads(1)
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    config = {"image_model": "flux", "depth": 2, "dtype": torch.float32}
    sampling = comfy.ModelSamplingDiscreteFlow(shift=3.0)
    return Studio(pipe, comfy.BaseModel(FluxNetwork(pipe.transformer), sampling, config))


@pytest.fixture(scope="module")
def calibration_path(studio: Studio, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    calibrating = calibrate(studio.model, path, key_steps=KEYS)
    for seed, prompt in enumerate(PROMPTS):
        assert torch.equal(studio.draw(calibrating, prompt, seed), studio.draw(None, prompt, seed))
    return path


@pytest.fixture(scope="module")
def schedule(calibration_path: Path) -> dpcache.Schedule:
    return dpcache.Schedule.load(calibration_path.with_name(f"flux-{KEYS}.json"))


@pytest.fixture(scope="module")
def full(studio: Studio) -> torch.Tensor:
    return studio.draw()


@contextmanager
def told(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What is said in the log meanwhile."""
    said: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(level)
    try:
        yield said
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)


@contextmanager
def one_warning(text: str) -> Iterator[None]:
    with told() as said:
        yield
    assert [text in one for one in said] == [True], said


def plain(keys: Any, steps: int = STEPS, order: int = 2) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, steps, order=order, boundary="output")


def test_calibrated_planned_and_applied(studio: Studio, schedule: Any, full: Any, calibration_path: Path) -> None:
    calibration = dpcache.Calibration.load(calibration_path)
    assert (calibration.facts.num_inputs, calibration.facts.num_branches) == (2, 2)
    assert (calibration.facts.prediction, calibration.facts.scheduler) == ("flow_prediction", "euler")
    assert schedule.num_key_steps == KEYS and schedule.model == identity(studio.model)
    assert schedule.sigmas == tuple(studio.sigmas().tolist())
    assert calibration.plan(KEYS) == schedule

    studio.network.calls = 0
    found = studio.draw(apply(studio.model, schedule))
    assert studio.network.calls == KEYS
    even = studio.draw(apply(studio.model, dpcache.Schedule.uniform(KEYS, STEPS, boundary="output")))
    worth = [psnr(a, b) for a, b in zip(studio.picture(full), studio.picture(found), strict=True)]
    worth_of_even = [psnr(a, b) for a, b in zip(studio.picture(full), studio.picture(even), strict=True)]
    assert min(worth) > 40
    assert np.mean(worth) > np.mean(worth_of_even)


def test_every_step_a_key_step_gives_the_same_bits(studio: Studio, full: Any) -> None:
    applied = apply(studio.model, plain(range(STEPS)))
    assert torch.equal(studio.draw(applied), full)
    assert torch.equal(studio.draw(), full)
    assert not studio.model.wrappers and studio.model.model_options == {"transformer_options": {}}


def test_the_wrapper_of_another_node_is_still_called(studio: Studio, schedule: Any) -> None:
    calls: list[float] = []

    def another(apply_model: Any, given: dict[str, Any]) -> Any:
        calls.append(float(given["timestep"][0]))
        return apply_model(given["input"], given["timestep"], **given["c"])

    applied = apply(studio.model, schedule)
    expected = studio.draw(applied)
    applied.set_model_unet_function_wrapper(another)
    assert torch.equal(studio.draw(applied), expected)
    assert calls == studio.sigmas()[:-1].tolist()


def test_a_prediction_is_the_weighted_sum_of_what_was_cached(studio: Studio) -> None:
    schedule = plain((0, 1, 2, 6), steps=8)
    sigmas = studio.sigmas(8)
    seen: dict[int, torch.Tensor] = {}

    def watch(step: int, denoised: Any, x: Any, total: int) -> None:
        seen[step] = (x.double() - denoised.double()) / float(sigmas[step])

    studio.draw(apply(studio.model, schedule), sigmas=sigmas, cfg=1.0, callback=watch)
    for step, terms in schedule.predictions.items():
        expected = sum(term.coefficient * seen[term.key_step] for term in terms)
        assert torch.allclose(seen[step], expected, rtol=1e-4, atol=2e-5)


def test_batches_may_be_split_and_joined_from_call_to_call(studio: Studio, schedule: Any, full: Any) -> None:
    joined = studio.draw(apply(studio.model, schedule))
    applied = apply(studio.model, schedule)
    rooms = cycle([1e9, 0.0, 0.0])

    def change(*_: Any) -> None:
        applied.free_memory = next(rooms)

    studio.network.calls = 0
    changing = studio.draw(applied, callback=change)
    assert KEYS < studio.network.calls <= 2 * KEYS
    assert torch.allclose(joined, changing, atol=1e-4)
    assert not torch.allclose(joined, full, atol=1e-4)


@pytest.mark.parametrize("how", ["steps", "levels", "heun", "dpm_2"])
def test_what_is_not_covered_is_computed_in_full_with_one_warning(studio: Studio, schedule: Any, how: str) -> None:
    more: dict[str, Any] = {
        "steps": {"sigmas": studio.sigmas(12)},
        "levels": {"sigmas": comfy.karras_scheduler(studio.model.model.model_sampling, STEPS)},
        "heun": {"sampler": comfy.sample_heun, "sigmas": studio.sigmas(8)},
        "dpm_2": {"sampler": comfy.sample_dpm_2, "sigmas": studio.sigmas(8)},
    }[how]
    followed = plain((0, 3, 6), steps=8) if "sampler" in more else schedule
    expected = studio.draw(**more)
    with one_warning("computed in full"):
        assert torch.equal(studio.draw(apply(studio.model, followed), **more), expected)


def test_what_a_sampler_does_is_known_before_the_first_call(studio: Studio) -> None:
    """No sampler is known by its name; random numbers are as they were."""

    def sample_unheard_of(*args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return comfy.sample_heun(*args, **kwargs)

    said_at: list[int] = []
    studio.network.calls = 0
    torch.manual_seed(0)
    with one_warning("15 times in 8 steps"), told() as said:
        studio.draw(
            apply(studio.model, plain((0, 3, 6), steps=8)),
            sampler=sample_unheard_of,
            sigmas=studio.sigmas(8),
            callback=lambda *_: said_at.append(len(said)),
        )
    assert studio.network.calls == 2 * 8 - 1
    assert set(said_at) == {1}
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(2)[1] == after


def test_what_a_rehearsal_cannot_follow_is_computed_in_full(studio: Studio, schedule: Any) -> None:
    """A sampler that never ends without the model, one that raises, two steps at one level; and several GPUs."""

    def sample_when_it_moves(model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
        while not model(x, sigmas[:1].expand(len(x)), **extra_args).any():
            pass
        return comfy.sample_euler(model, x, sigmas, extra_args, callback)

    def sample_large(model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
        assert x.shape[-1] > 1, "no room"
        return comfy.sample_euler(model, x, sigmas, extra_args, callback)

    twice = torch.tensor([1.0, 0.7, 0.7, 0.4, 0.0])
    apart = apply(studio.model, schedule)
    apart.model_options["multigpu_clones"] = {}
    tried = {
        "did not end": (apply(studio.model, schedule), {"sampler": sample_when_it_moves}),
        "no room": (apply(studio.model, schedule), {"sampler": sample_large}),
        "at one noise level": (apply(studio.model, plain((0, 2), steps=4)), {"sigmas": twice}),
        "several GPUs": (apart, {}),
    }
    for text, (applied, more) in tried.items():
        with one_warning(text):
            assert torch.equal(studio.draw(applied, **more), studio.draw(**more))
    none_at_all = studio.sigmas()[-1:]
    assert torch.equal(studio.draw(apply(studio.model, schedule), sigmas=none_at_all), studio.draw(sigmas=none_at_all))


def test_a_sampler_may_move_its_levels_a_little(studio: Studio) -> None:
    """ComfyUI moves the first level of flow matching off 1 for samplers that take its logarithm."""
    sigmas, smooth = studio.sigmas(), dpcache.Schedule.smooth(KEYS, STEPS, boundary="output")
    for followed in (smooth, smooth.model_copy(update={"sigmas": tuple(sigmas.tolist())})):
        studio.network.calls = 0
        with told() as said:
            studio.draw(apply(studio.model, followed), sampler=comfy.sample_offset)
        assert (studio.network.calls, said) == (KEYS, [])


def test_a_sampler_may_look_at_what_guidance_got(studio: Studio) -> None:
    """As those of CFG++, which have ComfyUI call a function of theirs in every evaluation."""
    expected = studio.draw(sampler=comfy.sample_euler_cfg_pp)
    everything = apply(studio.model, plain(range(STEPS)))
    assert torch.equal(studio.draw(everything, sampler=comfy.sample_euler_cfg_pp), expected)
    studio.network.calls = 0
    studio.draw(
        apply(studio.model, dpcache.Schedule.smooth(KEYS, STEPS, boundary="output")), sampler=comfy.sample_euler_cfg_pp
    )
    assert studio.network.calls == KEYS


def test_every_run_says_what_it_computed(studio: Studio, schedule: Any) -> None:
    with told(logging.INFO) as said:
        studio.draw(apply(studio.model, schedule))
    assert said == [f"DPCache: {KEYS} of {STEPS} steps computed"]


@pytest.mark.parametrize("measured", [False, True])
def test_planned_for_the_levels_of_each_run(studio: Studio, calibration_path: Path, measured: bool) -> None:
    """Another number of steps, another shift, and less noise to begin with; all from one calibration, or from none."""
    calibration = dpcache.Calibration.load(calibration_path) if measured else None
    planned = plan_and_apply(studio.model, 5, calibration)
    shifted = studio.model.clone()
    shifted.add_object_patch("model_sampling", comfy.ModelSamplingDiscreteFlow(shift=2.0))
    grids = {
        "as calibrated": studio.sigmas(),
        "fewer steps": studio.sigmas(12),
        "another shift": comfy.simple_scheduler(shifted.get_model_object("model_sampling"), 14),
        "denoise 0.6": studio.sigmas(25)[-16:],
    }
    for name, sigmas in grids.items():
        studio.network.calls = 0
        with told() as said:
            found = studio.draw(planned, sigmas=sigmas)
        assert (studio.network.calls, said) == (5, []), name
        assert bool(found.isfinite().all())
    studio.network.calls = 0
    everything = plan_and_apply(studio.model, STEPS, calibration)
    assert torch.equal(studio.draw(everything), studio.draw())


def test_levels_beyond_the_calibration_are_computed_in_full(studio: Studio, calibration_path: Path) -> None:
    planned = plan_and_apply(studio.model, 5, dpcache.Calibration.load(calibration_path))
    rising = torch.tensor([0.5, 0.3, 0.6, 0.4, 0.3, 0.2, 0.0])
    with one_warning("computed in full"):
        assert torch.equal(studio.draw(planned, sigmas=rising), studio.draw(sigmas=rising))


class Window:
    """What ComfyUI puts into the options while it evaluates one context window."""

    def __init__(self, index_list: list[int]) -> None:
        self.index_list = index_list


def in_windows(tell: bool) -> Any:
    """The upper and the lower half of a picture, one after the other, as context windows take a clip apart."""

    def evaluate(executor: Any, x: Any, timestep: Any, model_options: Any, seed: Any) -> Any:
        guider, found = executor.class_obj, torch.zeros_like(x)
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
            window = {"context_window": Window(rows)} if tell else {}
            there = {**model_options["transformer_options"], **window}
            options = {**model_options, "transformer_options": there}
            found[:, :, rows] = guider.predict_noise(x[:, :, rows], timestep, options, seed)
        return found

    return evaluate


def test_context_windows_are_followed_each_by_itself(studio: Studio, schedule: Any) -> None:
    windowed = studio.model.clone()
    windowed.add_wrapper_with_key("predict_noise", "windows", in_windows(tell=True))
    expected = studio.draw(windowed)
    assert torch.equal(studio.draw(apply(windowed, plain(range(STEPS)))), expected)
    studio.network.calls = 0
    with told() as said:
        found = studio.draw(apply(windowed, schedule))
    assert (studio.network.calls, said) == (2 * KEYS, [])
    assert (found - expected).norm() / expected.norm() < 0.1


def test_windows_that_nothing_tells_apart_are_computed_in_full(studio: Studio, schedule: Any, tmp_path: Path) -> None:
    windowed = studio.model.clone()
    windowed.add_wrapper_with_key("predict_noise", "windows", in_windows(tell=False))
    with one_warning("several samples in one step"):
        assert torch.equal(studio.draw(apply(windowed, schedule)), studio.draw(windowed))
    with pytest.raises(CalibrationError, match="several samples"):
        studio.draw(calibrate(windowed, tmp_path / "c.safetensors"))


def test_another_cache_is_refused(studio: Studio, schedule: Any, tmp_path: Path) -> None:
    """Connected before or after; ComfyUI's own name themselves so."""

    def with_cache(model: Any) -> Any:
        clone = model.clone()
        clone.add_wrapper_with_key("diffusion_model", "easycache", lambda executor, *a, **k: executor(*a, **k))
        return clone

    for model in (
        with_cache(apply(studio.model, schedule)),
        apply(with_cache(studio.model), schedule),
        calibrate(with_cache(studio.model), tmp_path / "c.safetensors"),
    ):
        studio.network.calls = 0
        with pytest.raises(CacheStateError, match="easycache"):
            studio.draw(model)
        assert studio.network.calls == 0


def test_another_evaluation_of_the_same_sample_is_a_branch_of_its_own(studio: Studio, schedule: Any) -> None:
    """As guidance by perturbed attention does: the condition again, through the network in another way."""

    def again(executor: Any, x: Any, timestep: Any, model_options: Any, seed: Any) -> Any:
        guider = executor.class_obj
        denoised = executor(x, timestep, model_options, seed)
        (second,) = comfy.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, timestep, model_options)
        return denoised + 0.1 * (denoised - second)

    guided = studio.model.clone()
    guided.add_wrapper_with_key("predict_noise", "guidance", again)
    expected = studio.draw(guided)
    studio.network.calls = 0
    found = studio.draw(apply(guided, schedule))
    assert studio.network.calls == 2 * KEYS
    pairs = zip(studio.picture(expected), studio.picture(found), strict=True)
    assert min(psnr(a, b) for a, b in pairs) > 35


def test_a_condition_that_comes_later_begins_anew(studio: Studio, schedule: Any) -> None:
    late = studio.condition(PROMPTS[0])
    late[0]["timestep_start"] = 0.9
    both = studio.condition(HELD_OUT) + late
    start = next(step for step, level in enumerate(studio.sigmas()) if level <= 0.9)
    assert start not in schedule.key_steps
    studio.network.calls = 0
    with told() as said:
        found = studio.draw(apply(studio.model, schedule), both)
    assert not said
    # Conditions go through the network together, so a step is computed if one of them needs it.
    assert studio.network.calls == len({*schedule.key_steps, *(start + k for k in schedule.from_step(start).key_steps)})
    pairs = zip(studio.picture(studio.draw(prompt=both)), studio.picture(found), strict=True)
    assert min(psnr(a, b) for a, b in pairs) > 25


def test_parts_of_the_grid_follow_their_part_of_the_schedule(studio: Studio, schedule: Any, full: Any) -> None:
    """As the advanced sampler's start_at_step and end_at_step: two runs, one after another."""
    applied = apply(studio.model, schedule)
    sigmas = studio.sigmas()
    studio.network.calls = 0
    half = studio.draw(applied, sigmas=sigmas[:8])
    assert studio.network.calls == sum(key < 7 for key in schedule.key_steps)
    # The rest of the noise goes on in what the first run left.
    rest = half / (1 - sigmas[7])
    found = studio.draw(applied, sigmas=sigmas[7:], latent=rest, noise=False)
    left = schedule.from_step(7)
    assert studio.network.calls == sum(key < 7 for key in schedule.key_steps) + left.num_key_steps < STEPS
    pairs = zip(studio.picture(full), studio.picture(found), strict=True)
    assert min(psnr(a, b) for a, b in pairs) > 35


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_nothing(studio: Studio, schedule: Any) -> None:
    applied = apply(studio.model, schedule)
    expected = studio.draw(apply(studio.model, schedule))

    def interrupt(step: int, *_: Any) -> None:
        if step == schedule.key_steps[3] + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        studio.draw(applied, PROMPTS[0], seed=3, callback=interrupt)
    assert torch.equal(studio.draw(applied), expected)


def test_clones_never_see_each_others_values(studio: Studio, schedule: Any) -> None:
    one = apply(studio.model, schedule)
    other = one.clone()
    third = apply(studio.model, plain((0, 1, 2, 6, 12)))
    expected = [studio.draw(one), studio.draw(other, PROMPTS[0], seed=1), studio.draw(third, PROMPTS[1], seed=2)]
    inner: list[Any] = []

    def within(step: int, *_: Any) -> None:
        if step == 4:
            inner.append(studio.draw(other, PROMPTS[0], seed=1))
            inner.append(studio.draw(third, PROMPTS[1], seed=2))

    outer = studio.draw(one, callback=within)
    for found, wanted in zip([outer, *inner], expected, strict=True):
        assert torch.equal(found, wanted)


def test_wrong_schedules_and_models_are_refused(studio: Studio, schedule: Any, tmp_path: Path) -> None:
    with pytest.raises(ScheduleMismatchError, match="DPCache Calibrate"):
        apply(studio.model, dpcache.Schedule.from_key_steps((0, 1, 2), STEPS))
    other = comfy.BaseModel(studio.network, studio.model.model.model_sampling, {"image_model": "flux", "depth": 3})
    with pytest.raises(ScheduleMismatchError, match="made for BaseModel"):
        apply(comfy.ModelPatcher(other), schedule)
    applied = apply(studio.model, schedule)
    for again in (lambda: apply(applied, schedule), lambda: calibrate(applied, tmp_path / "c.safetensors")):
        with pytest.raises(CacheStateError, match="already"):
            again()


def test_calibration_refuses_what_it_cannot_measure(studio: Studio, calibration_path: Path, tmp_path: Path) -> None:
    """Before the first call of the model, not after the last."""
    path = tmp_path / "c.safetensors"
    studio.network.calls = 0
    for sampler in (comfy.sample_heun, comfy.sample_dpm_2):
        with pytest.raises(CalibrationError, match="euler"):
            studio.draw(calibrate(studio.model, path), sampler=sampler)
    with pytest.raises(CalibrationError, match="lower key_steps"):
        studio.draw(calibrate(studio.model, path, key_steps=STEPS + 1))
    with pytest.raises(CalibrationError, match="lower the order"):
        studio.draw(calibrate(studio.model, path, order=3), sigmas=studio.sigmas(3))
    path.write_bytes(calibration_path.read_bytes())
    with pytest.raises(CalibrationError, match=r"20 steps, this one has 12\. Give another name, or start over"):
        studio.draw(calibrate(studio.model, path), sigmas=studio.sigmas(12))
    with pytest.raises(CalibrationError, match="the sampler euler, this one is with offset"):
        studio.draw(calibrate(studio.model, path), sampler=comfy.sample_offset)
    with pytest.raises(CalibrationError, match="other noise levels"):
        karras = comfy.karras_scheduler(studio.model.model.model_sampling, STEPS)
        studio.draw(calibrate(studio.model, path), sigmas=karras)
    other = comfy.BaseModel(studio.network, studio.model.model.model_sampling, {"image_model": "flux", "depth": 3})
    with pytest.raises(CalibrationError, match="another model"):
        studio.draw(calibrate(comfy.ModelPatcher(other), path))
    assert studio.network.calls == 0
    assert path.read_bytes() == calibration_path.read_bytes()


def test_a_run_that_is_broken_is_not_added(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    broken = studio.model.clone()
    broken.add_wrapper_with_key(
        "apply_model", "broken", lambda executor, *args, **more: executor(*args, **more) * np.nan
    )
    studio.network.calls = 0
    with pytest.raises(CalibrationError, match="step 0 is NaN"):
        studio.draw(calibrate(broken, path))
    assert studio.network.calls == 1

    def interrupt(step: int, *_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        studio.draw(calibrate(studio.model, path), callback=interrupt)
    assert not path.exists()


class Prompts:
    """A node of a workflow whose prompts are queued one after another."""

    def __init__(self) -> None:
        self.number = 0
        self.shown: list[str] = []

    def prompt(self) -> int:
        return self.number

    def show(self, text: str) -> None:
        self.shown.append(text)


def runs_in(path: Path) -> int:
    return dpcache.Calibration.load(path).facts.num_inputs


def test_a_second_pass_of_the_same_prompt_is_left_alone(studio: Studio, tmp_path: Path) -> None:
    """As hires fix: fewer levels, which do not fit the file, after all of the first pass has been drawn."""
    path, node = tmp_path / "c.safetensors", Prompts()
    calibrating = calibrate(studio.model, path, key_steps=KEYS, node=node)
    for prompt in (1, 2):
        node.number = prompt
        first = studio.draw(calibrating)
        second = {"sigmas": studio.sigmas()[-8:], "latent": first}
        assert torch.equal(studio.draw(calibrating, **second), studio.draw(**second))
        assert runs_in(path) == prompt
        assert "a later run of this prompt is not measured" in node.shown[-1]
    node.number = 3
    with pytest.raises(CalibrationError, match="steps, this one has 7"):
        studio.draw(calibrating, sigmas=studio.sigmas()[-8:])


def test_warnings_come_once_per_prompt_and_in_the_node(studio: Studio, schedule: Any) -> None:
    node = Prompts()
    applied = apply(studio.model, schedule, node)
    for prompt in (1, 2):
        node.number, node.shown = prompt, []
        with one_warning("planned for 20 steps"):
            studio.draw(applied, sigmas=studio.sigmas(12))
            studio.draw(applied, sigmas=studio.sigmas(12))
        assert len(node.shown) == 1 and "planned for 20 steps" in node.shown[0]
        studio.draw(applied)
        assert node.shown[-1].endswith(f"{KEYS} of {STEPS} steps computed")


def test_nodes_of_one_name_add_to_one_file(studio: Studio, tmp_path: Path) -> None:
    """Whoever made them, whenever ComfyUI makes them anew; a file is started over once, and what it held is kept."""
    path = tmp_path / "c.safetensors"
    one, other = calibrate(studio.model, path), calibrate(studio.model, path)
    for number, calibrating in enumerate((one, other, one), start=1):
        studio.draw(calibrating, seed=number)
        assert runs_in(path) == number
    for number in (1, 2):
        studio.draw(calibrate(studio.model, path, append=False), sigmas=studio.sigmas(12), seed=number)
        assert runs_in(path) == number
    assert runs_in(tmp_path / "c.safetensors.old") == 3


def test_a_picture_is_not_lost_where_its_run_cannot_be_kept(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with told(logging.INFO) as said:
        drawn = studio.draw(calibrate(studio.model, tmp_path / "taken" / "c.safetensors"))
    assert torch.equal(drawn, studio.draw())
    assert "the run was not added to c.safetensors" in said[-1]


def test_a_model_is_told_by_what_it_predicts(studio: Studio, schedule: Any) -> None:
    """A node may have patched that: noise instead of flow, with the same network."""
    patched = studio.model.clone()
    patched.add_object_patch("model_sampling", comfy.ModelSamplingDiscrete(torch.linspace(0.99, 0.01, 1000)))
    assert identity(patched) != identity(studio.model)
    with pytest.raises(ScheduleMismatchError, match="prediction EPS"):
        apply(patched, schedule)


def test_a_model_that_predicts_noise(tmp_path: Path) -> None:
    pipe = dpcache.load_pipeline("tiny-dit", device="cpu")
    sampling = comfy.ModelSamplingDiscrete(pipe.scheduler.alphas_cumprod)
    studio = Studio(pipe, comfy.BaseModel(DiTNetwork(pipe.transformer), sampling, {"image_model": "dit"}))

    def draw(model: Any, label: int, seed: int) -> torch.Tensor:
        labels = [comfy.condition(y=torch.tensor([[float(number)]])) for number in (label, 1000)]
        return studio.draw(model, labels[0], seed, negative=labels[1])

    path = tmp_path / "dit.safetensors"
    calibrating = calibrate(studio.model, path, key_steps=KEYS)
    for seed, label in enumerate((3, 17)):
        draw(calibrating, label, seed)
    calibration = dpcache.Calibration.load(path)
    assert calibration.facts.prediction == "epsilon"
    assert calibration.on_grid(15).plan(6).num_key_steps == 6
    schedule = dpcache.Schedule.load(tmp_path / f"dit-{KEYS}.json")
    expected, found = draw(None, 9, 5), draw(apply(studio.model, schedule), 9, 5)
    error = (found - expected).norm() / expected.norm()
    even = draw(apply(studio.model, dpcache.Schedule.uniform(KEYS, STEPS, boundary="output")), 9, 5)
    assert error < 0.1
    assert error < (even - expected).norm() / expected.norm()


def test_other_weights_are_told(studio: Studio, schedule: Any, calibration_path: Path, tmp_path: Path) -> None:
    """A finetune of the same network: followed with a warning, but never measured into the same file."""
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    network = FluxNetwork(pipe.transformer)
    inner = comfy.BaseModel(network, studio.model.model.model_sampling, studio.model.model.model_config.unet_config)
    assert identity(comfy.ModelPatcher(inner)) == identity(studio.model) == schedule.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.001)
    finetune = comfy.ModelPatcher(inner)
    assert identity(finetune).config == identity(studio.model).config
    with one_warning("made with other weights"):
        studio.draw(apply(finetune, schedule))
    assert network.calls == KEYS
    path = tmp_path / "c.safetensors"
    path.write_bytes(calibration_path.read_bytes())
    with pytest.raises(CalibrationError, match="other weights"):
        studio.draw(calibrate(finetune, path))
    # What LoRA has been added to, ComfyUI keeps as it was before.
    name, parameter = next(iter(sorted(network.named_parameters())))
    lora, base = comfy.ModelPatcher(inner), identity(finetune)
    lora.backup = {f"diffusion_model.{name}": types.SimpleNamespace(weight=parameter.detach().clone())}
    with torch.no_grad():
        parameter.add_(1)
    assert identity(lora) == base != identity(finetune)


@pytest.fixture
def nodes(monkeypatch: Any, tmp_path: Path) -> Any:
    """Loaded as ComfyUI loads a folder of custom_nodes, with a folder of the user's from extra_model_paths.yaml."""
    paths = comfy.folder_paths(tmp_path / "models")
    paths.add_model_folder_path("dpcache", str(tmp_path / "elsewhere"))
    context = types.ModuleType("comfy_execution.utils")
    context.get_executing_context = lambda: types.SimpleNamespace(prompt_id="1")  # type: ignore[attr-defined]
    server = types.ModuleType("server")
    shown: list[tuple[str, str]] = []
    instance = types.SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    server.PromptServer = types.SimpleNamespace(instance=instance, shown=shown)  # type: ignore[attr-defined]
    for module in (paths, context, server):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_dpcache", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    assert loaded.NODE_CLASS_MAPPINGS.keys() == loaded.NODE_DISPLAY_NAME_MAPPINGS.keys()
    loaded.shown = shown
    return loaded


def test_nodes_in_their_folder(studio: Studio, nodes: Any, tmp_path: Path) -> None:
    """Run as the example workflows have them, which are as the frontend saves them."""

    def run(workflow: str) -> Any:
        saved = json.loads((NODES / "example_workflows" / f"{workflow}.json").read_text())["nodes"]
        (ours,) = [node for node in saved if node["type"] in nodes.NODE_CLASS_MAPPINGS]
        kind = nodes.NODE_CLASS_MAPPINGS[ours["type"]]
        names = [given["name"] for given in ours["inputs"] if "widget" in given]
        given = dict(zip(names, ours["widgets_values"], strict=True))
        required = kind.INPUT_TYPES()["required"]
        assert ["model", *given] == list(required)
        for name, (choices, *_) in required.items():
            assert not isinstance(choices, list) or given[name] in choices
        assert getattr(kind, "VALIDATE_INPUTS", lambda **_: True)(
            **{name: given[name] for name in ("name", "file") if name in given}
        )
        return getattr(kind(), kind.FUNCTION)(model=studio.model, unique_id="7", **given)[0]

    def calls(model: Any) -> int:
        studio.network.calls = 0
        studio.draw(model)
        return studio.network.calls

    sigmas = studio.sigmas(50)
    studio.draw(run("calibrate"), PROMPTS[0], sigmas=sigmas)
    assert {path.suffix for path in (tmp_path / "elsewhere").iterdir()} >= {".json", ".safetensors"}
    assert nodes.shown[-1][0] == "7" and "holds 1 run" in nodes.shown[-1][1]
    for workflow in ("apply", "key_steps"):
        studio.network.calls = 0
        studio.draw(run(workflow), sigmas=sigmas)
        assert studio.network.calls == 13
        assert nodes.shown[-1] == ("7", "13 of 50 steps computed")
    key_steps = nodes.NODE_CLASS_MAPPINGS["DPCacheKeySteps"]
    assert "flux-50-simple.safetensors" in key_steps.INPUT_TYPES()["required"]["calibration"][0]
    (planned,) = key_steps().apply(studio.model, 6, "flux-50-simple.safetensors")
    assert calls(planned) == 6
    assert key_steps.IS_CHANGED(calibration="flux-50-simple.safetensors", key_steps=6) > 0


def test_the_calibrating_node_checks_what_it_is_given(studio: Studio, nodes: Any, monkeypatch: Any) -> None:
    calibrating = nodes.NODE_CLASS_MAPPINGS["DPCacheCalibrate"]
    assert calibrating.VALIDATE_INPUTS("flux", "begin anew") is True  # as workflows of earlier releases say
    assert "begin anew" not in calibrating.INPUT_TYPES()["required"]["file"][0]
    assert "start over" in calibrating.VALIDATE_INPUTS("flux", "whatever")
    with pytest.raises(ValueError, match="without folders"):
        calibrating().calibrate(studio.model, "../elsewhere", 13, 2, "begin anew")
    monkeypatch.setitem(sys.modules, "dpcache", None)
    monkeypatch.delitem(sys.modules, "dpcache.integrations.comfyui")
    with pytest.raises(RuntimeError, match="not installed"):
        calibrating().calibrate(studio.model, "c", 13, -1, "start over")
