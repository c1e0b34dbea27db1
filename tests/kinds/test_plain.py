"""Loops without a pipeline, modular pipelines, and pipelines of one's own that are called in another way."""

import gc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpcache
from tests.conftest import PROMPT, STEPS, draw, traces
from tests.kinds.conftest import KEYS, OTHER, twin_of
from tests.kinds.test_loops import Own

#: Noise levels of a loop: T and where the last step ends.
SIGMAS = torch.cat([torch.linspace(1.0, 1 / STEPS, STEPS), torch.zeros(1)])


class Velocity:
    """What stands between a plain loop and the transformer: its conditions, and nothing else."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.given = [self.conditions(prompt) for prompt in (PROMPT, "")]
        self.runs = 0

    def conditions(self, prompt: str) -> dict[str, Any]:
        embeds, pooled, text_ids = self.pipe.encode_prompt(prompt, None, max_sequence_length=24)
        ids = self.pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": text_ids, "img_ids": ids}

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, number: int = 0) -> torch.Tensor:
        given = self.given[number]
        return self.pipe.transformer(x, timestep=sigma.reshape(1), return_dict=False, **given)[0]


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed))


def flow_euler(velocity: Velocity, x: torch.Tensor, steps: Any = None) -> torch.Tensor:
    for sigma, after in steps or pairwise(SIGMAS):
        x = x + (after - sigma) * velocity(x, sigma)
    return x


def guided_euler(velocity: Velocity, x: torch.Tensor, steps: Any = None, tell: Any = lambda _: None) -> torch.Tensor:
    for sigma, after in steps or pairwise(SIGMAS):
        conditional, unconditional = velocity(x, sigma), velocity(x, sigma, 1)
        guided = unconditional + 3 * (conditional - unconditional)
        tell(guided)
        x = x + (after - sigma) * guided
    return x


def k_diffusion(velocity: Velocity, x: torch.Tensor, steps: Any = None) -> torch.Tensor:
    """A sampler in the way of k-diffusion: it calls a model that denoises, and knows nothing else."""

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x - sigma * velocity(x, sigma)

    ones = x.new_ones([x.shape[0]])
    for sigma, after in steps or pairwise(SIGMAS):
        denoised = model(x, sigma * ones)
        d = (x - denoised) / sigma
        x = x + d * (after - sigma)
    return x


class ByHand:
    """The same velocity, key steps computed and the others summed up in float64."""

    def __init__(self, velocity: Velocity, schedule: dpcache.Schedule) -> None:
        self.velocity, self.schedule = velocity, schedule
        self.known: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, number: int = 0) -> torch.Tensor:
        step = int((sigma.reshape(-1)[0] == SIGMAS).nonzero()[0])
        if step in self.schedule.key_steps:
            self.known[step, number] = self.velocity(x, sigma, number)
            return self.known[step, number]
        terms = self.schedule.predictions[step]
        return sum(term.coefficient * self.known[term.key_step, number].double() for term in terms).float()


LOOPS = {"flow Euler": flow_euler, "two guidance calls": guided_euler, "k-diffusion": k_diffusion}


@pytest.mark.parametrize("boundary", ["blocks", "output"])
@pytest.mark.parametrize("steps", ["by timestep", "by steps()"])
@pytest.mark.parametrize("name", list(LOOPS))
def test_a_plain_loop_follows_a_schedule(flux: Any, name: str, steps: str, boundary: str) -> None:
    velocity, loop, before = Velocity(flux), LOOPS[name], traces(flux)
    branches = 2 if name == "two guidance calls" else 1
    full = loop(velocity, noise())

    def go(following: Any, seed: int = 0) -> torch.Tensor:
        given = following.steps(pairwise(SIGMAS)) if steps == "by steps()" else None
        return loop(velocity, noise(seed), given)

    every = dpcache.Schedule.from_key_steps(range(STEPS), STEPS, boundary=boundary)
    with dpcache.following(flux.transformer, every, sigmas=SIGMAS) as following:
        assert torch.equal(go(following), full)
    schedule = dpcache.Schedule.from_key_steps(KEYS.key_steps, STEPS, boundary=boundary)
    with dpcache.following(flux.transformer, schedule) as following:
        cached = go(following)
        assert following.stats().computed_steps == KEYS.key_steps
        assert following.stats().full_calls == branches * len(KEYS.key_steps)
        other = go(following, 5)
        assert torch.equal(go(following), cached) and not torch.equal(other, cached)
        assert following.stats().generations == 3
    assert not torch.equal(cached, full)
    if boundary == "output":
        torch.testing.assert_close(cached, loop(ByHand(velocity, schedule), noise()), rtol=1e-4, atol=1e-4)
    assert traces(flux) == before
    assert torch.equal(loop(velocity, noise()), full)


@pytest.mark.parametrize("told", [False, True], ids=["", "told what is received"])
@pytest.mark.parametrize("name", list(LOOPS))
def test_a_plain_loop_is_recorded_and_planned(flux: Any, name: str, told: bool) -> None:
    velocity, loop, before = Velocity(flux), LOOPS[name], traces(flux)
    full = loop(velocity, noise(7))
    tell = {"tell": lambda value: recorded.received(value)} if told and name == "two guidance calls" else {}
    with dpcache.recording(flux.transformer, sigmas=SIGMAS, prediction="flow_prediction") as recorded:
        first = loop(velocity, noise(), **tell)
        loop(velocity, noise(1), **tell)
    assert torch.equal(first, loop(velocity, noise()))
    calibration = recorded.calibration
    assert (calibration.facts.num_inputs, calibration.facts.num_inference_steps) == (2, STEPS)
    assert calibration.influence[0] == pytest.approx(np.diff(SIGMAS.numpy()))
    errors = []
    for schedule in (calibration.plan(5), dpcache.Schedule.uniform(5, STEPS, boundary="output")):
        with dpcache.following(flux.transformer, schedule, sigmas=SIGMAS):
            errors.append(float((loop(velocity, noise(7)) - full).square().mean()))
    if name != "two guidance calls":  # guided so strongly, in so few steps, no plan of two runs is better than another
        assert errors[0] < errors[1]
    with dpcache.following(flux.transformer, calibration, num_key_steps=4, sigmas=SIGMAS) as following:
        loop(velocity, noise(7))
        assert len(following.stats().computed_steps) == 4
    assert traces(flux) == before


def test_other_levels_of_a_plain_loop_are_told(flux: Any) -> None:
    velocity = Velocity(flux)
    with dpcache.recording(flux.transformer, sigmas=SIGMAS) as recorded:
        flow_euler(velocity, noise())
    bent = SIGMAS**2
    with (
        dpcache.following(flux.transformer, recorded.calibration.plan(5), sigmas=bent),
        pytest.warns(UserWarning, match="planned for noise levels"),
    ):
        flow_euler(velocity, noise(), pairwise(bent))


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_a_plain_loop_may_be_left(flux: Any, error: BaseException) -> None:
    velocity, before = Velocity(flux), traces(flux)

    def steps() -> Any:
        for number, pair in enumerate(pairwise(SIGMAS)):
            if number == 6:
                raise error
            yield pair

    with dpcache.following(flux.transformer, KEYS):
        expected = flow_euler(velocity, noise())
    with dpcache.following(flux.transformer, KEYS) as following:
        with pytest.raises(type(error)):
            flow_euler(velocity, noise(), steps())
        assert torch.equal(flow_euler(velocity, noise()), expected)
        with pytest.raises(type(error)):
            flow_euler(velocity, noise(), following.steps(steps()))
        assert torch.equal(flow_euler(velocity, noise()), expected)
    gc.collect()
    assert traces(flux) == before
    with pytest.raises(type(error)), dpcache.recording(flux.transformer):
        flow_euler(velocity, noise(), steps())
    assert traces(flux) == before


def test_what_is_no_network_is_refused(flux: Any) -> None:
    with (
        pytest.raises(dpcache.UnsupportedPipelineError, match=r"dpcache.enable\(pipe, schedule\)"),
        dpcache.following(flux, KEYS),
    ):
        pass
    strange = torch.nn.Linear(2, 2)
    with dpcache.following(strange, dpcache.Schedule.uniform(2, 4, boundary="output")) as following:
        with pytest.raises(dpcache.UnsupportedPipelineError, match=r"loop.steps"):
            strange(torch.ones(1, 2))
        for number in following.steps(range(4)):
            strange(torch.full((1, 2), float(number)))
        assert following.stats().computed_steps == (0, 2)


# --------------------------------------------------------------------------------------------------- modular pipelines


@pytest.fixture
def modular(flux: Any) -> Any:
    from diffusers.modular_pipelines import FluxAutoBlocks

    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in flux.components.items() if part is not None})
    return pipe


MODULAR = {"height": 32, "width": 32, "max_sequence_length": 24, "num_inference_steps": STEPS}


def test_a_modular_pipeline_follows(flux: Any, modular: Any) -> None:
    def go(**more: Any) -> np.ndarray:
        state = modular(prompt=PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **MODULAR, **more)
        return np.asarray(state.get("images"))

    kind, full, twin = type(modular), go(), draw(flux)
    with dpcache.enabled(modular, KEYS):
        cached = go()
        assert dpcache.stats(modular).computed_steps == KEYS.key_steps
        assert np.array_equal(draw(flux), twin)
        assert np.array_equal(go(), cached) and not np.array_equal(cached, full)
    with dpcache.enabled(modular, dpcache.Schedule.from_key_steps(range(STEPS), STEPS)):
        assert np.array_equal(go(), full)
    assert type(modular) is kind and np.array_equal(go(), full)


def test_a_modular_pipeline_is_calibrated_and_compared(modular: Any) -> None:
    settings = {name: value for name, value in MODULAR.items() if name != "num_inference_steps"}
    calibration = dpcache.calibrate(modular, [PROMPT, OTHER], num_inference_steps=STEPS, progress=False, **settings)
    assert len(calibration.gram) == 2
    planned = calibration.plan(6)
    found = dpcache.compare(
        modular, planned, [PROMPT], **{k: v for k, v in settings.items() if k != "num_inference_steps"}
    )
    assert found.cached_block_runs == found.full_block_runs * 6 / STEPS
    assert found.samples[0].psnr > 25


# ----------------------------------------------------------------------------------------------- pipelines of one's own


class Bare(Own):
    """Returns a picture as a bare tensor in [0, 1], and takes `steps`; there is no `output_type`."""

    def __call__(self, prompt: str, steps: int = STEPS, generator: Any = None) -> Any:  # type: ignore[override]
        return self.picture(super().__call__(prompt, steps, generator))

    def picture(self, latents: torch.Tensor) -> Any:
        latents = self._unpack_latents(latents, 32, 32, self.vae_scale_factor)
        with torch.no_grad():
            found = self.vae.decode(latents / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
        return (found / 2 + 0.5).clamp(0, 1)


class Pictures(Bare):
    def picture(self, latents: torch.Tensor) -> Any:
        array = super().picture(latents)[0].movedim(0, -1).numpy()
        return [Image.fromarray((array * 255).astype(np.uint8))]


class Named(Bare):
    def picture(self, latents: torch.Tensor) -> Any:
        return {"pictures": super().picture(latents)}


class Strange(Bare):
    def picture(self, latents: torch.Tensor) -> Any:
        return object()


@pytest.mark.parametrize("kind", [Bare, Pictures, Named])
def test_pipelines_called_in_another_way(flux: Any, kind: Any) -> None:
    pipe = twin_of(flux, own_scheduler=True, kind=kind)
    settings = {"num_inference_steps": 10, "progress": False}
    calibration = dpcache.calibrate(pipe, [PROMPT, OTHER], **settings)
    assert calibration.facts.num_inference_steps == 10
    found = dpcache.compare(pipe, calibration.plan(5), [PROMPT], progress=False)
    assert found.samples[0].full.shape == (32, 32, 3) and found.samples[0].psnr > 20
    chosen = dpcache.optimize(pipe, [PROMPT, OTHER], num_key_steps=4, budget=4, **settings)
    assert chosen.num_inference_steps == 10


def test_what_cannot_be_compared_says_what_is_missing(flux: Any) -> None:
    pipe = twin_of(flux, own_scheduler=True, kind=Strange)
    with pytest.raises(dpcache.UnsupportedPipelineError, match=r"returned a object.*have it return what"):
        dpcache.compare(pipe, KEYS, [PROMPT], progress=False)
