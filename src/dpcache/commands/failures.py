"""Exceptions -> an exit code and one line that names the remedy."""

import traceback
from dataclasses import dataclass
from types import TracebackType

from dpcache.errors import DPCacheError

#: Exit codes.
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130
#: Of a message that was not written for this purpose, so many characters are shown.
_LENGTH = 400
_DEBUG = "Run it again with --debug to see where."


class Interrupted(Exception):
    """Ctrl-C while a command ran; says what is kept, if anything is."""


@dataclass(frozen=True)
class Failure:
    """An exception, as it is told to the user.

    Attributes:
        code: the exit code.
        kind: the name of its class.
        message: one line, with the remedy where there is one.
    """

    code: int
    kind: str
    message: str


def failure(error: BaseException) -> Failure:
    """What to tell of an exception."""
    code, text = _told(error)
    return Failure(code, type(error).__name__, " ".join(text.split()))


def _told(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted."
    if hasattr(error, "format_message"):  # bad usage, as the parser or a command found it
        return BAD_USAGE, _usage(error)
    if isinstance(error, DPCacheError) or (isinstance(error, ValueError) and _is_ours(error.__traceback__)):
        return FAILED, str(error)
    if isinstance(error, OSError):
        # The text of an error of the system begins with its number.
        return FAILED, f"{error.filename}: {error.strerror}." if error.strerror and error.filename else str(error)
    if isinstance(error, ModuleNotFoundError) and not _is_ours(error.__traceback__):
        return FAILED, f"{error.name} is needed here and not installed: pip install {error.name}"
    if isinstance(error, ImportError):
        return FAILED, str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED, (
            f"out of memory: {_short(error)} Try smaller or fewer outputs at a time, for example --set height=512 "
            "--set width=512."
        )
    return FAILED, f"{type(error).__name__}: {_short(error)} {_DEBUG}"


def _usage(error: BaseException) -> str:
    # What a command raises has no parameter, and "Invalid value:" in front of it says nothing.
    plain = getattr(error, "param", None) is None and getattr(error, "param_hint", None) is None
    plain = plain and type(error).__name__ == "BadParameter"
    message = str(getattr(error, "message", "")) if plain else error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    where = f" See `{context.command_path} --help`." if context is not None else ""
    return f"{_ended(message)}{where}"


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the exception was raised by dpcache's own code, and so for people to read."""
    frames = list(traceback.walk_tb(trace))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("dpcache.")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return _ended(text if len(text) <= _LENGTH else f"{text[:_LENGTH]} ...")


def _ended(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!", ")")) else f"{text}."
