"""The class that an entered pipeline's instance is of: like its own, but called through its entry."""

import functools
from functools import partial
from typing import Any

from .placement import ENTRY


def _made(kind: type) -> Any:
    return object.__new__(kind)


def followed(kind: Any) -> type:
    """A class like this one whose instances are called through their entry."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry: Any = vars(self).get(ENTRY)
        plain = partial(kind.__call__, self)
        return plain(*args, **kwargs) if entry is None else entry.call(self, plain, args, kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        kind.__setattr__(self, name, value)
        entry: Any = vars(self).get(ENTRY)
        if name == "scheduler" and entry is not None:
            entry.ears.turn_to(self.scheduler)

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
