"""Whose call is it? One call of one pipeline, from entered to left, is a scope; nothing outside it is touched.

A scope is open in one thread or task (a context variable holds it). Hooks and taps carry the key of the entry that put
them there, and do nothing unless the open scope has the same key. So a twin that shares the scheduler, a pipeline run
in a callback, a bare call of the transformer or another thread are none of this scope's business.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import Loop


class Told:
    """Warns, each text once; or once of a kind, where the text has figures in it that change."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, text: str, kind: str = "") -> None:
        if (kind or text) not in self._known:
            self._known.add(kind or text)
            warnings.warn(text, stacklevel=4)


class Scope:
    """One call that is being followed.

    Args:
        key: of the entry it belongs to.
        begin: makes the loop, when its first denoiser call comes.
        before_call: is told of every denoiser call first: its denoiser's number and its arguments.

    Attributes:
        loop: the sampling loop under way, or the last one; None before the first.
        fresh: the next denoiser call begins another loop.
        calls: denoiser calls so far.
        steps: scheduler steps so far.
        contexts: names of the cache contexts that are open, the innermost last.
        outside: denoiser calls that came after a loop's last step, and belong to no loop.
    """

    def __init__(
        self, key: object, begin: "Callable[[], Loop]", before_call: "Callable[[int, Any, Any], None] | None" = None
    ) -> None:
        self.key, self._begin, self._before_call = key, begin, before_call
        self.loop: Loop | None = None
        self.fresh = False
        self.calls = self.steps = self.outside = 0
        self.contexts: list[str] = []
        self._on_close: list[Callable[[], object]] = []

    def loop_for_call(self, denoiser: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Loop | None":
        """The loop that a denoiser call belongs to, begun if need be; None if it belongs to none."""
        self.calls += 1
        if self._before_call is not None:
            self._before_call(denoiser, args, kwargs)
        if self.loop is None or self.fresh:
            if self.loop is not None:
                self.loop.close()
            self.fresh = False
            self.loop = self._begin()
        if self.loop.is_over:
            self.outside += 1
            return None
        return self.loop

    def on_close(self, undo: Callable[[], object]) -> None:
        """Has something undone when the scope closes."""
        self._on_close.append(undo)

    def close(self) -> None:
        """Ends the call: no value is held afterwards, and no pipeline."""
        if self.loop is not None:
            self.loop.close()
        self._begin = _no_loop
        while self._on_close:
            self._on_close.pop()()


def _no_loop() -> "Loop":
    raise RuntimeError("the call is over: no loop begins in it.")


class _Outside:
    """Stands where code runs that belongs to no scope: a user's callback."""


_OUTSIDE = _Outside()
_open: ContextVar[Scope | _Outside | None] = ContextVar("dpcache_scope", default=None)


def current(key: object) -> Scope | None:
    """The open scope, if it has this key."""
    scope = _open.get()
    return scope if isinstance(scope, Scope) and scope.key is key else None


def is_any_open() -> bool:
    """Whether this thread or task is inside a followed call, callbacks included."""
    return _open.get() is not None


@contextmanager
def opened(scope: Scope) -> Iterator[Scope]:
    """Opens a scope for the body; does not close it, for a generator's body comes in pieces."""
    token = _open.set(scope)
    try:
        yield scope
    finally:
        _open.reset(token)


@contextmanager
def outside() -> Iterator[None]:
    """Runs the body as if no scope were open."""
    token = _open.set(_OUTSIDE)
    try:
        yield
    finally:
        _open.reset(token)


def around_callbacks(pipeline: Any, key: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a pipeline's call, with the user's callbacks kept out of the scope."""
    if any(inspect.isroutine(value) for value in args):
        names = list(inspect.signature(type(pipeline).__call__).parameters)[1:]
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    around = {
        name: around_callback(value, key) for name, value in kwargs.items() if "callback" in name and callable(value)
    }
    return args, {**kwargs, **around}


def around_callback(callback: Callable[..., Any], key: object) -> Any:
    """A callback of the user's that runs outside the scope; it stays an instance of its own class.

    Where it replaces what the model is told (prompt embeddings, masks: anything but the latents), the loop restarts.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, dict)), {})
        before = {name: (value, _version(value)) for name, value in given.items() if name != "latents"}
        scope = current(key)
        with outside():
            result = callback(*args, **kwargs)
        after = result if isinstance(result, dict) else given
        if scope is not None and scope.loop is not None and _has_changed(before, after):
            scope.loop.restart()
        return result

    kind = type(callback)
    if not hasattr(callback, "__dict__") or kind.__module__ == "builtins" or not _is_derivable(kind):
        return call
    # diffusers asks for callbacks of its own class, which say which tensors they want.
    methods = {"__call__": lambda self, *args, **more: call(*args, **more)}
    followed: Any = object.__new__(type(kind.__name__, (kind,), methods))
    followed.__dict__ = callback.__dict__
    return followed


def _is_derivable(kind: Any) -> bool:
    is_base = bool(kind.__flags__ & (1 << 10))  # Py_TPFLAGS_BASETYPE
    return is_base and kind.__new__ is object.__new__


def _has_changed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    for name, (value, version) in before.items():
        now = after.get(name, value)
        if now is not value or _version(now) != version:
            return True
    return False


def _version(value: Any) -> int:
    """Counts changes in place, where torch does."""
    version = getattr(value, "_version", 0) if not getattr(value, "is_inference", bool)() else 0
    return int(version)
