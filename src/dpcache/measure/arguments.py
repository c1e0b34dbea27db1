"""What the long runs are given, checked before the first of them begins."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dpcache.checks import whole
from dpcache.run.inputs import Input, as_taken, call_arguments


def checked_calls(pipeline: Any, inputs: Sequence[Input], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of one pipeline call per input, as `call_arguments` has them, all of which the pipeline takes.

    Raises:
        CalibrationError: as `call_arguments`.
        TypeError: the pipeline's call has no argument of some name.
    """
    calls = call_arguments(inputs, defaults)
    taken = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return calls
    known = [name for name in taken if name != "self"]
    for number, call in enumerate(calls):
        for name in as_taken(pipeline, call):
            if name not in known:
                close = get_close_matches(name, known)
                remedy = f"did you mean {' or '.join(close)}?" if close else f"it takes {', '.join(known)}."
                raise TypeError(f"input {number}: {type(pipeline).__name__} takes no argument {name!r}: {remedy}")
    return calls


def checked_seed(seed: int) -> int:
    """The seed, if torch's generators take it, and those that are made from it.

    Raises:
        TypeError, ValueError: they do not.
    """
    return whole("seed", seed, -(2**62), 2**62)
