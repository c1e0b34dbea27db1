"""Where a sampling loop is: which step, which of the step's denoiser calls.

The scheduler says when a step has ended; the denoiser calls before that are the step's branches. Nothing here changes
what is computed: an observer decides what a call does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from dpcache.errors import CacheStateError

from .boundary import BoundaryTap, Forms

#: More calls than any guidance makes in one step: the loop is not one that can be seen.
_MOST_CALLS = 24


class Branch(NamedTuple):
    """Which of a step's denoiser calls.

    Attributes:
        context: name of the cache context it ran in, if any.
        number: its number among the step's calls of this denoiser in contexts so named.
        denoiser: which of the pipeline's denoisers was called; not 0 only where a pipeline switches between several.
            What one denoiser computed predicts nothing of another, so their calls are branches of their own.
    """

    context: str
    number: int
    denoiser: int = 0


@dataclass
class Call:
    """One denoiser call inside a loop.

    Attributes:
        step: index of the sampling step, 0 the first that the loop takes.
        branch: which of the step's denoiser calls this is.
        shape: of the denoiser's inputs, with dtype and device: a cached value only fits the same.
        forms: what full calls of this loop returned.
        is_starved: what runs beside the denoiser did not run: it cannot be computed.
    """

    step: int
    branch: Branch
    shape: tuple[Any, ...]
    _tap: BoundaryTap
    _forward: Callable[[], Any]
    forms: Forms
    is_starved: bool = False

    def full(self) -> tuple[Any, torch.Tensor]:
        """Runs the denoiser in full; returns its output and the value at the boundary."""
        if self.is_starved:
            raise CacheStateError(
                f"the ControlNet was skipped at step {self.step}, but the denoiser's inputs changed there, so that it "
                'has to be computed: use a schedule with boundary="blocks", which runs the ControlNet at every step.'
            )
        return self._tap.full(self.branch, self._forward, self.forms)

    def predicted(self, value: torch.Tensor) -> Any:
        """Runs only what follows the boundary, on the value given. Comes after a full call of the same branch."""
        return self._tap.predicted(self.branch, self._forward, value, self.forms)


@dataclass(frozen=True)
class Moved:
    """One step of the scheduler, as it was called.

    Attributes:
        received: the model output it was given, after guidance: a tensor, or what a scheduler of its own kind takes.
        before: likewise, the sample it started from.
        after: likewise, the sample it returned.
    """

    received: Any
    before: Any
    after: Any

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """All three, of one shape; None where they are something else.

        A model that learns its variance returns it in further channels, which are left out.
        """
        received, before, after = self.received, self.before, self.after
        if not all(isinstance(value, torch.Tensor) for value in (received, before, after)):
            return None
        if received.ndim > 1 and before.ndim == received.ndim and received.shape[1] == 2 * before.shape[1]:
            received = received[:, : before.shape[1]]
        return (received, before, after) if received.shape == before.shape == after.shape else None


class Observer(Protocol):
    """What watches a loop and decides: follows a schedule, records, ..."""

    def call(self, call: Call) -> Any:
        """A denoiser call; returns what the denoiser should."""

    def located(self, scheduler: Any, size: int, start: int) -> None:
        """The first step is taken, and tells where on the scheduler's grid of this size the loop began."""

    def end_step(self, step: int, moved: Moved) -> None:
        """The scheduler has taken a step. It may be told of one step several times."""

    def restart(self) -> None:
        """What the model is told has changed: nothing that was computed predicts what comes."""

    def will_predict(self, step: int) -> bool:
        """Whether all calls of a step will be predicted, as far as can be told before they come."""

    def end(self) -> None:
        """No further step comes: the last one is taken, or the loop was left."""


class Loop:
    """One sampling loop, from its first denoiser call on.

    Args:
        observer: watches it.
        scheduler: the pipeline's, as the loop begins.
        by_hand: its steps end by `advance`, not by what a scheduler does.

    Attributes:
        step: the step under way.
        is_over: every step of the grid is taken, or the loop was left.
        is_lost: its steps cannot be told apart.
        starved_step: the latest step at which what runs beside the denoiser did not run.
    """

    def __init__(self, observer: Observer, scheduler: Any = None, *, by_hand: bool = False) -> None:
        self.observer, self._by_hand = observer, by_hand
        self._received: Any = None
        self.step = 0
        self.is_over = self.is_lost = False
        self.starved_step: int | None = None
        self._start: int | None = None
        self._size = 0
        self._grid = getattr(scheduler, "timesteps", None)
        self._scheduler: Any = None
        self._stepped = False
        self._calls: Counter[tuple[str, int]] = Counter()
        self._forms = Forms()

    def call(
        self, tap: BoundaryTap, denoiser: int, contexts: list[str], forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A call of this denoiser, in the innermost of these cache contexts."""
        values = (*args, *kwargs.values())
        if self._stepped and not self._is_same_step(values):
            self._next()
        context = contexts[-1] if contexts else ""
        branch = Branch(context, self._calls[context, denoiser], denoiser)
        self._calls[context, denoiser] += 1
        if branch.number == _MOST_CALLS:
            self.is_lost = True
            self.observer.end()
        if self.is_lost:
            return forward(*args, **kwargs)
        shape = signature(values)
        starved = self.starved_step == self.step
        return self.observer.call(
            Call(self.step, branch, shape, tap, lambda: forward(*args, **kwargs), self._forms, starved)
        )

    def skips(self) -> bool:
        """Whether the denoiser calls of the step under way, or about to begin, will all be predicted."""
        return not self.is_lost and self.observer.will_predict(self.step_of_next_call)

    @property
    def step_of_next_call(self) -> int:
        """The step that the next denoiser call belongs to, unless it is one of many views."""
        return self.step + self._stepped

    def _is_same_step(self, values: Any) -> bool:
        """Whether a call after a scheduler's step belongs to the same one: a panorama steps every view by itself."""
        for value in values:
            position = _position(value, self._grid)
            if position is not None:
                return self._start is not None and position - self._start == self.step
        return False

    def stepped(self, scheduler: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A scheduler has taken a step.

        The first one that does is the loop's; others that step beside it (sound next to pictures) only mark time.
        """
        if self.is_lost:
            return
        # What every scheduler of diffusers calls its arguments: step(model_output, timestep, sample, ...).
        given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        if self._scheduler is None:
            self._scheduler = scheduler
        if scheduler is not self._scheduler:
            return
        position = _position_of_step(scheduler, given.get("timestep"))
        if self._start is None:
            grid = scheduler.timesteps
            if position is None:
                places = (grid == given["timestep"]).nonzero()
                position = int(places[0]) if len(places) else 0
            self._start, self._size, self._grid = position, len(grid), grid
            self.observer.located(scheduler, self._size, self._start)
        # Without a position, all that the scheduler does between two denoiser calls is one step.
        self.step = self.step if position is None else max(position - self._start, self.step)
        after = result if isinstance(result, torch.Tensor) else result[0]
        self.observer.end_step(self.step, Moved(given.get("model_output"), given.get("sample"), after))
        self._stepped = True
        if self.step + 1 >= self._size - self._start:
            self._finish()

    def received(self, output: torch.Tensor) -> None:
        """What the sampler is given at this step, of a loop whose steps no scheduler takes."""
        self._received = output

    def advance(self) -> None:
        """The next denoiser call belongs to the next step, of a loop whose steps no scheduler takes."""
        if self._stepped:
            self._next()
        else:
            self.observer.end_step(self.step, Moved(self._received, None, None))
        self._received, self._stepped = None, True

    def restart(self) -> None:
        """See `Observer.restart`."""
        self.observer.restart()

    def close(self) -> None:
        """The loop is left, at whatever step."""
        if self._by_hand and not self._stepped and not self.is_over:
            self.advance()
        self._finish()

    def _next(self) -> None:
        self.step += 1
        self._stepped = False
        self._calls.clear()

    def _finish(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.observer.end()


def _position_of_step(scheduler: Any, timestep: Any) -> int | None:
    """Where on its grid a scheduler has just stepped from; without waiting for a device, None if it does not tell."""
    # Schedulers that count their steps say so; else a loop over the grid takes its elements, seldom copies of them.
    counted = getattr(scheduler, "step_index", None)
    return counted - 1 if counted else _position(timestep, scheduler.timesteps)


def _position(timestep: Any, grid: Any) -> int | None:
    """Where in the grid a timestep is that shares its memory; None if it does not."""
    if not isinstance(timestep, torch.Tensor) or timestep.ndim or not isinstance(grid, torch.Tensor):
        return None
    if not grid.stride(0):
        return None
    if timestep.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr() or timestep.dtype != grid.dtype:
        return None
    position = (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)
    return position if 0 <= position < len(grid) else None


def signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """What a denoiser's inputs have in common with those that a cached value fits.

    Shapes of all, for a value may have the length of the text in it; the dtype of the first alone, which is what is
    denoised: that of a timestep changes in HunyuanVideo from step 0 to 1, without any effect.
    """
    found = list(_tensors(values))
    return (*(tuple(tensor.shape) for tensor in found), *((found[0].dtype, found[0].device) if found else ()))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among the values and in lists of them.

    Not in dicts: pipelines keep things there that come and go without any effect on what is computed.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
