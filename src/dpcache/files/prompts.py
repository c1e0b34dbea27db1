"""Prompts for many pictures: read from a file, checked before anything is drawn, each with a name and a seed."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpcache.errors import PromptError

#: A file that ends so has one JSON object in every line; any other one prompt in every line.
JSON_LINES = (".jsonl", ".ndjson")

#: An id is the name of a file.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
#: What a call gets from dpcache, or would make several pictures of.
_RESERVED = ("generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Request:
    """One picture, or clip, to draw.

    Attributes:
        id: names the file it is written to.
        seed: of its noise.
        arguments: of the pipeline's call, the prompt among them; only what JSON can hold.
    """

    id: str
    seed: int
    arguments: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The prompt; of a model without, the arguments."""
        prompt = self.arguments.get("prompt")
        return json.dumps(self.arguments) if prompt is None else str(prompt)


def read_requests(path: Path, *, seed: int = 0) -> list[Request]:
    """The requests in a file: in JSON lines, or plain text with one prompt in every line. Empty lines are passed over.

    A JSON line has a `prompt`, or whatever the pipeline is called with instead; it may have an `id`, a `seed`, and
    further arguments of the call. A prompt without an id is named by its number in the file, from 000000, and has the
    seed `seed` + number; one with an id has a seed made from `seed` and the id, so that it stays when lines are moved.

    Raises:
        FileNotFoundError: there is no such file.
        PromptError: some line cannot be used; says which and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not a text file in UTF-8 ({error}).") from error
    lines = ((f"{path}, line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _requests(lines, _from_json if path.suffix in JSON_LINES else _from_text, seed, str(path))


def as_requests(prompts: Sequence[str | Mapping[str, Any]], *, seed: int = 0) -> list[Request]:
    """Requests from prompts, or from dicts of what a JSON line may have: see `read_requests`.

    Raises:
        PromptError: some prompt cannot be used; says which, counted from 0, and why.
    """
    if isinstance(prompts, str | Mapping):
        raise PromptError(f"prompts must be a list, got one {type(prompts).__name__}: wrap it in [ ].")
    items = ((f"prompt {number}", item) for number, item in enumerate(prompts))
    return _requests(items, _from_text, seed, "the list of prompts")


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        raise PromptError(f"not JSON ({error}).") from error


def _from_text(item: Any) -> Any:
    return {"prompt": item} if isinstance(item, str) else item


def _requests(items: Iterable[tuple[str, Any]], read: Callable[[Any], Any], seed: int, source: str) -> list[Request]:
    found: list[Request] = []
    places: dict[str, str] = {}
    faults = []
    for number, (where, item) in enumerate(items):
        try:
            request = _request(read(item), number, seed)
            if request.id in places:
                raise PromptError(f"its id {request.id!r} is that of {places[request.id]} already: ids name files.")
        except PromptError as error:
            faults.append(f"{where}: {error}")
            continue
        places[request.id] = where
        found.append(request)
    if faults:
        more = f" ({len(faults) - 1} more cannot be used; the next is {faults[1].split(': ')[0]})" if faults[1:] else ""
        raise PromptError(f"{faults[0]}{more}")
    if not found:
        raise PromptError(f"{source} has no prompts.")
    return found


def _request(item: Any, number: int, seed: int) -> Request:
    if not isinstance(item, Mapping):
        raise PromptError('not an object: write {"prompt": "..."}.')
    arguments = dict(item)
    name, own_seed = arguments.pop("id", None), arguments.pop("seed", None)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise PromptError(f"its id {name!r} is neither a string nor a number.")
    named = name is not None
    name = str(name) if named else f"{number:06d}"
    if not _ID.fullmatch(name):
        raise PromptError(f"its id {name!r} cannot name a file: use letters, digits, dots, dashes and underscores.")
    if own_seed is None:
        own_seed = _derived(seed, name) if named else seed + number
    elif isinstance(own_seed, bool) or not isinstance(own_seed, int) or not 0 <= own_seed < 2**63:
        raise PromptError(f"its seed {own_seed!r} is not a whole number from 0.")
    if not arguments:
        raise PromptError('it has no "prompt".')
    if not isinstance(arguments.get("prompt", ""), str):
        raise PromptError("its prompt is not a string: give every picture a line of its own.")
    check_arguments(arguments)
    return Request(name, own_seed, arguments)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises PromptError where arguments of a call are among those that dpcache sets, or no JSON."""
    for reserved in _RESERVED:
        if reserved in arguments:
            raise PromptError(f"{reserved} cannot be given: every picture has a line, a seed and a file of its own.")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"its arguments are more than JSON can hold ({error}).") from error


def _derived(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6])
