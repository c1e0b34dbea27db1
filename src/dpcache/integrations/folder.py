"""A folder of pictures that many workers write into, and its index: what is there, whole, and drawn as asked."""

import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpcache.errors import GenerationError
from dpcache.files.journal import digest
from dpcache.files.pictures import Picture, drawn_from, is_whole, read_note, save_picture
from dpcache.files.whole import write_whole
from dpcache.plan.schedule import Schedule

INDEX = "index.parquet"
_SCRATCH = ".run-"
#: Scratch space that nobody has written to for so many seconds belongs to a run that was killed.
_STALE = 24 * 3600.0


@dataclass(frozen=True)
class Job:
    """One picture to draw, with all that it depends on.

    Attributes:
        id: names its file.
        prompt: for people.
        seed: of its noise.
        arguments: of the pipeline's call.
        origin: digest of seed, arguments, schedule and model: what was drawn from others is another picture.
    """

    id: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any]
    origin: str


def origin(model: str, followed: Any, seed: int, arguments: Mapping[str, Any]) -> str:
    """A digest of all that a picture depends on.

    Args:
        model: its name.
        followed: what tells one schedule or plan from another (see `told_apart`); None where it is drawn in full.
        seed: of its noise.
        arguments: of the pipeline's call.
    """
    return digest([digest([model, followed]), seed, arguments])


def told_apart(schedule: Schedule | None) -> Any:
    """What of a schedule a picture depends on."""
    told = {"num_inference_steps", "boundary", "predictions", "corrections"}
    return None if schedule is None else schedule.model_dump(mode="json", include=told)


@dataclass(frozen=True)
class Result:
    """What became of one prompt: a row of the index.

    Attributes:
        id: of the prompt.
        prompt: the text; of a model without, the arguments of the call.
        seed: of its noise.
        file: its picture, in the folder; None where there is none.
        seconds: that the pipeline's call took; where several prompts shared it, its share.
        full_calls: denoiser calls that were computed in full; None without a schedule.
        num_inference_steps: T, as it was run.
        num_key_steps: K, as it was run: steps computed in full.
        error: why there is no picture.
    """

    id: str
    prompt: str
    seed: int
    file: str | None = None
    seconds: float | None = None
    full_calls: int | None = None
    num_inference_steps: int | None = None
    num_key_steps: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Try:
    """One try to draw a picture.

    Attributes:
        machine: where.
        process: the worker's.
        error: how it ended; a worker that dies says nothing.
    """

    machine: str
    process: int
    error: str = "its worker died: out of memory?"


#: The index: columns of a Result, and what Arrow calls their types.
_COLUMNS = {
    "id": "string",
    "prompt": "string",
    "seed": "int64",
    "file": "string",
    "seconds": "float64",
    "full_calls": "int64",
    "num_inference_steps": "int64",
    "num_key_steps": "int64",
    "error": "string",
}


@dataclass(frozen=True)
class Folder:
    """Where the pictures go.

    Attributes:
        path: absolute; on a file system that all machines share.
        run: names this run's scratch space in it: pictures being written, and which ones were begun how often.
    """

    path: Path
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def scratch(self) -> Path:
        return self.path / f"{_SCRATCH}{self.run}"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the folder, with scratch space that goes on leaving."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(f"{_SCRATCH}*"):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left)
        self.scratch.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def file(self, job: Job) -> Path:
        return self.path / f"{job.id}.png"

    def found(self, job: Job) -> Result | None:
        """The job's picture, if it is there and whole.

        Raises:
            GenerationError: there is another picture in its place.
        """
        path = self.file(job)
        if not is_whole(path):
            return None
        note = drawn_from(path, job.origin)
        if note is None:
            raise GenerationError(
                f"{path} was not drawn from this prompt with this seed, these settings, this schedule and this model: "
                "choose another folder, or delete what is there."
            )
        return _result(path, note)

    def save(self, job: Job, picture: Picture, facts: Mapping[str, Any]) -> None:
        """Writes the picture with a note of what it was drawn from; it is in its place whole or not at all."""
        note = {**asdict(job), **facts}
        part = self.scratch / f"{job.id}.png"
        save_picture(part, picture, json.dumps(note))
        part.replace(self.file(job))

    def begin(self, job: Job) -> None:
        """Notes that this process tries to draw it: what is noted outlives the process."""
        self._log(job, {"machine": platform.node(), "process": os.getpid()})

    def fail(self, job: Job, error: str) -> None:
        """Notes how the latest try ended."""
        self._log(job, {"error": error})

    def tries(self, job: Job) -> list["Try"]:
        """How often drawing it was tried in this run."""
        path = self._log_of(job)
        entries = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
        found: list[Try] = []
        for entry in entries:
            found = [*found[:-1], replace(found[-1], **entry)] if "error" in entry else [*found, Try(**entry)]
        return found

    def _log(self, job: Job, entry: Mapping[str, Any]) -> None:
        with self._log_of(job).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _log_of(self, job: Job) -> Path:
        return self.scratch / f"{job.id}.tries"

    def results(self, jobs: Sequence[Job], errors: Mapping[str, str]) -> list[Result]:
        """What became of each job."""
        return [
            self.found(job) or Result(job.id, job.prompt, job.seed, error=errors.get(job.id, "not drawn yet"))
            for job in jobs
        ]

    def write_index(self, results: Sequence[Result]) -> Path:
        """Writes `index.parquet`: the results, then all other pictures of dpcache's in the folder, by name."""
        import pyarrow
        from pyarrow import parquet

        known = {result.id for result in results}
        others = sorted(path for path in self.path.glob("*.png") if path.stem not in known and is_whole(path))
        notes = ((path, _note(path)) for path in others)
        rows = [*results, *(_result(path, note) for path, note in notes if note is not None)]
        schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in _COLUMNS.items()])
        table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema)
        return write_whole(self.path / INDEX, lambda part: parquet.write_table(table, part))


def _note(path: Path) -> dict[str, Any] | None:
    note = read_note(path)
    return None if note is None else json.loads(note)


def _result(path: Path, note: Mapping[str, Any]) -> Result:
    return Result(file=path.name, **{name: note[name] for name in _COLUMNS if name not in ("file", "error")})
