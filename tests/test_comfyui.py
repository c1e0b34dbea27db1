"""The ComfyUI integration on a stand-in of its interface (see comfyui_stand_in.py), around the trained small models."""

import importlib.util
import json
import sys
import warnings
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
from dpcache.integrations.comfyui import apply, calibrate, identity
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
def one_warning(text: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [text in str(warning.message) for warning in caught] == [True]


def plain(keys: Any, steps: int = STEPS, order: int = 2) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, steps, order=order, boundary="output")


def test_calibrated_planned_and_applied(studio: Studio, schedule: Any, full: Any, calibration_path: Path) -> None:
    calibration = dpcache.Calibration.load(calibration_path)
    assert (calibration.facts.num_inputs, calibration.facts.num_branches) == (2, 2)
    assert (calibration.facts.prediction, calibration.facts.scheduler) == ("flow_prediction", "euler")
    assert schedule.num_key_steps == KEYS and schedule.model == identity(studio.model)
    assert schedule.sigmas == tuple(studio.sigmas().tolist())
    assert calibration.plan(KEYS, recipe=dpcache.Recipe(order=2)) == schedule

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


def test_an_unknown_sampler_of_two_evaluations_is_noticed(studio: Studio) -> None:
    def sample_unheard_of(*args: Any, **kwargs: Any) -> Any:
        return comfy.sample_heun(*args, **kwargs)

    studio.network.calls = 0
    with one_warning("twice"):
        studio.draw(apply(studio.model, plain((0, 3, 6), steps=8)), sampler=sample_unheard_of, sigmas=studio.sigmas(8))
    # The call before it gave itself away, the second at the second noise level, is all that was predicted.
    assert studio.network.calls == 2 * 8 - 1 - 1


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = studio.draw(apply(studio.model, schedule), both)
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
    path = tmp_path / "c.safetensors"
    for sampler in (comfy.sample_heun, comfy.sample_dpm_2):
        with pytest.raises(CalibrationError, match="euler"):
            studio.draw(calibrate(studio.model, path), sampler=sampler)
    broken = studio.model.clone()
    broken.add_wrapper_with_key(
        "apply_model", "broken", lambda executor, *args, **more: executor(*args, **more) * np.nan
    )
    with pytest.raises(CalibrationError, match="step 0 is NaN"):
        studio.draw(calibrate(broken, path))

    def interrupt(step: int, *_: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        studio.draw(calibrate(studio.model, path), callback=interrupt)
    assert not path.exists()
    path.write_bytes(calibration_path.read_bytes())
    with pytest.raises(CalibrationError, match="another name"):
        studio.draw(calibrate(studio.model, path), sigmas=studio.sigmas(12))
    studio.draw(calibrate(studio.model, path))
    assert dpcache.Calibration.load(path).facts.num_inputs == 3
    studio.draw(calibrate(studio.model, path, append=False), sigmas=studio.sigmas(12))
    assert dpcache.Calibration.load(path).facts.num_inference_steps == 12


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


def test_nodes_in_their_folder(studio: Studio, monkeypatch: Any, tmp_path: Path) -> None:
    """Loaded as ComfyUI loads a folder of custom_nodes, run in the order of the example workflows."""
    monkeypatch.setitem(sys.modules, "folder_paths", comfy.folder_paths(tmp_path))
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_dpcache", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()

    def run(workflow: str) -> Any:
        nodes = json.loads((NODES / "example_workflows" / workflow).read_text()).values()
        (ours,) = [node for node in nodes if node["class_type"] in module.NODE_CLASS_MAPPINGS]
        kind = module.NODE_CLASS_MAPPINGS[ours["class_type"]]
        required = kind.INPUT_TYPES()["required"]
        assert ours["inputs"].keys() == required.keys()
        for name, (choices, *_) in required.items():
            assert not isinstance(choices, list) or ours["inputs"][name] in choices
        return getattr(kind(), kind.FUNCTION)(**{**ours["inputs"], "model": studio.model})[0]

    studio.draw(run("calibrate.json"), PROMPTS[0])
    studio.network.calls = 0
    studio.draw(run("apply.json"))
    assert studio.network.calls == 13
    calibrate_node = module.NODE_CLASS_MAPPINGS["DPCacheCalibrate"]()
    with pytest.raises(ValueError, match="without folders"):
        calibrate_node.calibrate(studio.model, "../elsewhere", 13, 2, "begin anew")
    monkeypatch.setitem(sys.modules, "dpcache", None)
    monkeypatch.delitem(sys.modules, "dpcache.integrations.comfyui")
    with pytest.raises(RuntimeError, match="not installed"):
        calibrate_node.calibrate(studio.model, "c", 13, 2, "begin anew")
