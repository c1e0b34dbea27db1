"""A file of what was measured so far, so that a long search goes on where it was interrupted."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpcache.errors import FileFormatError

FORMAT = "dpcache.journal"
VERSION = 2


class Journal:
    """Remembers results by name; with a path, from one process to the next.

    Args:
        path: a file of JSON lines; None remembers in memory alone.
        about: what the results depend on beside their names, each by what people call it. A file of something else is
            refused.

    Raises:
        FileFormatError: the file is something else.
    """

    def __init__(self, path: "str | os.PathLike[str] | None", about: Mapping[str, Any]) -> None:
        self._path = Path(path) if path is not None else None
        self._known: dict[str, Any] = {}
        marks = {name: digest(value) for name, value in about.items()}
        head = {"format": FORMAT, "version": VERSION, "about": marks}
        if self._path is None:
            return
        if self._path.exists():
            self._read(head)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(head)

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of this name; measured if it is not known yet. Results are what JSON can hold."""
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                self._write(_entry(name, self._known[name]))
        return self._known[name]

    def knows(self, name: str) -> bool:
        """Whether there is a result of this name."""
        return name in self._known

    def _read(self, head: dict[str, Any]) -> None:
        assert self._path is not None
        # The last line may have been cut short by what interrupted the search.
        try:
            *lines, last = self._path.read_text(encoding="utf-8").split("\n")
            found, *entries = (json.loads(line) for line in lines)
            self._known = {entry["name"]: entry["result"] for entry in entries}
            if any(entry != _entry(entry["name"], entry["result"]) for entry in entries):
                raise ValueError("a line was edited")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileFormatError(f"{self._path} is not a checkpoint of dpcache: delete it or name another.") from error
        if found != head:
            raise FileFormatError(
                f"{self._path} belongs to another search, with other {_changed(found, head)}: delete it or name "
                "another."
            )
        if last:
            self._path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _changed(found: Any, head: dict[str, Any]) -> str:
    """What of the head of a journal is not as it should be."""
    known = found.get("about") if isinstance(found, dict) else None
    if not isinstance(known, dict) or {**found, "about": head["about"]} != head:
        return "results, or of another version"
    return " and ".join(name for name, mark in head["about"].items() if known.get(name) != mark) or "parts"


def _entry(name: str, result: Any) -> dict[str, Any]:
    return {"name": name, "result": result, "digest": digest([name, result])}


def digest(value: Any) -> str:
    """A short name for a value: JSON, and arrays, tensors, pictures and generators of random numbers in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_described).encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """What JSON cannot hold, as something it can that tells two of them apart."""
    if hasattr(value, "get_state"):  # torch's generator
        value = value.get_state()
    if hasattr(value, "detach"):  # torch's tensor; its text leaves out most of it
        value = value.detach().cpu().double().numpy()
    if hasattr(value, "tobytes"):  # an array or a picture
        shape = list(getattr(value, "shape", getattr(value, "size", ())))
        return [type(value).__name__, shape, hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)
