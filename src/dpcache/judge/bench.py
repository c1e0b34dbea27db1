"""Several ways to run one model at equal full calls, on one device: how near each is, how fast, what it holds."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dpcache.progress import how_long
from dpcache.run.inputs import Input, call_arguments
from dpcache.run.pipelines import require_disabled

from .comparison import Comparison, DrawingInterrupted, Side, comparison, draw_all
from .ways import FULL, Way

#: Settings of a peer are searched on so many inputs, from noise that nothing else is drawn from.
SEARCH_INPUTS = 2
SEARCH_SEED = 2_000_000
FULL_NAME = "full"


@dataclass(frozen=True)
class Row:
    """What one way gave.

    Attributes:
        name: of the way.
        told: what a reader needs to set it up again.
        full_calls: of each call of the pipeline, the mean, counted inside the blocks; None where they are not known.
        seconds: of a call of the pipeline, text encoding and decoding included: the median.
        cached_bytes: what its cache held, at most; None where it has none.
        peak_bytes: of the GPU's memory, the most in use; None without one.
        psnr: dB, of every output; empty for the full run, and if it cannot run.
        ssim_mean: likewise the mean of SSIM; None for the full run.
        flip_mean: likewise of FLIP; None also where flip-evaluator is not installed.
        cannot_run: why it has no figures; None if it has.
    """

    name: str
    told: Mapping[str, Any] = field(default_factory=dict)
    full_calls: float | None = None
    seconds: float | None = None
    cached_bytes: int | None = None
    peak_bytes: int | None = None
    psnr: tuple[float, ...] = ()
    ssim_mean: float | None = None
    flip_mean: float | None = None
    cannot_run: str | None = None

    @property
    def psnr_mean(self) -> float | None:
        """Mean PSNR in dB."""
        return float(np.mean(self.psnr)) if self.psnr else None

    @property
    def psnr_worst(self) -> float | None:
        """PSNR in dB of the worst output."""
        return min(self.psnr, default=None)


@dataclass(frozen=True)
class Benched:
    """All ways over the same inputs.

    Attributes:
        rows: the full run first, then the ways in their order.
        comparisons: of the ways that follow a schedule, by name.
        shape: of an output, [H, W, C], or [F, H, W, C] of a clip.
        num_inputs: how many were drawn with all ways.
        seconds: that everything took together.
        is_whole: False after Ctrl-C.
    """

    rows: tuple[Row, ...]
    comparisons: Mapping[str, Comparison]
    shape: tuple[int, ...]
    num_inputs: int
    seconds: float
    is_whole: bool


def bench(
    pipeline: Any,
    ways: "Mapping[str, Way | Sequence[Way] | Exception]",
    inputs: Sequence[Input],
    *,
    num_inference_steps: int,
    num_key_steps: int,
    seed: int = 0,
    say: Callable[[str], object] = print,
    progress: bool = True,
    **arguments: Any,
) -> Benched:
    """Draws every input in full and in every way, from the same noise, in turns.

    Args:
        pipeline: a diffusers pipeline, dpcache not enabled on it.
        ways: {name: way}. Of several ways the best one is taken, on inputs and noise of its own. In place of a way
            that there is none of, the exception that says why.
        inputs: prompts, or dicts of arguments of the pipeline's call.
        num_inference_steps: T of the full run.
        num_key_steps: full calls that every way takes, to know how long it will take.
        seed: of the first input; the next ones count on.
        say: told after the first full run how long everything will take.
        progress: show one bar for everything.
        arguments: further arguments of every call.

    Raises:
        CalibrationError: no inputs.
        KeyboardInterrupt: Ctrl-C before the first input was drawn in every way.
    """
    require_disabled(pipeline)
    calls = call_arguments(inputs, {"num_inference_steps": num_inference_steps, "output_type": "np", **arguments})
    seeds = range(seed, seed + len(calls))
    searched = {name: way for name, way in ways.items() if isinstance(way, Sequence)}
    search_calls = calls[:SEARCH_INPUTS]
    drawn = sum(not isinstance(way, Exception) for way in ways.values())
    total = num_inference_steps * (1 + len(calls) + (len(search_calls) if searched else 0))
    total += num_key_steps * (len(calls) * drawn + len(search_calls) * sum(map(len, searched.values())))
    begun = time.perf_counter()
    full, is_whole = Side(pipeline), True
    with tqdm(total=total, desc="bench", unit="step", disable=not progress) as bar:

        def on_run(side: Side) -> None:
            bar.update(num_inference_steps if side.way is FULL else num_key_steps)

        first = full.warm_up(calls[0], seeds[0])
        on_run(full)
        say(how_long("whole", first, first * total / num_inference_steps))
        found: dict[str, Way | Exception] = {}
        for name, way in ways.items():
            found[name] = _best(pipeline, way, search_calls, on_run) if isinstance(way, Sequence) else way
        sides = {name: Side(pipeline, way) for name, way in found.items() if isinstance(way, Way)}
        bar.total = bar.n + len(calls) * (num_inference_steps + len(sides) * num_key_steps)
        try:
            draw_all(full, list(sides.values()), calls, seeds, {}, on_run)
        except DrawingInterrupted:
            is_whole = False
    rows = [_row(FULL_NAME, full, full, num_inference_steps)]
    for name, way in found.items():
        if isinstance(way, Exception):
            rows.append(Row(name, cannot_run=f"{type(way).__name__}: {way}"))
        else:
            rows.append(_row(name, sides[name], full, num_inference_steps))
    return Benched(
        tuple(rows),
        {name: comparison(s.way.schedule, full, s) for name, s in sides.items() if s.way.schedule is not None},
        full.pictures[0].shape,
        len(full.seconds),
        time.perf_counter() - begun,
        is_whole,
    )


def _best(
    pipeline: Any, ways: Sequence[Way], calls: Sequence[Mapping[str, Any]], on_run: Callable[[Side], object]
) -> "Way | Exception":
    """The way with the highest mean PSNR; an exception that one of them raises is the answer."""
    full, sides = Side(pipeline), [Side(pipeline, way) for way in ways]
    try:
        draw_all(full, sides, calls, range(SEARCH_SEED, SEARCH_SEED + len(calls)), {}, on_run)
    except Exception as error:  # whatever a peer raises is its answer
        return error
    return max(sides, key=lambda side: float(np.mean([sample.psnr for sample in side.samples]))).way


def _row(name: str, side: Side, full: Side, num_steps: int) -> Row:
    flips = [sample.flip for sample in side.samples if sample.flip is not None]
    return Row(
        name,
        side.way.told,
        num_steps * side.block_runs / full.block_runs if full.block_runs else None,
        float(np.median(side.seconds)),
        side.held.most,
        side.peak_bytes,
        tuple(sample.psnr for sample in side.samples),
        float(np.mean([sample.ssim for sample in side.samples])) if side.samples else None,
        float(np.mean(flips)) if flips else None,
    )
