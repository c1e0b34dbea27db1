"""Full against cached: the same inputs and seeds through both, what differs and what it saves."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from dpcache.errors import UnsupportedPipelineError
from dpcache.plan.schedule import Schedule
from dpcache.run.denoisers import find_blocks, find_denoisers
from dpcache.run.inputs import Input, as_pictures, call_arguments, label, quiet, seeded
from dpcache.run.pipelines import enabled, require_disabled

from .metrics import HAS_FLIP, Picture, flip, psnr, ssim
from .ways import FULL, Held, Way, scheduled

#: metric(output, reference) of two pictures, float [H, W, C] in [0, 1], or [F, H, W, C] for clips.
Metric = Callable[[Picture, Picture], float]
#: Of fewer samples a 5th percentile is hardly more than the worst one.
FEWEST_FOR_PERCENTILE = 20


@dataclass(frozen=True)
class Sample:
    """One output, drawn in full and cached.

    Attributes:
        label: the prompt, or what else tells the input apart.
        seed: of the noise.
        psnr: dB, of the cached output against the full one, in float.
        ssim: likewise, 1 is equal.
        full: float [H, W, C] in [0, 1] ([F, H, W, C] for a clip), drawn in full.
        cached: likewise, drawn with the schedule.
        flip: of the two, 0 is equal; None where flip-evaluator is not installed.
        metrics: {name: value} of metrics of one's own.
    """

    label: str
    seed: int
    psnr: float
    ssim: float
    full: Picture
    cached: Picture
    flip: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Full against cached over a set of inputs.

    Attributes:
        schedule: what the cached runs followed.
        samples: one for every output, in the order of the inputs.
        full_seconds: time of every full pipeline call, text encoding and decoding included.
        cached_seconds: time of every cached call.
        full_block_runs: transformer blocks run in all full calls together, counted inside the blocks; 0 where the
            library does not know the denoiser's blocks.
        cached_block_runs: likewise for the cached calls.
    """

    schedule: Schedule
    samples: tuple[Sample, ...]
    full_seconds: tuple[float, ...]
    cached_seconds: tuple[float, ...]
    full_block_runs: int
    cached_block_runs: int

    @property
    def speedup(self) -> float:
        """Median time of a full call over that of a cached one."""
        return float(np.median(self.full_seconds) / np.median(self.cached_seconds))

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR in dB."""
        return float(np.mean([s.psnr for s in self.samples]))

    @property
    def psnr_p5(self) -> float | None:
        """5th percentile of PSNR in dB; where equal outputs make some infinite, the sample below it.

        None of fewer than 20 samples: the worst one says as much.
        """
        values = [s.psnr for s in self.samples]
        if len(values) < FEWEST_FOR_PERCENTILE:
            return None
        return float(np.percentile(values, 5, method="linear" if np.isfinite(values).all() else "lower"))

    @property
    def psnr_worst(self) -> float:
        """PSNR in dB of the worst sample."""
        return min(s.psnr for s in self.samples)

    @property
    def ssim_mean(self) -> float:
        """Mean SSIM."""
        return float(np.mean([s.ssim for s in self.samples]))

    @property
    def flip_mean(self) -> float | None:
        """Mean FLIP; None where flip-evaluator is not installed."""
        values = [s.flip for s in self.samples if s.flip is not None]
        return float(np.mean(values)) if values else None

    @property
    def metric_means(self) -> dict[str, float]:
        """Means of metrics of one's own, by name."""
        return {name: float(np.mean([s.metrics[name] for s in self.samples])) for name in self.samples[0].metrics}


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C while comparing.

    Attributes:
        comparisons: over the inputs that were drawn with every schedule by then, one input at least.
    """

    def __init__(self, comparisons: "list[Comparison]") -> None:
        super().__init__()
        self.comparisons = comparisons


def compare(
    pipeline: Any,
    schedule: Schedule,
    inputs: Sequence[Input],
    *,
    seeds: "int | Sequence[int]" = 0,
    metrics: Mapping[str, Metric] = {},
    progress: bool = True,
    **arguments: Any,
) -> Comparison:
    """Draws every input in full and with the schedule, from the same noise.

    Args:
        pipeline: a diffusers pipeline, dpcache not enabled on it.
        schedule: the schedule to try; its number of steps is used for both.
        inputs: prompts, or dicts of arguments of the pipeline's call.
        seeds: one seed per input, or the first of consecutive ones.
        metrics: {name: metric} of further metrics, each a function metric(output, reference) -> float of two pictures,
            float [H, W, C] in [0, 1] ([F, H, W, C] for clips).
        progress: show a progress bar.
        arguments: further arguments of every call; an input's own win.

    Raises:
        CalibrationError: no inputs.
        ValueError: not as many seeds as inputs.
        CacheStateError, ScheduleMismatchError, UnsupportedPipelineError: as `enable`.
    """
    return compare_all(pipeline, [schedule], inputs, seeds=seeds, metrics=metrics, progress=progress, **arguments)[0]


def compare_all(
    pipeline: Any,
    schedules: Sequence[Schedule],
    inputs: Sequence[Input],
    *,
    seeds: "int | Sequence[int]" = 0,
    metrics: Mapping[str, Metric] = {},
    progress: bool = True,
    **arguments: Any,
) -> list[Comparison]:
    """`compare` for several schedules of one number of steps, the full runs shared and all runs interleaved.

    Raises:
        ComparisonInterrupted: Ctrl-C after the first input; it has the comparisons over those that are done.
    """
    steps = {schedule.num_inference_steps for schedule in schedules}
    if len(steps) != 1:
        raise ValueError(f"compare schedules of one number of steps at a time, got {sorted(steps)}.")
    calls = call_arguments(inputs, {"num_inference_steps": steps.pop(), "output_type": "np", **arguments})
    first_seed = range(seeds, seeds + len(calls)) if isinstance(seeds, int) else list(seeds)
    if len(first_seed) != len(calls):
        raise ValueError(f"give one seed per input: {len(calls)} inputs but {len(first_seed)} seeds.")

    require_disabled(pipeline)
    for schedule in schedules:  # what cannot be followed is known before anything is drawn
        with enabled(pipeline, schedule):
            pass
    full = Side(pipeline)
    cached = [Side(pipeline, scheduled(schedule)) for schedule in schedules]
    runs = 1 + len(calls) * (1 + len(cached))
    with tqdm(total=runs, desc="compare", unit="run", disable=not progress) as bar:
        full.warm_up(calls[0], first_seed[0])
        bar.update()
        try:
            draw_all(full, cached, calls, first_seed, metrics, lambda side: bar.update())
        except DrawingInterrupted as interrupt:
            raise ComparisonInterrupted(_comparisons(schedules, full, cached)) from interrupt
    return _comparisons(schedules, full, cached)


class DrawingInterrupted(KeyboardInterrupt):
    """Ctrl-C in `draw_all`, after the first input; the sides have what was drawn of all of them by then."""


def draw_all(
    full: "Side",
    others: "Sequence[Side]",
    calls: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    metrics: Mapping[str, Metric],
    on_run: "Callable[[Side], object]",
) -> None:
    """Draws every call with every side, in turns, and holds what the others draw against the full one.

    Raises:
        DrawingInterrupted: Ctrl-C after the first call.
    """
    done = 0
    try:
        for call, seed in zip(calls, seeds, strict=True):
            full.run(call, seed)
            on_run(full)
            for side in others:
                side.run(call, seed)
                side.judge(full, metrics)
                on_run(side)
            done += 1
    except KeyboardInterrupt as interrupt:
        if not done:
            raise
        for side in (full, *others):
            side.forget_after(done)
        raise DrawingInterrupted from interrupt


class Side:
    """One of the ways to draw.

    Args:
        pipeline: what to call.
        way: how it runs; in full unless given.

    Attributes:
        seconds: of every call.
        pictures: all that were drawn.
        samples: what they are beside the full ones, where `judge` was called.
        block_runs: transformer blocks that really ran.
        held: what its cache holds.
        peak_bytes: of the GPU's memory, the most in use at any time; None without one.
    """

    def __init__(self, pipeline: Any, way: Way = FULL) -> None:
        self.pipeline, self.way = pipeline, way
        self.held = Held()
        self.peak_bytes: int | None = None
        self._reset()

    def warm_up(self, call: Mapping[str, Any], seed: int) -> float:
        """A call that pays for what is set up once, and does not count; its seconds."""
        self.run(call, seed)
        (seconds,) = self.seconds
        self._reset()
        return seconds

    def _reset(self) -> None:
        self.seconds: list[float] = []
        self.pictures: list[Picture] = []
        self.samples: list[Sample] = []
        self.block_runs = 0
        self._labels: list[tuple[str, int]] = []
        #: Of every call: pictures and blocks run up to its end.
        self._ends: list[tuple[int, int]] = []

    def run(self, call: Mapping[str, Any], seed: int) -> None:
        """One call of the pipeline."""
        if self.way.steps is not None:
            call = {**call, "num_inference_steps": self.way.steps}
        arguments = seeded(self.pipeline, call, seed)
        counted = count_block_runs(find_denoisers(self.pipeline))
        with quiet(self.pipeline), counted as count, self.way.applied(self.pipeline), self.held.watched(self.pipeline):
            output = self._timed(arguments)
        self.block_runs += count[0]
        pictures = as_pictures(output)
        self.pictures.extend(pictures)
        self._labels.extend([(label(self.pipeline, call), seed)] * len(pictures))
        self._ends.append((len(self.pictures), self.block_runs))

    def judge(self, full: "Side", metrics: Mapping[str, Metric]) -> None:
        """Holds what was drawn since the last time against what the full side has drawn."""
        for number in range(len(self.samples), len(self.pictures)):
            (text, seed), a, b = self._labels[number], full.pictures[number], self.pictures[number]
            own = {name: float(metric(b, a)) for name, metric in metrics.items()}
            self.samples.append(Sample(text, seed, psnr(a, b), ssim(a, b), a, b, flip(a, b) if HAS_FLIP else None, own))

    def forget_after(self, calls: int) -> None:
        """Leaves what the first so many calls gave."""
        pictures, self.block_runs = self._ends[calls - 1]
        del self.pictures[pictures:], self.samples[pictures:], self._labels[pictures:]
        del self.seconds[calls:], self._ends[calls:]

    def _timed(self, arguments: dict[str, Any]) -> Any:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        output = self.pipeline(**arguments)
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated())
        return output


def _comparisons(schedules: Sequence[Schedule], full: Side, cached: Sequence[Side]) -> list[Comparison]:
    return [comparison(schedule, full, side) for schedule, side in zip(schedules, cached, strict=True)]


def comparison(schedule: Schedule, full: Side, cached: Side) -> Comparison:
    """What the two sides have drawn."""
    return Comparison(
        schedule,
        tuple(cached.samples),
        tuple(full.seconds),
        tuple(cached.seconds),
        full.block_runs,
        cached.block_runs,
    )


@contextmanager
def count_block_runs(denoisers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Counts how often transformer blocks really run, on a layer inside each; yields the count in a list of one."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    try:
        blocks = [block for denoiser in denoisers for block in find_blocks(denoiser)]
    except UnsupportedPipelineError:
        blocks = []
    handles = [block.layer().register_forward_pre_hook(add) for block in blocks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
