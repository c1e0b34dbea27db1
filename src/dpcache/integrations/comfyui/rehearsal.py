"""At which noise levels a sampler is going to evaluate the model, found out before the model is called.

A SAMPLER of ComfyUI is a function that calls the guider as often as it likes, at levels that it makes from the given
ones. So it is rehearsed: it runs as it will, on noise of one pixel, and calls an understudy of the guider, which writes
the levels down and takes no time. Nothing has to be known of any sampler by its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpcache.plan.matching import same_levels

#: A sampler that has made so many evaluations a step is stopped: nobody knows whether it ends without the model.
_MOST_EVALUATIONS = 100


@dataclass(frozen=True)
class Rehearsal:
    """What a sampler is going to do.

    Attributes:
        given: the noise levels it is given, the last where the run ends.
        evaluated: those at which it evaluates the model.
        failure: why it could not be rehearsed; None where it could.
    """

    given: tuple[float, ...]
    evaluated: tuple[float, ...]
    failure: str | None = None

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of its evaluations, and where the run ends."""
        return (*self.evaluated, self.given[-1])

    @property
    def obstacle(self) -> str | None:
        """Why its steps cannot be followed; None where it evaluates every given level once, one after another."""
        steps, evaluations = len(self.given) - 1, len(self.evaluated)
        if self.failure is not None:
            return f"the sampler could not be rehearsed ({self.failure})"
        if evaluations != steps:
            return f"the sampler evaluates the model {evaluations} times in {steps} steps, not once a step"
        if not same_levels(self.given, self.evaluated):
            return "the sampler evaluates the model between its noise levels"
        if len(set(self.evaluated)) < steps:
            return "the run has several steps at one noise level"
        return None


def rehearse(sampler: Any, guider: Any, sigmas: torch.Tensor, seed: Any, noise: torch.Tensor, latent: Any) -> Rehearsal:
    """Lets a sampler run without the model. Random numbers are afterwards as before.

    Args:
        sampler: ComfyUI's SAMPLER.
        guider: what it will evaluate.
        sigmas: the noise levels it is given.
        seed: of the run.
        noise: of the run.
        latent: of the run; None where there is none.
    """
    understudy = _Understudy(guider, most=_MOST_EVALUATIONS * len(sigmas))
    options = {"transformer_options": {"sample_sigmas": sigmas}}
    device = noise.device
    has_own = device.type in ("cuda", "xpu")  # random numbers of its own that torch can put back
    failure = None
    with torch.random.fork_rng([device] if has_own else [], device_type=device.type if has_own else "cuda"):
        try:
            sampler.sample(
                understudy,
                sigmas.clone(),
                {"model_options": options, "seed": seed},
                None,
                _pixel(noise),
                None if latent is None else _pixel(latent),
                None,
                True,
            )
        except Exception as error:  # whatever a sampler raises here, it may do well in earnest
            failure = f"{type(error).__name__}: {error}"
    return Rehearsal(tuple(sigmas.tolist()), tuple(understudy.levels), failure)


def _pixel(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(slice(0, 1),) * tensor.ndim].clone()


class _Understudy:
    """Stands in for a guider: everything it has, but for the model."""

    def __init__(self, guider: Any, most: int) -> None:
        self._guider, self._most = guider, most
        self.levels: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None) -> Any:
        self.levels.append(float(timestep.flatten()[0]))
        if len(self.levels) > self._most:
            raise RuntimeError(f"it did not end within {self._most} evaluations")
        denoised = torch.zeros_like(x)
        # Only functions that the sampler itself has put there are among the options of a rehearsal.
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            denoised = function(
                {
                    "denoised": denoised,
                    "cond_denoised": denoised,
                    "uncond_denoised": denoised,
                    "cond": None,
                    "uncond": None,
                    "cond_scale": 1.0,
                    "model": self._guider.inner_model,
                    "sigma": timestep,
                    "model_options": model_options,
                    "input": x,
                }
            )
        return denoised


def step_of(levels: Sequence[float], sigma: float) -> int | None:
    """The step that begins at this noise level, but for rounding; None where none does.

    Args:
        levels: of every step, and where the last one ends.
        sigma: a level at which the model is called.
    """
    if not sigma > 0:
        return None
    nearest = min(range(len(levels) - 1), key=lambda step: abs(levels[step] - sigma))
    return nearest if abs(levels[nearest] - sigma) <= 1e-5 * sigma else None
