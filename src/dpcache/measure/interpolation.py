"""A calibration on another grid than it was recorded on."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpcache.checks import whole
from dpcache.errors import GridError
from dpcache.plan.grids import (
    NoiseGrid,
    at_timesteps,
    gram_between,
    known_influence,
    require_within,
    rescaled_influence,
    with_steps,
)

if TYPE_CHECKING:
    from .calibration import Calibration

#: How often probed ratios are averaged with their neighbours, in shares of 1, 2 and 1.
_SMOOTHINGS = 2


def asked_grid(calibration: "Calibration", asked: dict[str, Any]) -> NoiseGrid | None:
    """The grid that was asked for by one of the arguments of `Calibration.on_grid`; None if it is the recorded one."""
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(asked)}; got {', '.join(given) or 'none'}.")
    ((name, value),) = given.items()
    recorded = calibration.grid
    if name == "num_inference_steps":
        value = whole(name, value, -sys.maxsize)
    if name == "num_inference_steps" and value == calibration.facts.num_inference_steps:
        return None
    if recorded is None:
        raise GridError(
            f"what {calibration.facts.scheduler} was given, or its noise levels, could not be seen while calibrating: "
            "calibrate on the grid that you plan for."
        )
    if calibration.facts.recorded_steps is not None:
        raise GridError("this calibration was interpolated itself: go back to the one that was recorded.")
    grid = _grid(recorded, name, value)
    require_within(grid, recorded)
    if grid.influence is None:
        influence = known_influence(grid, recorded)
    else:
        influence = rescaled_influence(grid.influence, grid, recorded)
    assert recorded.influence is not None
    if grid.is_same(recorded) and np.allclose(influence, recorded.influence, rtol=1e-3, atol=1e-9):
        return None
    return replace(grid, influence=influence)


def _grid(recorded: NoiseGrid, name: str, value: Any) -> NoiseGrid:
    if name == "num_inference_steps":
        return with_steps(recorded, value)
    if name == "timesteps":
        return at_timesteps(recorded, _levels(name, value, 1))
    if name == "sigmas":
        return NoiseGrid(_levels(name, value, 2), recorded.prediction)
    if isinstance(value, NoiseGrid):
        return value
    from dpcache.run.schedulers import noise_grid

    return noise_grid(value)


def _levels(name: str, value: Any, least: int) -> NDArray[np.float64]:
    try:
        levels = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {value!r}.") from error
    if levels.ndim != 1 or len(levels) < least or not np.isfinite(levels).all():
        raise ValueError(f"{name} must be {least} or more finite numbers, got {value!r}.")
    return levels


def _smoothed(probes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean ratios, [1, T] and NaN where none was probed, smoothed over neighbouring probes.

    Two probed inputs differ by half, which is more than the ratio changes from one probe to the next. That of the last
    probe, at the end of the run, is known to be 1 and stays.
    """
    known = np.flatnonzero(np.isfinite(probes).any(axis=0))
    found = np.full((1, probes.shape[1]), np.nan)
    if not len(known):
        return found
    values = np.nanmean(np.log(probes[:, known]), axis=0)
    for _ in range(_SMOOTHINGS):
        padded = np.pad(values, 1, "edge")
        values[:-1] = ((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4)[:-1]
    found[0, known] = np.exp(values)
    return found


def on_grid(calibration: "Calibration", grid: NoiseGrid) -> "Calibration":
    """The calibration as it would be on this grid; errors of trials are yet to be filled in.

    What was tried becomes the same key steps, each at the nearest noise level.
    """
    recorded, facts = calibration.grid, calibration.facts
    assert recorded is not None and grid.influence is not None
    knots, points = recorded.warped(), grid.warped()
    steps = grid.num_steps
    probes = np.empty((0, steps))
    if calibration.is_measured:
        # What becomes of an error depends on the noise level at which it enters the sample, where its step ends.
        logarithms = np.log(interpolated(_smoothed(calibration.probes)))
        probes = np.exp(np.interp(grid.warped_ends(), recorded.warped_ends(), logarithms))[None]
    nearest = np.abs(points - knots[:, None]).argmin(axis=1)
    tried = np.zeros((len(calibration.tried), steps))
    for row, keys in zip(tried, calibration.tried, strict=True):
        row[[0, *nearest[keys > 0]]] = 1.0
    calls = None
    if facts.calls is not None:
        calls = tuple({**call, "num_inference_steps": steps} for call in facts.calls)
    return replace(
        calibration,
        facts=facts.model_copy(
            update={
                "num_inference_steps": steps,
                "scheduler": grid.scheduler or facts.scheduler,
                "timesteps": () if grid.timesteps is None else tuple(grid.timesteps.tolist()),
                "sigmas": tuple(grid.sigmas.tolist()),
                "recorded_steps": facts.num_inference_steps,
                "calls": calls,
            }
        ),
        paper_cost=np.empty((0, 0, 0)),
        gram=gram_between(calibration.gram, knots, points),
        value_gram=gram_between(calibration.value_gram, knots, points),
        influence=np.repeat(grid.influence[None], len(calibration.influence), axis=0),
        probes=probes,
        tried=tried,
    )


def interpolated(probes: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [T]: the measured sensitivity at every step, from that of several calls.

    Args:
        probes: [calls, T], as `sensitivity.ratios` has them, NaN at all but the probed steps.

    It changes slowly: its logarithm is averaged over calls and interpolated linearly.
    """
    steps = np.arange(probes.shape[1])
    known = steps[np.isfinite(probes).any(axis=0)]
    logarithms = np.nanmean(np.log(probes[:, known]), axis=0)
    result: NDArray[np.float64] = np.exp(np.interp(steps, known, logarithms)) if len(known) else np.ones(len(steps))
    return result
