"""Many pictures over the machines of a Ray cluster: one pipeline a worker, on a GPU of its own where there are some."""

import importlib.util
import json
import os
import platform
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpcache.errors import GenerationError, missing_extra
from dpcache.files.journal import digest
from dpcache.files.prompts import Request, as_requests, check_arguments, read_requests
from dpcache.integrations.folder import Folder, Job, Result, origin, told_apart
from dpcache.plan.schedule import Schedule
from dpcache.run.inputs import noise_of, seeded

try:
    import pyarrow
    import ray
    import ray.data
except ImportError as error:
    raise missing_extra("drawing on a Ray cluster", error, "dpcache[ray]") from error

del pyarrow

#: Ray takes its time with more tasks than this; each has several calls then.
_MOST_TASKS = 10_000
#: Of a cluster that is started here: only prompts and errors pass through its memory, no pictures.
_OBJECT_STORE_BYTES = 256 * 2**20
#: Seconds that the head of a cluster may take to answer.
_PATIENCE = 10.0
#: So much of an error's first line is kept.
_LENGTH = 300


def generate(
    model: "str | os.PathLike[str] | Callable[[], Any]",
    prompts: "str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]",
    output: "str | os.PathLike[str]",
    *,
    schedule: "Schedule | str | os.PathLike[str] | None" = None,
    num_workers: int | None = None,
    gpus_per_worker: float | None = None,
    batch_size: int = 1,
    seed: int = 0,
    max_retries: int = 3,
    address: str | None = "auto",
    progress: bool = True,
    **arguments: Any,
) -> list[Result]:
    """Draws every prompt on some worker of a Ray cluster, into files `output/<id>.png` and an index of them.

    Goes on where an earlier call was interrupted: pictures that are there and whole are not drawn again. A picture
    depends on its prompt, seed, arguments, schedule and model alone, not on the worker that draws it.

    Every machine needs this release of dpcache, the model, and the folder by the same path.

    Args:
        model: as for `load_pipeline`, or a function that returns a pipeline; each worker loads it once.
        prompts: a file (see `read_requests`), or a list of prompts or of dicts with `prompt`, `id`, `seed` and further
            arguments of the pipeline's call.
        output: the folder. `index.parquet` in it has a row for every picture and for every prompt without one.
        schedule: what to follow; none draws in full.
        num_workers: how many pipelines; by default as many as there are GPUs for, or, without any, one a machine.
        gpus_per_worker: GPUs for each; by default 1 if the cluster has any. Half a GPU is shared by two workers. What
            `load_pipeline` loads uses one at most.
        batch_size: so many prompts share a call if they differ in nothing but the prompt. Their noise stays what it is
            alone, but sums in a larger batch may be rounded in another order.
        seed: prompts that bring no seed get theirs from this and their number or id.
        max_retries: how often a prompt is tried again after an exception or the death of its worker.
        address: of a cluster, `"auto"` for the one that runs here, `"local"` for one that is started on this machine
            and ends with the call, None for whatever `ray.init()` finds. A program that is connected already stays so.
        progress: show a bar.
        **arguments: of every call of the pipeline; what a prompt brings along itself wins.

    Returns:
        what became of each prompt, in their order.

    Raises:
        PromptError: a prompt cannot be used. Nothing is drawn.
        GenerationError: there is no cluster, or it has too few GPUs; the workers cannot load the model or do not see
            the folder; or the folder has pictures drawn from something else.
        ValueError: `batch_size`, `num_workers`, `gpus_per_worker` or `max_retries` is too small.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}.")
    for name, number in (("gpus_per_worker", gpus_per_worker), ("max_retries", max_retries)):
        if number is not None and number < 0:
            raise ValueError(f"{name} must not be negative, got {number}.")
    check_arguments(arguments)
    if isinstance(prompts, str | os.PathLike):
        requests = read_requests(Path(prompts), seed=seed)
    else:
        requests = as_requests(prompts, seed=seed)
    followed = schedule if isinstance(schedule, Schedule | None) else Schedule.load(schedule)
    if not callable(model) and Path(model).is_dir():
        model = Path(model).resolve()
    jobs = _jobs(requests, model, followed, arguments)
    folder = Folder(Path(output).resolve())
    pending = [job for job in jobs if folder.found(job) is None]
    errors: dict[str, str] = {}
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(pending), desc="pictures", disable=not progress)
    with folder.open(), bar:
        try:
            if pending:
                calls = _calls(pending, batch_size)
                with _connected(address):
                    workers, gpus = _resources(num_workers, gpus_per_worker, len(calls), is_local=address == "local")
                    # Prompts that share a call get a try together before those of their own.
                    tries = 1 + max_retries + (batch_size > 1)
                    for outcome in _outcomes(calls, (model, followed, folder, tries), workers, gpus):
                        errors.update(outcome)
                        bar.update(len(outcome))
        finally:
            results = folder.results(jobs, {name: error for name, error in errors.items() if error})
            folder.write_index(results)
    return results


class Worker:
    """One pipeline, in a process of its own that Ray starts, and starts again when it has died.

    Args:
        model: what to load.
        schedule: what to follow.
        folder: where the pictures go.
        tries: how often a prompt is begun before it is given up.
    """

    def __init__(self, model: Any, schedule: Schedule | None, folder: Folder, tries: int) -> None:
        self.folder, self.tries, self.follows = folder, tries, schedule is not None
        self.fault = ""
        where = f"the worker on {platform.node()}"
        if not folder.scratch.is_dir():
            self.fault = f"{where} does not see {folder.path}: name a folder that all machines of the cluster share."
            return
        try:
            self.pipeline = _load(model)
            if schedule is not None:
                from dpcache.run.pipelines import enable

                enable(self.pipeline, schedule)
        except Exception as error:
            self.fault = f"{where} could not set up the model: {_said(error)}"

    def __call__(self, row: Mapping[str, str]) -> dict[str, str]:
        """Draws the prompts of one call; returns for each of them its error, empty where there is a picture."""
        if self.fault:
            return {"fault": self.fault, "errors": "{}"}
        jobs = [Job(**job) for job in json.loads(row["jobs"])]
        # After a worker's death its calls are repeated on another: part of this one may be done.
        left = self._missing(jobs)
        if len(left) > 1 and not any(self.folder.tries(job) for job in left):
            self._try(left)
            left = self._missing(left)
        errors = {job.id: "" for job in jobs} | {job.id: self._draw(job) for job in left}
        return {"fault": "", "errors": json.dumps(errors)}

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if self.folder.found(job) is None]

    def _draw(self, job: Job) -> str:
        """Draws one prompt, again where that fails; returns the last error, empty if there is none."""
        tries = self.folder.tries(job)
        error = tries[-1].error if tries else ""
        for _ in range(self.tries - len(tries)):
            error = self._try([job])
            if not error:
                break
        return error

    def _try(self, jobs: Sequence[Job]) -> str:
        """One call of the pipeline; returns the error, empty if there is none."""
        import torch

        for job in jobs:
            self.folder.begin(job)
        try:
            self._call(jobs)
        except Exception as error:
            for job in jobs:
                self.folder.fail(job, _said(error))
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                # What the process has on the device is lost, and every later call would fail: Ray starts another.
                os._exit(1)
            return _said(error)
        return ""

    def _call(self, jobs: Sequence[Job]) -> None:
        import numpy as np

        arguments = {**jobs[0].arguments, "output_type": "np"}
        if len(jobs) > 1:
            arguments["prompt"] = [job.arguments["prompt"] for job in jobs]
            arguments["generator"] = [noise_of(job.seed)["generator"] for job in jobs]
        before = self._full_calls()
        start = time.perf_counter()
        pictures = self.pipeline(**seeded(self.pipeline, arguments, jobs[0].seed))[0]
        seconds = time.perf_counter() - start
        if len(pictures) != len(jobs):
            raise ValueError(f"the pipeline returned {len(pictures)} pictures for {len(jobs)} prompts.")
        if not np.isfinite(pictures).all():
            raise ValueError("the picture has NaN or infinite values: try another dtype, for example bfloat16.")
        facts = {"seconds": seconds / len(jobs), **self._facts(jobs[0].arguments, before)}
        for job, picture in zip(jobs, pictures, strict=True):
            self.folder.save(job, picture, facts)

    def _full_calls(self) -> int:
        from dpcache.run.pipelines import stats

        return stats(self.pipeline).full_calls if self.follows else 0

    def _facts(self, arguments: Mapping[str, Any], full_calls_before: int) -> dict[str, Any]:
        """How the last call was run."""
        if not self.follows:
            steps = arguments.get("num_inference_steps")
            return {"full_calls": None, "num_inference_steps": steps, "num_key_steps": steps}
        from dpcache.run.pipelines import stats

        ran = stats(self.pipeline)
        return {
            "full_calls": ran.full_calls - full_calls_before,
            "num_inference_steps": len(ran.computed_steps) + len(ran.predicted_steps),
            "num_key_steps": len(ran.computed_steps),
        }


def _load(model: Any) -> Any:
    from dpcache.zoo import load_pipeline

    for library in ("diffusers", "transformers"):
        if importlib.util.find_spec(library):
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    pipeline = model() if callable(model) else load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _said(error: Exception) -> str:
    """An error in one line, for the index."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:_LENGTH]}"


def _jobs(
    requests: Sequence[Request], model: Any, schedule: Schedule | None, arguments: Mapping[str, Any]
) -> list[Job]:
    name = f"{model.__module__}.{model.__qualname__}" if callable(model) else str(model)
    defaults = dict(arguments)
    if schedule is not None:
        defaults.setdefault("num_inference_steps", schedule.num_inference_steps)
    followed = told_apart(schedule)
    jobs = []
    for request in requests:
        call = {**defaults, **request.arguments}
        jobs.append(Job(request.id, request.label, request.seed, call, origin(name, followed, request.seed, call)))
    return jobs


def _calls(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """The jobs of each call of the pipeline: those that differ in nothing but the prompt, so many at a time."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        others = {name: value for name, value in job.arguments.items() if name != "prompt"}
        alone = "" if "prompt" in job.arguments else job.id
        alike.setdefault(digest([others, alone]), []).append(job)
    return [group[n : n + batch_size] for group in alike.values() for n in range(0, len(group), batch_size)]


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES} if address == "local" else {}
    try:
        _knock(address)
        ray.init(address=address, logging_level="warning", **own)
    except (OSError, ValueError) as error:
        raise GenerationError(
            f"no Ray cluster at {address!r} ({_said(error)}): start one with `ray start --head`, name the address of "
            "another, or say 'local' for one on this machine alone."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises OSError where nobody answers at HOST:PORT: Ray itself tries for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _resources(
    num_workers: int | None, gpus_per_worker: float | None, num_calls: int, *, is_local: bool
) -> tuple[int, float]:
    """How many workers, with how many GPUs each."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [machine.get("GPU", 0.0) for machine in machines]
    each = float(any(gpus)) if gpus_per_worker is None else gpus_per_worker
    room = sum(int(count // each) for count in gpus) if each else len(machines)
    if not room:
        found = f"no machine of the cluster has {each:g} GPUs (the most is {max(gpus):g})"
        if is_local:
            raise GenerationError(f"{found}: ask for fewer GPUs per worker.")
        warnings.warn(f"{found}: nothing is drawn until one joins.", stacklevel=3)
    return min(num_workers or max(room, 1), num_calls), each


def _outcomes(
    calls: Sequence[Sequence[Job]], worker: tuple[Any, ...], num_workers: int, gpus: float
) -> Iterator[dict[str, str]]:
    """For one call after another, as they are done: the errors of its prompts, empty where there is a picture."""
    rows = [{"jobs": json.dumps([vars(job) for job in call])} for call in calls]
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        drawn = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_TASKS)).map(
            Worker,
            fn_constructor_args=worker,
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=2),
            **({"num_gpus": gpus} if gpus else {"num_cpus": 1}),
        )
        for row in drawn.iter_rows():
            if row["fault"]:
                raise GenerationError(row["fault"])
            yield json.loads(row["errors"])
    except ray.exceptions.RayError as error:
        raise GenerationError(
            f"Ray gave up ({_said(error)}). What is drawn is kept: the same call goes on from there."
        ) from error
    finally:
        context.enable_progress_bars = shown
