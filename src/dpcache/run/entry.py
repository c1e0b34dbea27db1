"""How a pipeline is entered: its own instance gets a class whose `__call__` opens a scope, and hooks that heed it.

Nothing is patched on a class, and nothing is kept anywhere but on the instance: a pipeline that is deleted takes its
entry along, and the entry takes its hooks off whatever lives on.
"""

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn

from dpcache.errors import DPCacheError, UnsupportedPipelineError
from dpcache.plan.schedule import Boundary

from . import scope as scopes
from .caches import other_cache, replaced_forward
from .classes import followed
from .denoisers import find_denoisers
from .ears import Ears
from .hooks import lock_of
from .loop import Loop, Observer
from .placement import ENTRY, Placement
from .scope import Scope, Told


class Watcher(Protocol):
    """What a pipeline is entered for: to follow a schedule, to record, ..."""

    def begin(self, pipeline: Any, tell: Told) -> Observer:
        """The observer of a sampling loop that begins; `tell` warns, each text once."""


class Entry:
    """What stands between the callers of one pipeline and its own `__call__`.

    Args:
        pipeline: made to go through this entry at once, or not at all.
        boundary: where values are read.
        watcher: makes the observer of every sampling loop.
        admit: raises what speaks against following these denoisers; asked again when some are replaced.

    Raises:
        UnsupportedPipelineError: it cannot be followed, or not at this boundary; or another cache is at work in it.
    """

    def __init__(
        self,
        pipeline: Any,
        boundary: Boundary,
        watcher: Watcher,
        admit: Callable[[Sequence[nn.Module]], None] = lambda _: None,
    ) -> None:
        self.key = object()
        self.boundary, self.watcher, self._admit = boundary, watcher, admit
        self.tell = Told()
        self._lock = threading.RLock()
        self._open = 0
        self._placed: list[weakref.ref[Placement]] = []
        self.ears = Ears(self.key)
        self.is_closed = False
        try:
            self._settle(pipeline)
            self._owner = weakref.ref(pipeline)
            kind = followed(type(pipeline))
            vars(pipeline)[ENTRY] = self
            pipeline.__class__ = kind
        except BaseException:
            vars(pipeline).pop(ENTRY, None) if hasattr(pipeline, "__dict__") else None
            self.close()
            raise

    def close(self) -> None:
        """Takes every hook and tap off."""
        with self._lock:
            self.is_closed = True
            for placement in self._placements():
                placement.remove()
            self._placed.clear()
            self.ears.leave()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way, in whatever thread."""
        return self._open > 0

    def leave(self, pipeline: Any) -> None:
        """Makes a pipeline what it was: a shallow copy alone, or the one that was entered with all its copies."""
        del vars(pipeline)[ENTRY]
        pipeline.__class__ = type(pipeline).__base__
        if self._owner() in (pipeline, None):
            self.close()

    def call(self, pipeline: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the pipeline's own `__call__`, followed where that can be."""
        try:
            with self._lock:
                self._settle(pipeline)
                self._open += 1
        except DPCacheError as error:
            self.tell(f"{type(pipeline).__name__} computes every step in full: {error}")
            with nullcontext() if scopes.is_any_open() else scopes.outside():
                return plain(*args, **kwargs)
        scope = Scope(self.key, lambda: self._begin(pipeline, scope))
        args, kwargs = scopes.around_callbacks(pipeline, self.key, args, kwargs)
        result = None
        try:
            # A scheduler counts its own steps, so two calls cannot use it at a time.
            with lock_of(pipeline.scheduler, "step"), scopes.opened(scope):
                result = plain(*args, **kwargs)
            if inspect.isgenerator(result):
                return self._resumed(pipeline, scope, result)
            if inspect.isawaitable(result):
                return self._awaited(pipeline, scope, result)
            self._judge(pipeline, scope)
            return result
        finally:
            # What runs later counts itself again when it starts: it may be dropped before.
            with self._lock:
                self._open -= 1
            if not (inspect.isgenerator(result) or inspect.isawaitable(result)):
                scope.close()

    def _begin(self, pipeline: Any, scope: Scope) -> Loop:
        """A sampling loop begins, with the scheduler that the pipeline has by now."""
        self.ears.turn_to(pipeline.scheduler)
        return Loop(self.watcher.begin(pipeline, self.tell), pipeline.scheduler)

    @contextmanager
    def _running(self, scope: Scope) -> Iterator[None]:
        """Counts a call that runs later than it was made, and ends it."""
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            scope.close()
            with self._lock:
                self._open -= 1

    def _resumed(self, pipeline: Any, scope: Scope, generator: Any) -> Any:
        """A pipeline that yields as it goes: followed whenever it runs, ended when it is dropped."""
        resume, value = generator.send, None
        with self._running(scope):
            try:
                while True:
                    with scopes.opened(scope):
                        try:
                            item = resume(value)
                        except StopIteration as stop:
                            self._judge(pipeline, scope)
                            return stop.value
                    try:
                        resume, value = generator.send, (yield item)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        resume, value = generator.throw, error
            finally:
                with scopes.opened(scope):
                    generator.close()

    async def _awaited(self, pipeline: Any, scope: Scope, result: Any) -> Any:
        with self._running(scope):
            with scopes.opened(scope):
                found = await result
            self._judge(pipeline, scope)
            return found

    def _judge(self, pipeline: Any, scope: Scope) -> None:
        """After a call that returned: says what of it could not be seen."""
        name = type(pipeline).__name__
        remedy = "For a loop of your own use `with dpcache.following(denoiser, schedule):`."
        if not scope.calls:
            self.tell(
                f"{name} returned without calling its denoiser where dpcache could see it, so nothing was skipped: "
                f"does it call a copy, or in another thread? {remedy}"
            )
        elif not scope.steps:
            self.tell(
                f"{name} called its denoiser {scope.calls} times, but `pipe.scheduler` never took a step, so nothing "
                f"was skipped: does the loop step by itself, or with another scheduler? {remedy}"
            )
        elif scope.outside > 1 or (scope.loop is not None and scope.loop.is_lost):
            self.tell(
                f"{name} called its denoiser {scope.outside or scope.calls} times outside of its scheduler's steps: "
                f"these calls were computed in full. {remedy}"
            )

    def _placements(self) -> list[Placement]:
        return [placement for ref in self._placed if (placement := ref()) is not None]

    def _settle(self, pipeline: Any) -> None:
        """Has hooks and taps where the pipeline's parts are now.

        Raises:
            DPCacheError: it cannot be followed as it is now.
        """
        if self.is_closed:
            raise UnsupportedPipelineError("dpcache was disabled on the pipeline that this one is a copy of.")
        denoisers = find_denoisers(pipeline)
        if not callable(pipeline):
            raise UnsupportedPipelineError(
                f"{type(pipeline).__name__} cannot be called, so there is no call to follow. For a loop of your own "
                "use `with dpcache.following(denoiser, schedule):`."
            )
        for denoiser in denoisers:
            if (another := other_cache(pipeline, denoiser)) is not None:
                raise UnsupportedPipelineError(another)
            if (whose := replaced_forward(denoiser)) is not None:
                self.tell(
                    f"{whose} runs in place of the forward of this {type(denoiser).__name__}. If it caches, as "
                    "DeepCache and TeaCache do, take it off: two caches would predict from each other's predictions."
                )
        known = {id(placement.denoiser): placement for placement in self._placements()}
        if not all(id(denoiser) in known for denoiser in denoisers):
            self._admit(denoisers)
        for number, denoiser in enumerate(denoisers):
            placement = known.pop(id(denoiser), None) or Placement(self.key, denoiser, number, self.boundary)
            if not any(ref() is placement for ref in self._placed):
                self._placed.append(weakref.ref(placement))
            placement.place(pipeline)
        if not self._open:  # another thread may be in the middle of a call of a copy, with other parts
            for placement in known.values():
                placement.remove()
            self._placed = [ref for ref in self._placed if ref() not in (None, *known.values())]
        self.ears.settle(pipeline.scheduler, alone=not self._open)


@contextmanager
def entered(pipeline: Any, boundary: Boundary, watcher: Watcher) -> Iterator[Entry]:
    """Has the pipeline's calls watched while the body runs, and leaves it as it was, whatever happens.

    Raises:
        UnsupportedPipelineError: as `Entry`.
    """
    entry = Entry(pipeline, boundary, watcher)
    try:
        yield entry
    finally:
        entry.leave(pipeline)
