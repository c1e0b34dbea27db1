"""Checks of arguments, before anything runs: messages quote the value that was given and say what is allowed."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below `least` or above `most`.
    """
    allowed = f"{least} or more" if most is None else f"from {least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, {allowed}; got {value!r}.") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be {allowed}, got {number}.")
    return number


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> float:
    """The value as a finite float, from `least` (or above it) to `most`.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range, infinite or NaN.
    """
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    found = float(value)
    least_allowed = f"above {least:g}" if above else f"{least:g} or more"
    allowed = least_allowed if most == math.inf else f"from {least:g} to {most:g}"
    if not (least < found if above else least <= found) or not found <= most or math.isinf(found):
        raise ValueError(f"{name} must be {allowed}, got {found:g}.")
    return found


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Nothing, if the value is a known name.

    Raises:
        ValueError: it is not; lists the known ones.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be {listed(known)}, got {value!r}.")


def listed(names: Sequence[str]) -> str:
    """Names in quotes, the last after "or"."""
    quoted = [f'"{name}"' for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def no_more_arguments(function: Callable[..., Any], unknown: Mapping[str, Any], recipe: Sequence[str] = ()) -> None:
    """Nothing, if there are no arguments left over.

    Args:
        function: what was called.
        unknown: keyword arguments that it does not have.
        recipe: names of fields of a `Recipe`, for functions that take one.

    Raises:
        TypeError: there are some; names the known ones.
    """
    if not unknown:
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.name != "self"]
    planning = [name for name in unknown if name in recipe]
    remedy = f"it takes {', '.join(known)}."
    if planning:
        fields = ", ".join(f"{name}={unknown[name]!r}" for name in planning)
        remedy = f"say how to plan with recipe=dpcache.Recipe({fields})."
    raise TypeError(f"{function.__name__}() has no argument {', '.join(unknown)}: {remedy}")
