"""One call of a pipeline after another, drawn into files; what the same call has drawn before is kept."""

import json
import time
from pathlib import Path
from typing import Any

from . import terminal
from .following import computed_steps


def draw(
    pipeline: Any,
    inputs: list[Any],
    arguments: dict[str, Any],
    output: Path,
    *,
    seed: int,
    model: str,
    followed: Any,
) -> list[dict[str, Any]]:
    """Draws and writes every input that has no picture yet; what JSON says of each picture.

    Args:
        pipeline: what to call.
        inputs: as `call_arguments` takes them.
        arguments: of every call.
        output: the file; of several pictures, what their names begin with.
        seed: of the first input that brings none.
        model: its name, and
        followed: what it follows, as `dpcache.integrations.folder.origin` takes them.

    Raises:
        KeyboardInterrupt: again, with a message that says how many pictures there are.
    """
    from tqdm.auto import tqdm

    from dpcache.integrations.folder import origin
    from dpcache.run.inputs import call_arguments

    calls = call_arguments(inputs, arguments)
    pipeline.set_progress_bar_config(disable=not terminal.progress(), leave=len(calls) == 1)
    written: list[dict[str, Any]] = []
    bar = tqdm(calls, desc="generate", unit="call", disable=not terminal.progress() or len(calls) == 1)
    try:
        for number, call in enumerate(bar):
            own_seed = call["generator"].initial_seed() if "generator" in call else seed + number
            told = {name: value for name, value in call.items() if name != "generator"}
            mark = origin(model, followed, own_seed, told)
            names = _Names(output, len(calls) > 1, len(written))
            written += names.kept(mark) or _drawn(pipeline, call, own_seed, names, mark)
    except KeyboardInterrupt as interrupt:
        on = ", the same command goes on from there" if written and names.can_hold_notes else ""
        told_count = terminal.counted(len(written), "picture")
        raise KeyboardInterrupt(f"interrupted: {told_count} written{on}.") from interrupt
    return written


class _Names:
    """What the pictures of one call are called."""

    def __init__(self, output: Path, is_numbered: bool, first: int) -> None:
        self.output, self.is_numbered, self.first = output, is_numbered, first

    @property
    def can_hold_notes(self) -> bool:
        return self.output.suffix.lower() == ".png"

    def paths(self, count: int) -> list[Path]:
        if not self.is_numbered and count == 1:
            return [self.output]
        return [self.output.with_stem(f"{self.output.stem}-{self.first + place}") for place in range(count)]

    def kept(self, mark: str) -> list[dict[str, Any]]:
        """What JSON says of the call's pictures, if all of them are there; else nothing."""
        from dpcache.files.pictures import drawn_from

        if not self.can_hold_notes:
            return []
        for first in {self.paths(1)[0], self.paths(2)[0]}:
            note = drawn_from(first, mark)
            if note is None or not isinstance(count := note.get("pictures"), int):
                continue
            notes = [(path, drawn_from(path, mark)) for path in self.paths(count)]
            if all(note is not None and note.get("place") == place for place, (_, note) in enumerate(notes)):
                return [_entry(path, note, kept=True) for path, note in notes if note is not None]
        return []


def _drawn(pipeline: Any, call: dict[str, Any], seed: int, names: _Names, mark: str) -> list[dict[str, Any]]:
    """Draws one call and writes its pictures; what JSON says of them."""
    from dpcache.files.pictures import save_picture
    from dpcache.run.inputs import label, seeded

    start = time.perf_counter()
    pictures = pipeline(**seeded(pipeline, call, seed))[0]
    computed, steps = computed_steps(pipeline), call["num_inference_steps"]
    note = {
        "prompt": label(pipeline, call),
        "seed": seed,
        "origin": mark,
        "pictures": len(pictures),
        "seconds": time.perf_counter() - start,
        "computed_steps": computed,
        # An index that `--ray` writes of the folder has these, too.
        "full_calls": None,
        "num_inference_steps": steps,
        "num_key_steps": steps if computed is None else len(computed),
    }
    entries = []
    for place, (path, picture) in enumerate(zip(names.paths(len(pictures)), pictures, strict=True)):
        text = json.dumps({**note, "id": path.stem, "place": place}) if names.can_hold_notes else None
        save_picture(path, picture, text)
        entries.append(_entry(path, note, kept=False))
    return entries


def _entry(path: Path, note: dict[str, Any], *, kept: bool) -> dict[str, Any]:
    return {
        "file": str(path),
        "input": note["prompt"],
        "seed": note["seed"],
        "seconds": note["seconds"],
        "computed_steps": note["computed_steps"],
        "kept": kept,
    }
