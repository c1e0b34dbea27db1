"""Schedulers of diffusers, read from outside: the noise levels of their grid, and how far they move the sample."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import GridError
from dpcache.plan.grids import FLOW, NoiseGrid
from dpcache.plan.levels import noise_levels

Array = npt.NDArray[np.float64]

#: So small that schedulers which clip or threshold what they predict leave it alone.
_SMALL = 1e-3
_SHAPE = (1, 4, 8, 8)
#: Words in the names of what `set_timesteps` leaves on a scheduler; all else is history, or from its configuration.
_GRID_STATE = re.compile("num_inference_steps|timesteps|sigmas")


def prediction_type(scheduler: Any) -> str:
    """What the model returns, in the words of diffusers."""
    flows = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
    return FLOW if flows else str(scheduler.config.get("prediction_type", "epsilon"))


def noise_grid(scheduler: Any, start: int = 0) -> NoiseGrid:
    """The grid of a scheduler on which `set_timesteps` has been called, from a step on; the scheduler is left alone.

    Raises:
        GridError: its noise levels are not known, or it cannot be stepped by itself.
    """
    name = type(scheduler).__name__
    levels = noise_levels(scheduler, start) if getattr(scheduler, "timesteps", None) is not None else None
    if levels is None:
        raise GridError(f"the noise levels of {name} are not known: calibrate on the grid that you plan for.")
    try:
        influence = stepped_influence(scheduler)[start:]
    except Exception as error:  # whatever a scheduler of its own kind wants
        raise GridError(
            f"{name} cannot be stepped by itself ({error}): calibrate on the grid that you plan for."
        ) from error
    timesteps = scheduler.timesteps[start:].double().cpu().numpy()
    return NoiseGrid(np.array(levels), prediction_type(scheduler), influence, timesteps, name)


def stepped_influence(scheduler: Any) -> Array:
    """float64 [T]: how far a scheduler moves the sample per unit of model output (see `costs.step_influence`).

    Of the sample as the model gets it: what `scale_model_input` makes of it, where the scheduler keeps it larger.

    Two copies of it go along its grid, each with a random sample and a random output that stays the same: what moves
    the difference of their samples is the difference of their outputs, exactly, also where noise is added, or where
    earlier outputs have a share in a step.
    """
    samples, outputs = [], []
    for seed in (0, 1):
        alone = _alone(scheduler)
        output, sample = _SMALL * torch.randn(2, *_SHAPE, generator=torch.Generator().manual_seed(seed))
        received = torch.cat([output, torch.zeros_like(output)], dim=1) if _learns_variance(scheduler) else output
        # As large as loops begin: from a small one the shares of sample and output could hardly be told apart.
        path, scales = [sample * float(getattr(alone, "init_noise_sigma", 1.0))], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the noise, the same in both
            for timestep in alone.timesteps:
                given = alone.scale_model_input(path[-1], timestep) if hasattr(alone, "scale_model_input") else path[-1]
                scales.append(float(given.norm() / path[-1].norm()))
                path.append(alone.step(received, timestep, path[-1], return_dict=False)[0])
        samples.append(torch.stack(path))
        outputs.append(output)
    output, differences = outputs[0] - outputs[1], samples[0] - samples[1]
    moved = [step_influence(output, before, after) for before, after in pairwise(differences)]
    return np.array(moved) * [*scales[1:], 1.0]


def step_influence(received: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """How far one step of a scheduler moves the sample per unit of the model output that it is given.

    `after` is fitted as a x before + b x received by least squares, and b returned, with its sign: exact wherever a
    step is linear in its sample and model output (Euler, flow Euler, DDIM: all but rounding), the best linear account
    otherwise.
    """
    x, o, y = (tensor.detach().double().flatten() for tensor in (before, received, after))
    products = torch.stack([x, o]) @ torch.stack([x, o, y]).T  # one transfer from the device
    (xx, xo, xy), (_, oo, oy) = products.tolist()
    determinant = xx * oo - xo * xo
    # Sample and output along one line: the share of each is unknown, and the output may have moved all of it.
    if determinant > 1e-12 * xx * oo:
        return float((xx * oy - xo * xy) / determinant)
    return float((oy - xo) / oo) if oo else 0.0


def _learns_variance(scheduler: Any) -> bool:
    """Whether the model's output has further channels, with the variance of a step in them."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def _alone(scheduler: Any) -> Any:
    """Another scheduler with the same grid, in host memory, on which nobody listens and no step was taken."""
    alone = type(scheduler).from_config(scheduler.config)
    for name, value in vars(scheduler).items():
        if _GRID_STATE.search(name) and not callable(value):
            setattr(alone, name, value.cpu() if isinstance(value, torch.Tensor) else value)
    return alone
