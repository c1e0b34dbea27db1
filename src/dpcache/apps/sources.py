"""Where what is named on a command line comes from: a file, a directory, the Hub, or this package."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpcache.files.hub import repository_file
from dpcache.plan.schedule import Schedule

if TYPE_CHECKING:
    from dpcache.measure.calibration import Calibration

BUILTIN = "builtin"


def schedule_from(text: str, model: str | None = None) -> Schedule:
    """The schedule that a text names.

    Args:
        text: a file; a directory with a `schedule.json`; a repository on the Hub, as "user/repo", "user/repo@revision"
            or "user/repo/path/to/file.json"; or one that ships with the package, "builtin:NAME:K", or "builtin:K" for
            the model it is to be used with. What is on disk goes before the Hub.
        model: name of the model it is to be used with, if known: the hub id for "builtin:K".

    Raises:
        FileNotFoundError: no such file, and it can be nothing else.
        HubError, FileFormatError: as `Schedule.from_pretrained`.
        UnknownModelError: there are no built-in schedules for this model.
        ValueError: "builtin" without a number of key steps, or with one there is none for.
    """
    if text == BUILTIN or text.startswith(f"{BUILTIN}:"):
        return _builtin(text, model)
    repository = None if Path(text).exists() else repository_file(text, ".json")
    if repository is not None:
        return Schedule.from_pretrained(**repository)
    return Schedule.from_pretrained(text) if Path(text).is_dir() else Schedule.load(text)


def calibration_from(text: str) -> "Calibration":
    """The calibration that a text names, as `schedule_from`: a file, a directory, or a repository on the Hub.

    Raises:
        FileNotFoundError: no such file, and it can be nothing else.
        HubError, FileFormatError: as `Calibration.from_pretrained`.
    """
    from dpcache.measure.calibration import Calibration

    repository = None if Path(text).exists() else repository_file(text, ".safetensors")
    if repository is not None:
        return Calibration.from_pretrained(**repository)
    return Calibration.from_pretrained(text) if Path(text).is_dir() else Calibration.load(text)


def _builtin(text: str, model: str | None) -> Schedule:
    from dpcache.plan.builtin import builtin_of

    found = re.fullmatch(rf"{BUILTIN}:(?:([\w.-]+):)?(\d+)", text)
    if found is None:
        raise ValueError(f"{text!r} is not builtin:K or builtin:NAME:K, K the number of key steps, like builtin:13.")
    name = found[1]
    if name is None:
        if model is None:
            raise ValueError(f"{text!r} does not say for which model: say builtin:NAME:K, like builtin:flux1-dev:13.")
        name = builtin_of(model)
    return Schedule.builtin(name, num_key_steps=int(found[2]))
