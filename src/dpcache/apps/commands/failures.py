"""Exceptions -> an exit code and one line that names the remedy."""

import errno
import itertools
import re
import sys
import traceback
from dataclasses import dataclass
from types import TracebackType

from dpcache.errors import DPCacheError

#: Exit codes.
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130
#: So many characters of a message are shown: some libraries append their documentation.
_LENGTH = 700
#: What the library advises to call -> the commands that do it.
_COMMANDS = (
    (re.compile(r"do without: dpcache\.enable\(pipe, num_key_steps=(\d+)\)"), r"do without: -k \1"),
    (re.compile(r"pass scheduler=pipe\.scheduler, on which \S+ has been called"), "calibrate with these --steps"),
    (re.compile(r"\bdpcache\.calibrate\(pipe, inputs\)"), "`dpcache calibrate`"),
)
#: Other calls are left as they are.
_CALL = re.compile(r"(\bdpcache\.(?!Recipe\b)\w+\([^()]*\))")
#: What the library calls its arguments -> the options that set them.
_OPTIONS = (
    (re.compile(r"\bRecipe\((.*?)\)"), r"\1"),
    (re.compile(r'\b(sensitivity|method|boundary)="(\w+)"'), r"--\1 \2"),
    (re.compile(r"\b(order|measured)=([\d.]*\d)"), r"--\1 \2"),
    (re.compile(r"\bnum_key_steps\b"), "--key-steps"),
    (re.compile(r"\bnum_inference_steps\b"), "--steps"),
    (re.compile(r"\bmax_error\b"), "--max-error"),
    (re.compile(r"\bspeedup (?=must|and)"), "--speedup "),
    (re.compile(r"\bfirst_key_steps\b"), "--first"),
    (re.compile(r"\blast_key_steps\b"), "--last"),
    (re.compile(r"\bmax_gap\b"), "--max-gap"),
    (re.compile(r"(?<=--first)=|(?<=--last)=|(?<=--max-gap)="), " "),
    (re.compile(r"give one as filename="), "name one behind a slash, like user/repo/FILE"),
    (re.compile(r",? or give token="), ""),
)
_DEBUG = "Run it again with --debug to see where."
#: What to do about an error of the system.
_REMEDIES = {
    errno.ENOENT: "check the name",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EACCES: "choose another place, or ask for the right to it",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room, or choose another place",
}


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
    text = " ".join(text.split())
    return Failure(code, type(error).__name__, text if len(text) <= _LENGTH else f"{text[:_LENGTH]} ...")


def _told(error: BaseException) -> tuple[int, str]:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted."
    if hasattr(error, "format_message"):  # bad usage, as the parser or a command found it
        return BAD_USAGE, _usage(error)
    if isinstance(error, DPCacheError) or (isinstance(error, ValueError) and _is_ours(error.__traceback__)):
        return FAILED, _in_options(str(error))
    if isinstance(error, OSError):
        # The text of an error of the system begins with its number.
        known = [str(part) for part in (error.filename, error.strerror, _REMEDIES.get(error.errno or 0)) if part]
        return FAILED, _ended(": ".join(known)) if error.strerror else _in_options(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_ours(error.__traceback__):
        return FAILED, f"{error.name} is needed here and not installed: pip install {error.name}"
    if isinstance(error, ImportError):
        # A package that is there and does not fit the others is told by what it raised.
        own = f" {type(cause).__name__}: {_ended(str(cause))}" if (cause := error.__cause__) is not None else ""
        return FAILED, _cut(str(error)) + own
    if isinstance(error, MemoryError):
        return FAILED, f"out of memory: {_ended(str(error))}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
        return FAILED, f"Try smaller outputs, for example --set height=512 --set width=512: {_ended(str(error))}"
    given = [f"{name} {text}" for name, text in itertools.pairwise(sys.argv[1:]) if name == "--set"]
    blamed = f"Perhaps the pipeline does not take {' or '.join(given)}. " if given else ""
    return FAILED, f"{type(error).__name__}: {_cut(str(error))} {blamed}{_DEBUG}"


def _in_options(text: str) -> str:
    for call, command in _COMMANDS:
        text = call.sub(command, text)
    parts = _CALL.split(text)
    for argument, option in _OPTIONS:
        parts[::2] = [argument.sub(option, part) for part in parts[::2]]
    return "".join(parts)


def _usage(error: BaseException) -> str:
    # What a command raises has no parameter, and "Invalid value:" in front of it says nothing.
    plain = getattr(error, "param", None) is None and getattr(error, "param_hint", None) is None
    plain = plain and type(error).__name__ == "BadParameter"
    message = str(getattr(error, "message", "")) if plain else error.format_message()  # type: ignore[attr-defined]
    if not message:  # the help was shown instead
        return ""
    message = message.replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    where = f" See `{context.command_path} --help`." if context is not None else ""
    return f"{_ended(message)}{where}"


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the exception was raised by dpcache's own code, and so for people to read."""
    frames = list(traceback.walk_tb(trace))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("dpcache.")


def _cut(text: str) -> str:
    """So short that what follows it is shown as well."""
    text = " ".join(text.split())
    return _ended(text if len(text) <= _LENGTH // 2 else f"{text[: _LENGTH // 2]} ...")


def _ended(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith((".", "?", "!", ")")) else f"{text}."
