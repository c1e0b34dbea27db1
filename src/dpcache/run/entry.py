"""How a pipeline is entered: its own instance gets a class whose `__call__` opens a scope, and hooks that heed it.

Nothing is patched on a class, and nothing is kept anywhere but on the instance: a pipeline that is deleted takes its
entry along, and the entry takes its hooks off whatever lives on.
"""

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from dpcache.errors import DPCacheError, UnsupportedPipelineError
from dpcache.plan.schedule import Boundary

from . import scope as scopes
from .caches import other_cache, replaced_forward
from .denoisers import find_denoisers
from .hooks import is_heard, listen, lock_of
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
        self._heard: list[tuple[Any, Callable[[], None]]] = []
        self.is_closed = False
        try:
            find_denoisers(pipeline)
            self._owner = weakref.ref(pipeline)
            self._settle(pipeline)
            kind = _followed(type(pipeline))
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
            self._unhear(None)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way, in whatever thread."""
        return self._open > 0

    def hear_new_scheduler(self, pipeline: Any) -> None:
        """The pipeline got another scheduler: inside a call it is listened to at once, until the call ends."""
        scope = scopes.current(self.key)
        if scope is not None and hasattr(pipeline.scheduler, "step") and not self._is_heard(pipeline.scheduler):
            for leave in self._hear(pipeline.scheduler):
                scope.on_close(leave)

    def leave(self, pipeline: Any) -> None:
        """Makes a pipeline what it was: a shallow copy alone, or the one that was entered with all its copies."""
        del vars(pipeline)[ENTRY]
        pipeline.__class__ = type(pipeline).__base__
        if self._owner() in (pipeline, None):
            self.close()

    # ---------------------------------------------------------------------------------------------------- one call

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
        args, kwargs = self._with_callbacks(pipeline, args, kwargs)
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
            if not (inspect.isgenerator(result) or inspect.isawaitable(result)):
                self._end(scope)

    def _begin(self, pipeline: Any, scope: Scope) -> Loop:
        """A sampling loop begins, with the scheduler that the pipeline has by now."""
        self.hear_new_scheduler(pipeline)
        return Loop(self.watcher.begin(pipeline, self.tell), pipeline.scheduler)

    def _end(self, scope: Scope) -> None:
        scope.close()
        with self._lock:
            self._open -= 1

    def _resumed(self, pipeline: Any, scope: Scope, generator: Any) -> Any:
        """A pipeline that yields as it goes: followed whenever it runs, ended when it is dropped."""
        resume, value = generator.send, None
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
            self._end(scope)

    async def _awaited(self, pipeline: Any, scope: Scope, result: Any) -> Any:
        try:
            with scopes.opened(scope):
                found = await result
            self._judge(pipeline, scope)
            return found
        finally:
            self._end(scope)

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

    def _with_callbacks(self, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a call, with the user's callbacks kept out of the scope."""
        if any(inspect.isroutine(value) for value in args):
            bound = inspect.signature(type(pipeline).__call__).bind(pipeline, *args, **kwargs)
            args, kwargs = (), {**bound.kwargs, **dict(list(bound.arguments.items())[1:])}
        around = {
            name: scopes.around_callback(value, self.key)
            for name, value in kwargs.items()
            if "callback" in name and callable(value)
        }
        return args, {**kwargs, **around}

    # ---------------------------------------------------------------------------------------------- hooks and taps

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
            self._unhear(pipeline.scheduler)
        if not self._is_heard(pipeline.scheduler):
            self._heard += [(pipeline.scheduler, leave) for leave in self._hear(pipeline.scheduler)]

    def _is_heard(self, scheduler: Any) -> bool:
        return is_heard(scheduler, "step", _Step(self.key))

    def _hear(self, scheduler: Any) -> list[Callable[[], None]]:
        copied = partial(_copied, self.key)
        return [
            listen(scheduler, "set_timesteps", _Grid(self.key), copied),
            listen(scheduler, "step", _Step(self.key), copied),
        ]

    def _unhear(self, kept: Any) -> None:
        for scheduler, leave in self._heard:
            if scheduler is not kept:
                leave()
        self._heard = [heard for heard in self._heard if heard[0] is kept]


@dataclass(frozen=True)
class _Grid:
    """Hears a scheduler's `set_timesteps`: the next denoiser call begins another loop."""

    key: object

    def __call__(self, scheduler: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        if (scope := scopes.current(self.key)) is not None:
            scope.fresh = True
        return result


@dataclass(frozen=True)
class _Step:
    """Hears a scheduler's `step`."""

    key: object

    def __call__(self, scheduler: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        if (scope := scopes.current(self.key)) is not None:
            scope.steps += 1
            if scope.loop is not None:
                scope.loop.stepped(scheduler, result, args, kwargs)
        return result


def _copied(key: object, leave: Callable[[], None]) -> bool:
    """A scheduler that is copied inside a call is listened to as well, until the call ends."""
    scope = scopes.current(key)
    if scope is not None:
        scope.on_close(leave)
    return scope is not None


def _made(kind: type) -> Any:
    return object.__new__(kind)


def _followed(kind: Any) -> type:
    """A class like this one whose instances are called through their entry."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry: Entry | None = vars(self).get(ENTRY)
        plain = partial(kind.__call__, self)
        return plain(*args, **kwargs) if entry is None else entry.call(self, plain, args, kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        kind.__setattr__(self, name, value)
        entry: Entry | None = vars(self).get(ENTRY)
        if name == "scheduler" and entry is not None:
            entry.hear_new_scheduler(self)

    def shallow_copy(self: Any) -> Any:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def reduced(self: Any, protocol: Any) -> Any:
        """Pickled or copied deeply, it is a pipeline like any other."""
        _, _, state, *rest = kind.__reduce_ex__(self, protocol)
        return _made, (kind,), {name: value for name, value in state.items() if name != ENTRY}, *rest

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {
        "__call__": call,
        "__setattr__": set_attribute,
        "__copy__": shallow_copy,
        "__reduce_ex__": reduced,
    }
    derived: type = type(kind)(kind.__name__, (kind,), {**names, **methods})
    return derived


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
