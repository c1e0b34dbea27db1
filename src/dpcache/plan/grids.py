"""From one grid of noise levels to another: what was measured on the one, as it would be on the other.

What a denoiser returns along a run is a smooth function of the noise level plus a rest that is not: from step to step
it jumps by a per cent or so, however close the steps are. The smooth part is interpolated between four neighbours, and
its Gram matrix G becomes W G W^T; the rest is measured, and as much of it added as interpolation has averaged out. This
is kriging with a nugget (Matheron, 1963), and keeps Gram matrices positive semidefinite.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpcache.errors import GridError

Array = npt.NDArray[np.float64]

FLOW = "flow_prediction"
"""What `NoiseGrid.prediction` says of flow matching, as diffusers does."""
#: Keeps the logarithm finite at no noise and at no signal: within this distance of either, warping is about linear.
_SOFT = 0.05
#: Steps over which the part that is not smooth is averaged, to each side.
_SPREAD = 3
#: How far the recorded influence may be from that of a known kind of step.
_SAME_KIND = 0.02
REMEDY = "Calibrate on a grid that reaches as far, with dpcache.calibrate(pipe, inputs, ...)."


@dataclass(frozen=True, eq=False)
class NoiseGrid:
    """The noise levels of a sampling loop and how far the sample is moved between them.

    Attributes:
        sigmas: float64 [T + 1], decreasing: the level at every step and where the last one ends. Share of noise for
            flow matching, ratio of noise to signal for all else.
        prediction: what the model returns, in the words of diffusers: "epsilon", "v_prediction", "flow_prediction", ...
        influence: float64 [T], as in `Calibration`, on the sample as the recorded scheduler scales it; None where only
            the levels are known.
        timesteps: float64 [T], what the model is told; None where that is not known.
        scheduler: class name of the scheduler; None if it is that of the calibration.
    """

    sigmas: Array
    prediction: str
    influence: Array | None = None
    timesteps: Array | None = None
    scheduler: str | None = None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def warped(self) -> Array:
        """float64 [T], increasing: the levels on a scale on which outputs change evenly.

        The logarithm of signal over noise, as shares of their sum, bent so that it ends at no noise and at no signal.
        """
        return _warped(self.sigmas[:-1], self.prediction)

    def warped_ends(self) -> Array:
        """float64 [T]: likewise, where each step ends."""
        return _warped(self.sigmas[1:], self.prediction)

    def is_same(self, other: "NoiseGrid") -> bool:
        """Whether the levels are the same, but for rounding."""
        return len(self.sigmas) == len(other.sigmas) and np.allclose(self.sigmas, other.sigmas, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True, eq=False)
class Frame:
    """A sampling loop seen so that a step adds a multiple of the model's output to the sample and does nothing else.

    Attributes:
        moves: float64 [T], the multiple.
        reaction: float64 [T], how much the model's output at a step grows per unit by which the sample there is off,
            along it: that of a model which gives the same clean picture all the same.
    """

    moves: Array
    reaction: Array


def frame(grid: NoiseGrid) -> Frame | None:
    """How the sample moves on a grid, in the scale of the clean picture; None if the steps are of no known kind."""
    kind = _recorded_kind(grid) if grid.influence is not None else None
    if kind is None or not (grid.sigmas[:-1] > 0).all():
        return None
    levels, steps = grid.sigmas[:-1], np.diff(grid.sigmas)
    if kind in (_euler, _preserving):
        return Frame(steps, 1 / levels)
    # v is (signal x noise - share of noise x picture), so a step also multiplies the sample.
    signal = _signal(levels)
    scale = np.cumprod(1 + steps * levels * signal**2)
    return Frame(steps * signal / scale, signal / levels * np.append(1, scale[:-1]))


def require_within(grid: NoiseGrid, recorded: NoiseGrid) -> None:
    """Checks that a grid is one that can be interpolated to.

    At the noisy end it may begin one recorded step further; at the other, end where the recorded run ended.

    Raises:
        GridError: it is not.
    """
    known, wanted = recorded.warped(), grid.warped()
    if grid.prediction != recorded.prediction:
        raise GridError(
            f"the calibration is of a model that returns {recorded.prediction}, the scheduler takes {grid.prediction}: "
            "use a scheduler of the same prediction type, or calibrate with this one."
        )
    if not (np.isfinite(wanted).all() and (np.diff(wanted) >= 0).all()):
        raise GridError("the noise levels of the grid rise from one step to another: calibrate on this grid.")
    if not (np.isfinite(known).all() and (np.diff(known) >= 0).all()) or len(known := known[distinct(known)]) < 4:
        raise GridError(
            "the noise levels of this calibration rise from one step to another, or are fewer than four, so there is "
            "nothing to interpolate between: calibrate on the grid that you plan for."
        )
    least = known[0] - 1.01 * (known[1] - known[0])
    end = _warped(recorded.sigmas[-1:], recorded.prediction)[0]
    most = max(end, known[-1] + 1.01 * (known[-1] - known[-2])) + 1e-9
    if not (least <= wanted.min() and wanted.max() <= most):
        raise GridError(
            f"the grid has noise levels from {grid.sigmas[:-1].max():.4g} to {grid.sigmas[:-1].min():.4g}, the "
            f"calibration was recorded from {recorded.sigmas[0]:.4g} to {recorded.sigmas[-2]:.4g} and knows nothing "
            f"beyond. {REMEDY}"
        )


def interpolation_matrix(knots: Array, points: Array) -> Array:
    """float64 [points, knots]: what the values at increasing knots are multiplied by to give those at the points.

    The cubic through the four nearest knots (Lagrange); beyond the ends, where a cubic would magnify what is not
    smooth, the line through the last two.
    """
    matrix = np.zeros((len(points), len(knots)))
    for row, point in zip(matrix, points, strict=True):
        inside = knots[0] <= point <= knots[-1]
        count = min(4 if inside else 2, len(knots))
        first = int(np.clip(np.searchsorted(knots, point) - count // 2, 0, len(knots) - count))
        row[first : first + count] = lagrange(knots[first : first + count], [point])[0]
    return matrix


def lagrange(knots: Array, points: Sequence[float] | Array) -> Array:
    """float64 [points, knots]: likewise, on the one polynomial through all of the knots, which differ."""
    matrix = np.ones((len(points), len(knots)))
    for place, knot in enumerate(knots):
        others = np.delete(knots, place)
        matrix[:, place] = ((np.asarray(points)[:, None] - others) / (knot - others)).prod(axis=1)
    return matrix


def distinct(levels: Array) -> npt.NDArray[np.intp]:
    """Where levels that never fall are above the one before: schedulers that take a step in two have some twice."""
    return np.flatnonzero(np.diff(levels, prepend=-np.inf) > 0)


def gram_between(grams: Array, knots: Array, points: Array) -> Array:
    """float64 [runs, points, points]: Gram matrices [runs, knots, knots], as they would be at other noise levels."""
    if not len(grams):
        return np.empty((0, len(points), len(points)))
    known = distinct(knots)
    grams, knots = grams[:, known][:, :, known], knots[known]
    matrix = interpolation_matrix(knots, points)
    rough = roughness(grams, knots)
    there = np.stack([np.interp(points, knots, row) for row in rough])
    found: Array = matrix @ grams @ matrix.T
    # Of what is not smooth, interpolation keeps some, and what it keeps at neighbouring points is alike.
    missing = _diagonal(there) - matrix @ _diagonal(rough) @ matrix.T
    values, vectors = np.linalg.eigh(missing)
    found += (vectors * np.maximum(values, 0)[:, None]) @ vectors.transpose(0, 2, 1)
    return found


def _diagonal(rows: Array) -> Array:
    return rows[:, :, None] * np.eye(rows.shape[1])


def roughness(grams: Array, knots: Array) -> Array:
    """float64 [runs, knots]: variance of what is not smooth, from how badly each step follows from its neighbours.

    The first and the last step have neighbours on one side only, and count as the ones beside them.
    """
    inner = np.arange(1, len(knots) - 1)
    residual = np.eye(len(knots))[inner]
    for row, step in zip(residual, inner, strict=True):
        others = np.delete(np.arange(len(knots)), step)
        row[others] = -interpolation_matrix(knots[others], knots[step : step + 1])[0]
    square = np.einsum("oa,gab,ob->go", residual, grams, residual) / (residual**2).sum(axis=1)
    window = np.ones(2 * _SPREAD + 1) / (2 * _SPREAD + 1)
    return np.stack([np.convolve(np.pad(row, _SPREAD + 1, "edge"), window, "valid") for row in np.maximum(square, 0)])


def left_out_error(grams: Array, knots: Array) -> float:
    """How far values that were left out are from what is interpolated between the others, relative, RMS.

    Left out is every second step but the last; grams are [runs, knots, knots].
    """
    left_out = np.arange(1, len(knots) - 1, 2)
    kept = np.setdiff1d(np.arange(len(knots)), left_out)
    residual = np.eye(len(knots))[left_out]
    residual[:, kept] = -interpolation_matrix(knots[kept], knots[left_out])
    square = np.einsum("oa,gab,ob->go", residual, grams, residual)
    return float(np.sqrt(square.sum() / np.diagonal(grams, axis1=1, axis2=2)[:, left_out].sum()))


def with_steps(recorded: NoiseGrid, num_steps: int) -> NoiseGrid:
    """The grid that the recorded one's rule gives for another number of steps.

    Three rules are told apart: timesteps spaced by a whole number that end at 0 or 1 ("leading" in diffusers), levels
    that end at a least one before they drop to the end, and levels that fall evenly to the end.

    Raises:
        GridError: fewer than one step.
    """
    if num_steps < 1:
        raise GridError(f"num_inference_steps must be 1 or more, got {num_steps}.")
    steps, timesteps = recorded.num_steps, recorded.timesteps
    levels = _smooth(recorded.sigmas, recorded.prediction)
    if num_steps == steps or steps < 4:
        return recorded
    if timesteps is not None and recorded.prediction != FLOW:
        gaps = -np.diff(timesteps)
        if (gaps == gaps[0]).all() and gaps[0] == round(gaps[0]) and timesteps[-1] in (0, 1):
            spaced = np.arange(num_steps)[::-1] * (gaps[0] * steps // num_steps) + timesteps[-1]
            return at_timesteps(recorded, spaced)
    last, before = recorded.sigmas[-2], recorded.sigmas[-3]
    if last - recorded.sigmas[-1] < 0.3 * (before - last):
        matrix = interpolation_matrix(np.linspace(0, 1, steps), np.linspace(0, 1, num_steps))
        inner = _from_smooth(matrix @ levels[:-1], recorded.prediction)
    else:
        matrix = interpolation_matrix(np.linspace(0, 1, steps + 1), np.linspace(0, 1, num_steps + 1)[:-1])
        inner = _from_smooth(matrix @ levels, recorded.prediction)
    return NoiseGrid(np.append(inner, recorded.sigmas[-1]), recorded.prediction)


def at_timesteps(recorded: NoiseGrid, timesteps: Sequence[float] | Array) -> NoiseGrid:
    """The grid of these timesteps, levels as the recorded scheduler has them there; it ends where the recorded one did.

    Raises:
        GridError: the recorded timesteps do not fall from step to step.
    """
    known, wanted = recorded.timesteps, np.asarray(timesteps, dtype=np.float64)
    if known is None or not (np.diff(known) < 0).all():
        raise GridError("the recorded timesteps do not fall from step to step: give sigmas, or a scheduler.")
    matrix = interpolation_matrix(-known, -wanted)
    inner = _from_smooth(matrix @ _smooth(recorded.sigmas[:-1], recorded.prediction), recorded.prediction)
    return NoiseGrid(np.append(inner, recorded.sigmas[-1]), recorded.prediction, timesteps=wanted)


def known_influence(grid: NoiseGrid, recorded: NoiseGrid) -> Array:
    """float64 [T]: the influence on a grid of which only the levels are known, by the kind of step that was recorded.

    Raises:
        GridError: it is no known kind.
    """
    kind = _recorded_kind(recorded)
    if kind is None:
        raise GridError(
            "how far the recorded scheduler moves the sample follows no known rule, so a number of steps does not say "
            "how far it would on another grid: pass scheduler=pipe.scheduler, on which set_timesteps has been called."
        )
    return kind(grid.sigmas)


def rescaled_influence(influence: Array, grid: NoiseGrid, recorded: NoiseGrid) -> Array:
    """float64 [T]: influence on the sample as the recorded scheduler scales it, from that on what the model gets."""
    if recorded.prediction != FLOW and _recorded_kind(recorded) in _EXPLODING:
        return influence / _signal(grid.sigmas[1:])
    return influence


Kind = Callable[[Array], Array]


def _signal(sigmas: Array) -> Array:
    """What the signal is scaled by where its variance and that of the noise add up to 1."""
    return np.asarray(1 / np.sqrt(1 + sigmas**2))


def _euler(sigmas: Array) -> Array:
    return np.diff(sigmas)


def _euler_of_v(sigmas: Array) -> Array:
    return np.diff(sigmas) * _signal(sigmas[:-1])


def _preserving(sigmas: Array) -> Array:
    return np.diff(sigmas) * _signal(sigmas[1:])


def _preserving_of_v(sigmas: Array) -> Array:
    return np.diff(sigmas) * _signal(sigmas[1:]) * _signal(sigmas[:-1])


#: What a step from s to s' adds of a model output: Euler on flows or noise, Euler on v, and both where the sample is
#: scaled so that its variance stays the same, as in DDIM. Exact also of solvers that look back, if outputs stay as they
#: are.
_EXPLODING: tuple[Kind, ...] = (_euler, _euler_of_v)
_KINDS: tuple[Kind, ...] = (*_EXPLODING, _preserving, _preserving_of_v)


def _recorded_kind(recorded: NoiseGrid) -> Kind | None:
    assert recorded.influence is not None
    kinds = _KINDS[:1] if recorded.prediction == FLOW else _KINDS
    errors = [np.abs(kind(recorded.sigmas) - recorded.influence).max() for kind in kinds]
    best = int(np.argmin(errors))
    return kinds[best] if errors[best] <= _SAME_KIND * np.abs(recorded.influence).max() else None


def _warped(sigmas: Array, prediction: str) -> Array:
    share = sigmas if prediction == FLOW else sigmas / (1 + sigmas)
    # Impossible levels are mapped far outside.
    return np.asarray(np.log(np.maximum(1 - share + _SOFT, 1e-9) / np.maximum(share + _SOFT, 1e-9)))


def _smooth(sigmas: Array, prediction: str) -> Array:
    """What changes smoothly along timesteps: the share of noise, or minus the logarithm of `alphas_cumprod`."""
    return sigmas if prediction == FLOW else np.log1p(sigmas**2)


def _from_smooth(values: Array, prediction: str) -> Array:
    values = np.maximum(values, 0)
    return values if prediction == FLOW else np.sqrt(np.expm1(values))
