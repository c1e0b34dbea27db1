"""The ways people call a pipeline: schedulers, loops that begin late, batches, sizes, threads, guidance."""

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dpcache
from dpcache.measure.recording import record
from dpcache.zoo import shapes
from tests.conftest import PROMPT, draw
from tests.conftest import STEPS as FLUX_STEPS
from tests.pipelines.every import SMALL
from tests.pipelines.small import STEPS, assemble

LATENTS = {"output_type": "latent", "return_dict": False}


def call(pipe: Any, arguments: dict[str, Any], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # DiTPipeline leaves a scheduler's own noise to the global generator
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(seed), **{**LATENTS, **arguments})[0])


class Runs:
    """Counts, by a plain torch hook, how often a layer runs."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.count = 0
        self.handle = layer.register_forward_pre_hook(self._ran)

    def _ran(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


# ---------------------------------------------------------------------------------------------------- schedulers

NOISE_SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "DEIS": diffusers.DEISMultistepScheduler,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler,
    "DPM++ 2M SDE Karras": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    ),
    "DPM++ 2S": diffusers.DPMSolverSinglestepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "KDPM2": diffusers.KDPM2DiscreteScheduler,
    "LCM": diffusers.LCMScheduler,
    "LMS": diffusers.LMSDiscreteScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "TCD": diffusers.TCDScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("name", list(NOISE_SCHEDULERS))
@pytest.mark.parametrize("small", ["DiTPipeline", "StableDiffusionPipeline"])
def test_schedulers(small: str, name: str) -> None:
    """Whatever the scheduler calls a step, and however many calls it makes of one: every one of them is counted."""
    pipe, arguments = SMALL[small].build()
    pipe.scheduler = NOISE_SCHEDULERS[name]()
    boundary = "blocks" if small == "DiTPipeline" else "output"
    layer = pipe.transformer.transformer_blocks[0].attn1 if small == "DiTPipeline" else pipe.unet.conv_in
    arguments = {**arguments, "num_inference_steps": STEPS}
    if name == "DDIM" and small == "StableDiffusionPipeline":
        arguments["eta"] = 0.7
    plain = call(pipe, arguments)
    taken = len(pipe.scheduler.timesteps)  # Heun, KDPM2: two calls a step; PNDM: one more
    assert taken >= STEPS

    calibration = dpcache.calibrate(
        pipe, [arguments], num_inference_steps=STEPS, boundary=boundary, order=1, progress=False
    )
    assert calibration.facts.num_inference_steps == taken
    assert calibration.facts.timesteps == tuple(float(t) for t in pipe.scheduler.timesteps)
    assert len(calibration.gram) == 1
    assert bool(np.isfinite(calibration.influence).all())

    every = dpcache.Schedule.from_key_steps(range(taken), taken, boundary=boundary)
    with dpcache.enabled(pipe, every):
        assert torch.equal(call(pipe, arguments), plain)
    planned = calibration.plan(5, recipe=dpcache.Recipe(first_key_steps=2))
    with dpcache.enabled(pipe, planned), Runs(layer) as runs:
        cached = call(pipe, arguments)
        assert runs.count == 5
        assert dpcache.stats(pipe).computed_steps == planned.key_steps
        assert torch.equal(call(pipe, arguments), cached)
    assert bool(cached.isfinite().all())
    assert not torch.equal(cached, plain)
    assert torch.equal(call(pipe, arguments), plain)


FLOW_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "Euler": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config),
    "Euler Karras": lambda config: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config, use_karras_sigmas=True
    ),
    "UniPC": lambda _: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    ),
    "DPM++ 2M": lambda _: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    ),
}


@pytest.mark.parametrize("boundary", ["blocks", "output"])
@pytest.mark.parametrize("name", list(FLOW_SCHEDULERS))
def test_schedulers_on_a_trained_model(flux: Any, name: str, boundary: Any) -> None:
    pipe = diffusers.FluxPipeline(**{**flux.components, "scheduler": FLOW_SCHEDULERS[name](flux.scheduler.config)})
    pipe.default_sample_size = flux.default_sample_size
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 20, "max_sequence_length": 24}
    calibration = dpcache.calibrate(pipe, [PROMPT], boundary=boundary, progress=False, **settings)
    planned = dpcache.compare(
        pipe, calibration.plan(8), ["a large blue heart on a black background, right"], progress=False, **settings
    )
    assert planned.cached_block_runs == planned.full_block_runs * 8 / 20
    assert planned.samples[0].psnr > 30


@pytest.mark.parametrize("given", ["sigmas", "timesteps"])
def test_a_grid_of_ones_own(given: str) -> None:
    """Custom sigmas (FLUX) or timesteps (Stable Diffusion): the loop has as many steps as they say."""
    small = {"sigmas": "FluxPipeline", "timesteps": "StableDiffusionPipeline"}[given]
    pipe, arguments = SMALL[small].build()
    boundary = "blocks" if given == "sigmas" else "output"
    if given == "timesteps":
        pipe.scheduler = diffusers.EulerDiscreteScheduler()
    grid = {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.2, 0.1], "timesteps": [999, 800, 700, 500, 200, 100]}[given]
    arguments = {**arguments, given: grid, "num_inference_steps": len(grid)}
    calibration = dpcache.calibrate(pipe, [arguments], boundary=boundary, order=1, progress=False)
    assert len(calibration.facts.timesteps) == 6
    planned = calibration.plan(4, recipe=dpcache.Recipe(first_key_steps=2))
    with dpcache.enabled(pipe, planned):
        call(pipe, arguments)
        assert dpcache.stats(pipe).computed_steps == planned.key_steps


# ---------------------------------------------------------------------------------- loops that begin at a later step


def picture(caption: str = PROMPT) -> Image.Image:
    return Image.fromarray(shapes.render([shapes.parse(caption)], seed=3)[0])


SIZE = {"height": 32, "width": 32}


def flux_call(kind: str, flux: Any) -> tuple[Any, dict[str, Any]]:
    """tiny-flux as a pipeline that begins with a picture."""
    pipe = getattr(diffusers, kind)(**flux.components)
    pipe.set_progress_bar_config(disable=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    arguments = {
        "prompt": PROMPT,
        "image": picture(),
        "num_inference_steps": FLUX_STEPS,
        "max_sequence_length": 24,
        "output_type": "np",
        **SIZE,
    }
    if kind == "FluxInpaintPipeline":
        arguments["mask_image"] = Image.fromarray(mask)
    if kind == "FluxKontextPipeline":
        arguments |= {"_auto_resize": False, "max_area": 32 * 32}
    else:
        arguments["strength"] = 0.75
    return pipe, arguments


@pytest.mark.parametrize("boundary", ["blocks", "output"])
@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"])
def test_pipelines_that_begin_with_a_picture(flux: Any, kind: str, boundary: Any) -> None:
    pipe, arguments = flux_call(kind, flux)
    plain = call(pipe, arguments)
    start = 3 if "strength" in arguments else 0
    full_loop = dpcache.Schedule.from_key_steps((0, 1, 4, 5, 8), FLUX_STEPS, order=1, boundary=boundary)
    left = full_loop.from_step(start)
    with dpcache.enabled(pipe, full_loop), Runs(flux.transformer.single_transformer_blocks[0].attn) as runs:
        cached = call(pipe, arguments)
        assert runs.count == left.num_key_steps
        assert dpcache.stats(pipe).computed_steps == left.key_steps
        assert torch.equal(call(pipe, arguments), cached)
    error = (cached - plain).square().mean()
    assert 0 < error < 0.01

    # Calibrated as it is called: the schedule is of the steps that the loop takes.
    calibration = dpcache.calibrate(
        pipe, [arguments], num_inference_steps=FLUX_STEPS, boundary=boundary, progress=False
    )
    assert calibration.facts.num_inference_steps == FLUX_STEPS - start
    planned = calibration.plan(6)
    with dpcache.enabled(pipe, planned):
        assert (call(pipe, arguments) - plain).square().mean() < error
        assert dpcache.stats(pipe).computed_steps == planned.key_steps
    assert torch.equal(call(pipe, arguments), plain)


@pytest.mark.parametrize("scheduler", ["DDIM", "Euler", "DPM++ 2M", "Heun", "PNDM", "LCM"])
def test_a_strength_with_every_kind_of_step_count(scheduler: str) -> None:
    """Some schedulers are told where the loop begins, some find it themselves, DDIM and PNDM never know."""
    pipe, arguments = SMALL["StableDiffusionPipeline"].build()
    vae = SMALL["DiTPipeline"].build()[0].vae
    late = assemble(
        "StableDiffusionImg2ImgPipeline",
        pipe.unet,
        NOISE_SCHEDULERS[scheduler](),
        vae=vae,
        requires_safety_checker=False,
    )
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    rest = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    arguments = {**rest, "image": image, "num_inference_steps": 10, "strength": 0.6}
    plain = call(late, arguments)
    run = record(late, {**LATENTS, **arguments, "generator": torch.Generator().manual_seed(0)}, boundary="output")
    size, start = len(late.scheduler.timesteps), len(late.scheduler.timesteps) - run.num_steps
    assert 0 < start < size
    assert run.timesteps == tuple(float(t) for t in late.scheduler.timesteps[start:])
    schedule = dpcache.Schedule.from_key_steps((0, 1, start + 3), size, order=1, boundary="output")
    with dpcache.enabled(late, schedule), Runs(late.unet.conv_in) as runs:
        cached = call(late, arguments)
        assert dpcache.stats(late).computed_steps == (0, 1, 3)
        assert runs.count == 3
    assert not torch.equal(cached, plain)
    every = dpcache.Schedule.from_key_steps(range(size), size, boundary="output")
    with dpcache.enabled(late, every):
        assert torch.equal(call(late, arguments), plain)


def test_what_is_left_of_a_schedule_is_a_schedule() -> None:
    whole = dpcache.Schedule.from_key_steps((0, 1, 2, 7, 12, 20), 30, order=2)
    assert whole.from_step(0) is whole
    for start in range(1, 30):
        left = whole.from_step(start)
        assert dpcache.Schedule.model_validate(left.model_dump()) == left
        assert left.num_inference_steps == 30 - start
        expected = {*range(start, min(start + 3, 30)), *(key for key in whole.key_steps if key >= start)}
        assert {key + start for key in left.key_steps} == expected
        for step, terms in whole.predictions.items():
            if step - start in left.predictions and all(term.key_step >= start for term in terms):
                kept = [(term.key_step + start, term.coefficient) for term in left.predictions[step - start]]
                assert kept == [(term.key_step, term.coefficient) for term in terms]
        assert all(sum(term.coefficient for term in terms) == pytest.approx(1) for terms in left.predictions.values())


# -------------------------------------------------------------------------------------------- batches, sizes, threads


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_batches_and_sizes(flux: Any, boundary: Any) -> None:
    """Each picture of a batch is what it is alone; another size and a last short batch need nothing new."""
    schedule = dpcache.Schedule.from_key_steps((0, 1, 2, 5, 8), FLUX_STEPS, boundary=boundary)
    prompts = [PROMPT, "a large blue circle on a white background, left", "a medium green star on a black background"]

    def together(prompts: list[str], **more: Any) -> np.ndarray:
        count = len(prompts) * more.get("num_images_per_prompt", 1)
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        settings = {"num_inference_steps": FLUX_STEPS, "max_sequence_length": 24, "output_type": "np", **more}
        return flux(prompts, generator=generators, **settings).images

    with dpcache.enabled(flux, schedule):
        alone = [draw(flux, prompt, seed) for seed, prompt in enumerate(prompts)]
        batch = together(prompts)
        assert np.abs(batch - np.concatenate(alone)).max() < 1e-3
        assert np.abs(together(prompts[:2]) - batch[:2]).max() < 1e-3
        several = together(prompts[:2], num_images_per_prompt=2)
        assert np.abs(several[0] - batch[0]).max() < 1e-3
        assert len(several) == 4
        large = together(prompts[:1], height=48, width=64)
        assert large.shape == (1, 48, 64, 3)
        assert dpcache.stats(flux).computed_steps == schedule.key_steps
    full = together(prompts[:1], height=48, width=64)
    assert 0 < np.square(large - full).mean() < 0.02


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads_with_a_pipeline_each(flux: Any, shared: bool) -> None:
    """Also of one transformer: its calls wait for each other, and every one follows its own pipeline's schedule."""
    schedules = [
        dpcache.Schedule.from_key_steps((0, 1, 2, 5, 8), FLUX_STEPS),
        dpcache.Schedule.from_key_steps((0, 2, 7), FLUX_STEPS, order=1),
    ]
    pipes = []
    for _ in schedules:
        scheduler = type(flux.scheduler).from_config(flux.scheduler.config)
        transformer = flux.transformer if shared else dpcache.load_pipeline("tiny-flux", device="cpu").transformer
        pipe = diffusers.FluxPipeline(**{**flux.components, "scheduler": scheduler, "transformer": transformer})
        pipe.default_sample_size = flux.default_sample_size
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    embeds = flux.encode_prompt(PROMPT, max_sequence_length=24)[:2]
    given = {"prompt": None, "prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[1], "output_type": "latent"}
    expected = []
    for pipe, schedule in zip(pipes, schedules, strict=True):
        with dpcache.enabled(pipe, schedule):
            expected.append(draw(pipe, **given))
    results: list[list[torch.Tensor]] = [[], []]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        results[number] += [draw(pipes[number], **given) for _ in range(3)]

    for pipe, schedule in zip(pipes, schedules, strict=True):
        dpcache.enable(pipe, schedule)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pipe in pipes:
        dpcache.disable(pipe)
    for number in range(2):
        assert len(results[number]) == 3
        assert all(torch.equal(result, expected[number]) for result in results[number])


# ----------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_guidance_switched_off_part_way(boundary: str) -> None:
    """A callback that ends guidance halves the batch: values of the new shape begin anew."""
    pipe, arguments = SMALL["StableDiffusion3Pipeline"].build()
    arguments = {**arguments, "num_inference_steps": STEPS}

    def end_guidance(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            pipe._guidance_scale = 1.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                given[name] = given[name][-1:]
        return given

    switched = {
        **arguments,
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    plain = call(pipe, switched)
    with dpcache.enabled(pipe, dpcache.Schedule.from_key_steps(range(STEPS), STEPS, boundary=boundary)):
        assert torch.equal(call(pipe, switched), plain)
    schedule = dpcache.Schedule.from_key_steps((0, 1, 3), STEPS, order=1, boundary=boundary)
    with dpcache.enabled(pipe, schedule):
        call(pipe, switched)
        assert dpcache.stats(pipe).computed_steps == (0, 1, 3, 4, 5)
        assert dpcache.stats(pipe).predicted_steps == (2, 6, 7)


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_perturbed_attention_guidance_is_a_third_of_one_batch(boundary: str) -> None:
    pipe, arguments = SMALL["StableDiffusion3Pipeline"].build()
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    perturbed = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["transformer_blocks.1"])
    perturbed.set_progress_bar_config(disable=True)
    arguments = {**arguments, "num_inference_steps": STEPS, "pag_scale": 2.0}
    plain = call(perturbed, arguments)
    schedule = dpcache.Schedule.from_key_steps((0, 1, 2, 5), STEPS, boundary=boundary)
    with dpcache.enabled(perturbed, schedule):
        cached = call(perturbed, arguments)
        assert dpcache.stats(perturbed).computed_steps == (0, 1, 2, 5)
    assert not torch.equal(cached, plain)
    assert torch.equal(call(perturbed, arguments), plain)
