"""Ears on schedulers: they tell the open scope when a grid is set and when a step is taken."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import scope as scopes
from .hooks import is_heard, listen


class Ears:
    """Listens to schedulers for the scopes of one key.

    Args:
        key: of the entry (see `dpcache.run.scope`).
    """

    def __init__(self, key: object) -> None:
        self._key = key
        self._kept: list[tuple[Any, Callable[[], None]]] = []

    def settle(self, scheduler: Any, *, alone: bool) -> None:
        """Listens to this scheduler from now on; to no other, if it is to be alone."""
        if alone:
            self.leave(but=scheduler)
        if not self._hears(scheduler):
            self._kept += [(scheduler, leave) for leave in self._listen(scheduler)]

    def leave(self, but: Any = None) -> None:
        """Listens to no scheduler any more, but for this one."""
        for scheduler, leave in self._kept:
            if scheduler is not but:
                leave()
        self._kept = [kept for kept in self._kept if kept[0] is but]

    def turn_to(self, scheduler: Any) -> None:
        """Inside a call, a scheduler that the pipeline has got is listened to until the call ends."""
        scope = scopes.current(self._key)
        if scope is not None and hasattr(scheduler, "step") and not self._hears(scheduler):
            for leave in self._listen(scheduler):
                scope.on_close(leave)

    def _hears(self, scheduler: Any) -> bool:
        return is_heard(scheduler, "step", _Step(self._key))

    def _listen(self, scheduler: Any) -> list[Callable[[], None]]:
        copied = partial(_copied, self._key)
        return [
            listen(scheduler, "set_timesteps", _Grid(self._key), copied),
            listen(scheduler, "step", _Step(self._key), copied),
        ]


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
