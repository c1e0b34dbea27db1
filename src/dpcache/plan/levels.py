"""The noise levels of a scheduler's grid, read without torch."""

from typing import Any

import numpy as np

#: Share of signal below which a noise level is as good as infinite, which no file could hold.
_NO_SIGNAL = 1e-8


def noise_levels(scheduler: Any, start: int = 0) -> tuple[float, ...] | None:
    """The noise level at every step of the scheduler's grid and where the last one ends; None where it has none.

    Its `sigmas` where there are any, else noise over signal from `alphas_cumprod` at its timesteps.

    Args:
        scheduler: a scheduler of diffusers on which `set_timesteps` has been called.
        start: the first step to be taken.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is not None and hasattr(sigmas, "tolist") and len(sigmas) == len(timesteps) + 1:
        return tuple(sigmas[start:].tolist())
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or not hasattr(alphas, "tolist"):
        return None
    # Read from the device once, the timesteps.
    at_steps = np.asarray(alphas.tolist())[np.asarray(timesteps[start:].tolist()).astype(int)]
    signal = np.append(at_steps, float(getattr(scheduler, "final_alpha_cumprod", 1.0))).clip(min=_NO_SIGNAL)
    return tuple(np.sqrt(1 / signal - 1).tolist())
