"""Loops without a pipeline: `recording` measures one as it runs in full, and gives a calibration."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dpcache.errors import CalibrationError
from dpcache.plan.schedule import Boundary
from dpcache.run.denoisers import identify
from dpcache.run.loop import Call, Moved
from dpcache.run.packing import take_apart
from dpcache.run.plain import PlainLoop, as_modules

from .calibration import Calibration
from .measuring import from_run
from .recording import RecordedRun, Recorder

T = TypeVar("T")


class RecordedLoops:
    """What `recording` yields: what it has seen of the loops in its body."""

    def __init__(self, denoisers: Sequence[nn.Module], boundary: Boundary, sigmas: Any, facts: dict[str, Any]) -> None:
        self._denoisers, self._boundary, self._facts = denoisers, boundary, facts
        self._sigmas = tuple(float(sigma) for sigma in sigmas) if sigmas is not None else None
        self._recorders: list[tuple[_PlainRecorder, list[float]]] = []
        self.loop = PlainLoop(denoisers, boundary, self._begin)

    def steps(self, iterable: Iterable[T]) -> Iterator[T]:
        """Goes through an iterable of the loop's steps, as a progress bar does: each item is one step."""
        return self.loop.steps(iterable)

    def received(self, output: torch.Tensor) -> None:
        """Tells what the sampler is given at this step. Call it where guidance makes one output of several calls."""
        if self.loop.scope.loop is not None:
            self.loop.scope.loop.received(output)

    @property
    def calibration(self) -> Calibration:
        """What was measured, of all loops in the body together; to be asked for after it.

        Raises:
            CalibrationError: the denoiser was not called, a value is NaN or infinite, or the loops differ in steps.
        """
        if not self._recorders:
            raise CalibrationError(
                "the denoiser was not called inside `with dpcache.recording(...)`: nothing is known."
            )
        runs = [recorder.whole_run(self._sigmas, seen) for recorder, seen in self._recorders]
        identity = identify(self._denoisers)
        return Calibration.merged(
            [from_run(run, boundary=self._boundary, model=identity, **self._facts) for run in runs]
        )

    def _begin(self) -> "_PlainRecorder":
        recorder = _PlainRecorder()
        self._recorders.append((recorder, self.loop.timesteps))
        return recorder


class _PlainRecorder(Recorder):
    """Records a loop whose steps no scheduler takes."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[torch.Tensor] = []

    def call(self, call: Call) -> Any:
        output = super().call(call)
        self._outputs += [tensor.detach().to("cpu", torch.float32, copy=True) for tensor in take_apart(output)[0]]
        return output

    def end_step(self, step: int, moved: Moved) -> None:
        super().end_step(step, moved)
        # Not told what became of a step's outputs, take them all for what the sampler is given.
        given = [moved.received.detach().float().cpu()] if moved.received is not None else self._outputs
        self.run.received[step] = torch.cat([tensor.flatten() for tensor in given])
        self._outputs = []

    def whole_run(self, sigmas: tuple[float, ...] | None, seen: Sequence[float]) -> RecordedRun:
        """What was recorded, with how far the sampler moved at every step: by its noise levels, or by its timesteps."""
        run = self.finish()
        steps = run.num_steps
        if sigmas is not None and len(sigmas) != steps + 1:
            raise CalibrationError(
                f"the loop took {steps} steps, but sigmas are {len(sigmas)} noise levels: give {steps + 1}, one for "
                "every step and where the last one ends."
            )
        levels = sigmas or ((*seen, 0.0) if len(seen) == steps else tuple(range(steps, -1, -1)))
        run.sigmas, run.timesteps = sigmas, tuple(seen) if len(seen) == steps else ()
        run.influence = {step: levels[step + 1] - levels[step] for step in range(steps)}
        return run


@contextmanager
def recording(
    denoiser: "nn.Module | Sequence[nn.Module]",
    *,
    sigmas: Sequence[float] | None = None,
    boundary: Boundary = "output",
    order: int = 2,
    prediction: str | None = None,
) -> Iterator[RecordedLoops]:
    """Records loops of one's own, run in full, for a calibration. Which calls are a step is found as in `following`.

    Args:
        denoiser: the transformer or UNet that the loop calls, or several where it switches between them.
        sigmas: the loop's noise levels, T and where the last step ends: how far the sampler moves in a step. Unless
            given, the timesteps that the denoiser is told stand in for them.
        boundary: what to cache and predict (see `dpcache.calibrate`).
        order: order of the Taylor prediction.
        prediction: what the denoiser returns, in the words of diffusers, "epsilon" or "flow_prediction" for example:
            with it and `sigmas` the calibration can plan for other noise levels as well.

    Raises:
        UnsupportedPipelineError: it is no `nn.Module`; the boundary needs blocks that are not known; or another cache
            is at work in it.

    Example:
        ```python
        with dpcache.recording(transformer, sigmas=sigmas) as recorded:
            for sigma, after in pairwise(sigmas):
                x = x + (after - sigma) * transformer(x, timestep=sigma, ...)
        schedule = recorded.calibration.plan(num_key_steps=13)
        ```
    """
    denoisers = as_modules(denoiser)
    facts = {"order": order, "prediction": prediction, "pipeline": "a loop of one's own", "scheduler": "none"}
    recorded = RecordedLoops(denoisers, boundary, sigmas, facts)
    with recorded.loop.opened():
        yield recorded
