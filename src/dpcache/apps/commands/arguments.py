"""What is typed -> inputs, a pipeline, and the arguments of its calls, each checked as early as it can be."""

import ast
import inspect
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from . import terminal
from .loading import Loading

#: The id of a repository of the hub; other names with slashes are folders.
_HUB_ID = r"\w[\w.-]*/[\w.-]+"
#: Arguments of a call that --set must not touch, and what does that instead.
_TAKEN = {
    "prompt": "give prompts as they are, or in a file with --prompts",
    "class_labels": "give classes as they are, or in a file with --prompts",
    "num_inference_steps": "use --steps",
    "generator": "use --seed",
    "output_type": "the command chooses it",
    "return_dict": "the command chooses it",
    "image": "use --image",
    "strength": "use --strength",
}


def read_inputs(
    model: str,
    prompts: Sequence[str] | None,
    file: Path | None,
    *,
    held_out: bool,
    count: int,
    seed: int | None = None,
) -> list[Any]:
    """Prompts from the command line and a file; without any, the first `count` of the bundled model's own.

    Given a seed, lines of JSON bring their own noise; else all noise comes from the command's seed.

    Raises:
        PromptError: a line of JSON cannot be used.
        typer.BadParameter: there are none.
        OSError: the file cannot be read.
    """
    from dpcache.files.prompts import JSON_LINES, read_requests
    from dpcache.zoo import BUNDLED

    given: list[Any] = list(prompts or [])
    if file is not None and file.suffix in JSON_LINES:
        from dpcache.run.inputs import noise_of

        requests = read_requests(file, seed=seed or 0)
        given += [{**r.arguments, **({} if seed is None else noise_of(r.seed))} for r in requests]
    elif file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise typer.BadParameter(f"{file} is not text in UTF-8.") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise typer.BadParameter(
                f"{'standard input' if str(file) == '-' else file} holds no prompts, one per line."
            )
        given += lines
    if given:
        return given
    if model not in BUNDLED:
        check_name(model)
        raise typer.BadParameter("give prompts, or a file of them with --prompts: only bundled models bring their own.")
    bundled = BUNDLED[model]
    return list(bundled.held_out_inputs(count) if held_out else bundled.calibration_inputs(count))


def read_settings(model: str, settings: Sequence[str] | None, loading: Loading) -> dict[str, Any]:
    """Arguments of the pipeline's call: a bundled model's own, a picture to begin with, then those of --set.

    Raises:
        typer.BadParameter: one is not NAME=VALUE, or is not for --set; or there is something about the picture.
        OSError: the picture cannot be read.
    """
    from dpcache.zoo import BUNDLED

    arguments = dict(BUNDLED[model].call_defaults) if model in BUNDLED else {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{setting!r} is not NAME=VALUE, for example --set guidance_scale=3.5.")
        if name in _TAKEN:
            raise typer.BadParameter(f"{name} cannot be given with --set: {_TAKEN[name]}.")
        arguments[name] = _value(text)
    return arguments | loading.call_arguments()


def load(model: str, inputs: Sequence[Any], arguments: Mapping[str, Any], loading: Loading) -> tuple[Any, list[Any]]:
    """The pipeline, and the inputs as it takes them.

    Raises:
        UnknownModelError: there is no such model.
        typer.BadParameter: it cannot be loaded that way, or its call does not take one of the arguments, or an input.
        FileNotFoundError, HubError: there is no such LoRA.
    """
    from dpcache.zoo import BUNDLED

    check_name(model)
    loading.check()
    if model in BUNDLED:
        settle_small_model()
    elif not terminal.progress():
        _no_loading_bars()
    terminal.note(f"loading {model}")
    pipeline = loading.pipeline(model)
    terminal.listen()
    _check_arguments(pipeline, arguments, hidden=_TAKEN)
    _check_arguments(pipeline, {name for item in inputs if isinstance(item, Mapping) for name in item})
    return pipeline, _as_taken(pipeline, inputs)


def settle_small_model() -> None:
    """For a bundled model: no progress bars while loading, and one thread.

    Its layers are so small that a second core gains nothing, and on a busy machine two threads that wait for each other
    at every layer can take far longer.
    """
    import torch

    torch.set_num_threads(1)
    _no_loading_bars()


def _no_loading_bars() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def check_name(model: str) -> None:
    """Refuses a name that no model can have, before anything is loaded or asked of a hub."""
    from dpcache.errors import UnknownModelError
    from dpcache.zoo import BUNDLED, no_such

    if model in BUNDLED or Path(model).is_dir() or re.fullmatch(_HUB_ID, model):
        return
    if close := get_close_matches(model, BUNDLED, n=1):
        raise UnknownModelError(
            f"no pipeline named {model!r}: did you mean {close[0]}? Bundled models: {', '.join(BUNDLED)}."
        )
    raise UnknownModelError(no_such(model))


def _value(text: str) -> Any:
    """A number, true, null or a list, in the words of JSON or Python; anything else is a word."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _check_arguments(pipeline: Any, names: Collection[str], hidden: Collection[str] = ()) -> None:
    """Refuses names of arguments that the call does not take; those of `hidden` are not suggested instead."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    possible = sorted(set(taken) - {"self", *hidden})
    for name in sorted(names):
        if name not in taken:
            close = get_close_matches(name, possible)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"it takes {', '.join(possible)}."
            raise typer.BadParameter(f"{type(pipeline).__name__} takes no argument {name!r}: {remedy}")


def _as_taken(pipeline: Any, inputs: Sequence[Any]) -> list[Any]:
    """The inputs; of a pipeline that draws classes, names and numbers as its labels."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in taken or "class_labels" not in taken:
        return list(inputs)
    return [{"class_labels": [_class(pipeline, item)]} if isinstance(item, str) else item for item in inputs]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"


def _class(pipeline: Any, name: str) -> int:
    if name.isdecimal():
        return int(name)
    labels = getattr(pipeline, "labels", None) or {}
    if name in labels:
        return int(labels[name])
    close = get_close_matches(name, labels)
    known = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it knows {_some(labels)}."
    raise typer.BadParameter(f"{type(pipeline).__name__} draws classes, and {name!r} is none: {known}")
