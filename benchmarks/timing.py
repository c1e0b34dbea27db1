"""Times of sampling loops and of their steps, on the CPU and on a GPU, and the ways to run them that are compared."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch

import dpcache
from benchmarks.peer_methods import cache_dit_cache, diffusers_cache
from dpcache.run.denoisers import find_blocks
from dpcache.run.hooks import listen

Row = dict[str, Any]
#: Name of a way to run -> what makes the pipeline run that way.
Ways = dict[str, Callable[[Any], AbstractContextManager[Any]]]


class Clock:
    """Marks along one run, in seconds.

    On a GPU the device sets them, without being waited for. On a CPU it is the processor time of this process: with one
    thread that is the time it would take with nobody else on the machine.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.process_time())

    def seconds(self) -> list[float]:
        """Between every two marks, one after another."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.marks)]
        return [b - a for a, b in itertools.pairwise(self.marks)]


def run(pipe: Any, arguments: Row, steps: int, device: str) -> Row:
    """One call: seconds of the whole loop and of every step, blocks' runs, and the peak of memory on a GPU."""
    clock, runs = Clock(device), [0]
    generator = torch.Generator(device).manual_seed(0)
    transformer = pipe.transformer

    def first_call(*_: Any) -> None:
        begun.remove()
        clock.mark()

    def count(*_: Any) -> None:
        runs[0] += 1

    def stepped(_owner: Any, result: Any, *_: Any, **__: Any) -> Any:
        clock.mark()
        return result

    begun = transformer.register_forward_pre_hook(first_call)
    counted = find_blocks(transformer)[-1].layer().register_forward_pre_hook(count)
    leave = listen(pipe.scheduler, "step", stepped)
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    try:
        pipe(**arguments, num_inference_steps=steps, generator=generator)
    finally:
        begun.remove()
        counted.remove()
        leave()
    seconds = clock.seconds()
    result = {"loop": sum(seconds), "steps": seconds, "block_runs": runs[0]}
    if clock.cuda:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def ours(k: int, steps: int, **more: Any) -> Callable[[Any], AbstractContextManager[Any]]:
    boundary = more.pop("boundary")
    return partial(dpcache.enabled, schedule=dpcache.Schedule.uniform(k, steps, boundary=boundary), **more)


def taylorseer(k: int, steps: int) -> Callable[[Any], AbstractContextManager[Any]]:
    """That of diffusers, which skips whole blocks, at settings that take k full steps.

    Raises:
        ValueError: there are none.
    """
    for interval, before, after in itertools.product(range(2, steps), (3, 2, 1, 4, 5), (None, steps - 1)):
        full = [s < before or (s - before - 1) % interval == 0 or (after or steps) <= s for s in range(steps)]
        if sum(full) == k:
            break
    else:
        raise ValueError(f"no setting takes {k} of {steps} steps")

    @contextmanager
    def applied(pipe: Any) -> Iterator[None]:
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=before,
            disable_cache_after_step=after,
            max_order=2,
            taylor_factors_dtype=pipe.transformer.dtype,
            use_lite_mode=True,
        )
        with diffusers_cache(pipe, config, diffusers.hooks.apply_taylorseer_cache):
            yield

    return applied


def cache_dit(k: int, steps: int) -> Callable[[Any], AbstractContextManager[Any]]:
    """Its TaylorSeer of order 2 behind one block that always runs, with the same key steps as ours."""
    keys = dpcache.Schedule.uniform(k, steps).key_steps
    config = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "num_inference_steps": steps,
        "steps_computation_mask": [int(step in keys) for step in range(steps)],
        "steps_computation_policy": "static",
    }
    return partial(cache_dit_cache, config=config, order=2)


def ways(budgets: Sequence[int], steps: int, *, peers: bool = True) -> Ways:
    """The full loop; then at every budget this library at both boundaries, and the peers."""
    found: Ways = {"full": lambda pipe: nullcontext()}
    for k in budgets:
        found |= {f"dpcache {boundary}, K = {k}": ours(k, steps, boundary=boundary) for boundary in BOUNDARIES}
        if peers:
            found |= {f"{name}, K = {k}": make(k, steps) for name, make in PEERS.items()}
    return found


BOUNDARIES = ("blocks", "output")
PEERS = {"TaylorSeer of diffusers": taylorseer, "cache-dit": cache_dit}


def one_round(
    pipe: Any, arguments: Row, steps: int, device: str, compared: Ways, seed: int, other: Any = None
) -> dict[str, Row]:
    """Every way once, in an order of its own; a peer that fails says why instead.

    cache-dit runs on `other`, if given: it leaves the denoiser patched for good.
    """
    order = np.random.default_rng(seed).permutation(list(compared))
    results: dict[str, Row] = {}
    for name in map(str, order):
        used = other if other is not None and name.startswith("cache-dit") else pipe
        try:
            with compared[name](used):
                results[name] = run(used, arguments, steps, device)
        except Exception as error:
            if name == "full" or name.startswith("dpcache"):
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return {name: results[name] for name in compared}


def summed_up(rounds: Sequence[dict[str, Row]]) -> list[Row]:
    """Medians over rounds: of loops, of their ratios to the full loop of the same round, and of skipped steps."""
    rows = []
    for name in rounds[0]:
        if error := next((r[name]["error"] for r in rounds if "error" in r[name]), ""):
            rows.append({"way": name, "error": error})
            continue
        runs = [r[name] for r in rounds]
        row: Row = {"way": name, "loop": median(r["loop"] for r in runs), "block_runs": runs[0]["block_runs"]}
        if "peak_gb" in runs[0]:
            row["peak_gb"] = max(r["peak_gb"] for r in runs)
        if name != "full":
            full = rounds[0]["full"]["block_runs"]
            ideal = full / row["block_runs"]
            speedups = [r["full"]["loop"] / r[name]["loop"] for r in rounds]
            row |= {"speedup": median(speedups), "ideal": ideal, "efficiency": median(s / ideal for s in speedups)}
            row["efficiency_of_steps"] = median(_of_steps(r["full"]["steps"], r[name]["steps"]) for r in rounds)
            row["skipped_step"] = median(median(skipped(r["steps"])) for r in runs)
        rows.append(row)
    for row in rows:
        budget = row["way"].partition(", ")[2]
        for boundary in BOUNDARIES:
            own = f"dpcache {boundary}, {budget}"
            if own in rounds[0] and not row["way"].startswith("dpcache") and "error" not in row:
                runs = [(r["full"], r[own], r[row["way"]]) for r in rounds]
                row[f"dpcache_{boundary}_to_this"] = median(mine["loop"] / this["loop"] for _, mine, this in runs)
                row[f"dpcache_{boundary}_to_this_of_steps"] = median(
                    _of_steps(full["steps"], this["steps"]) / _of_steps(full["steps"], mine["steps"])
                    for full, mine, this in runs
                )
    return rows


def _of_steps(full: Sequence[float], cached: Sequence[float]) -> float:
    """Efficiency of the cached loop, had every full step taken the median of the full loop."""
    quick = skipped(cached)
    key_steps = (len(cached) - len(quick)) * median(full)
    return key_steps / (key_steps + sum(quick))


def skipped(seconds: Sequence[float]) -> list[float]:
    """Those of the steps that were skipped: each takes far less than the longest."""
    return [s for s in seconds if s < max(seconds) / 2] or list(seconds)


def median(values: Any) -> float:
    return float(np.median(list(values)))
