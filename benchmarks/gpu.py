"""FLUX.1-dev, HunyuanVideo and DiT-XL/2 at their published configurations with random weights, on one GPU.

    python -m benchmarks.gpu                        # every part, then the table
    python -m benchmarks.gpu flux flux-compiled     # these parts: each takes less than 8 minutes
    python -m benchmarks.gpu --toy                  # on the CPU at toy size: whether it runs

Nothing is downloaded. A part times full and cached loops at the published K for both boundaries and the peers' loops in
turns; `-compiled` the same with the blocks compiled; `-calibration` what a calibration adds to its full run. Every part
is written to benchmarks/results/gpu.json when it is done.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dpcache
from benchmarks import random_pipelines, timing
from benchmarks.random_pipelines import DIT, FLUX, HUNYUAN, HUNYUAN_SHAPES, Size
from benchmarks.subjects import table
from benchmarks.timing import Row
from dpcache.measure.recording import record

RESULT = Path(__file__).parent / "results" / "gpu.json"
STEPS, TOY_STEPS = 50, 8
ROUNDS = 3
PART_SECONDS = 8 * 60
"""A part that would take longer takes fewer rounds, and a smaller video."""

#: Model -> how to build it, its sizes, and the published numbers of key steps at T = 50.
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Size], tuple[int, ...]]] = {
    "flux": (random_pipelines.flux, FLUX, (13, 9)),
    "hunyuan": (random_pipelines.hunyuan_video, HUNYUAN, (11, 9)),
    "dit": (random_pipelines.dit, DIT, (17, 13, 10)),
}
KINDS = ("", "-compiled", "-calibration")
PARTS = tuple(f"{model}{kind}" for model in MODELS for kind in KINDS)


class Subject:
    """A model on the device, at the largest size whose part fits in the time."""

    def __init__(self, model: str, *, toy: bool) -> None:
        build, sizes, budgets = MODELS[model]
        self.device = "cpu" if toy else "cuda"
        self.steps, self.budgets = (TOY_STEPS, (4, 3)) if toy else (STEPS, budgets)
        size = sizes["toy" if toy else "published"]
        self.pipe, self.arguments = build(size, self.device, torch.float32 if toy else torch.bfloat16)
        self.told = size.told
        if model == "hunyuan" and not toy:
            self._fit(size)

    def _fit(self, size: Size) -> None:
        loops = 1 + 2 * sum(self.budgets) / self.steps  # full, and both boundaries at every budget
        for shape in HUNYUAN_SHAPES:
            self.arguments |= dict(zip(("height", "width", "num_frames"), shape, strict=True))
            self.told = replace(size, told=f"HunyuanVideo, {shape[1]} x {shape[0]}, {shape[2]} frames").told
            try:
                timing.run(self.pipe, self.arguments, 1, self.device)
                step = timing.run(self.pipe, self.arguments, 1, self.device)["loop"]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if step * self.steps * loops < PART_SECONDS * 0.75:
                return
        raise RuntimeError("no size of the video fits in time and memory")


def loops(subject: Subject, *, compiled: bool, seconds: float = PART_SECONDS) -> Row:
    """Full and cached loops in turns, then cache-dit, which leaves the denoiser patched for good."""
    begun = time.perf_counter()
    pipe, arguments, steps, device = subject.pipe, subject.arguments, subject.steps, subject.device
    if compiled and device == "cuda":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    ways = timing.ways(subject.budgets, steps, peers=not compiled)
    last = {name: way for name, way in ways.items() if name.startswith("cache-dit")}
    first = {name: way for name, way in ways.items() if name not in last}
    timing.run(pipe, arguments, 3, device)
    rounds: list[dict[str, Row]] = []
    longest = 0.0
    # Leave time for another round, and for the peers that come last.
    while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - begun + 1.5 * longest < seconds):
        start = time.perf_counter()
        rounds.append(timing.one_round(pipe, arguments, steps, device, first, len(rounds)))
        longest = max(longest, time.perf_counter() - start)
    if last:
        results = timing.one_round(pipe, arguments, steps, device, last, 0)
        rounds = [results_of_round | results for results_of_round in rounds]
    found: Row = {"rounds": len(rounds), "table": timing.summed_up(rounds)}
    found["full_step"] = timing.median(timing.median(r["full"]["steps"]) for r in rounds)
    return found


def calibration(subject: Subject) -> Row:
    """Seconds of a full call, of one that is recorded, and of all that is computed from it."""
    pipe, arguments, device = subject.pipe, subject.arguments, subject.device
    call = {**arguments, "num_inference_steps": subject.steps}
    seconds: Row = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return result

    def generator() -> Any:
        return torch.Generator(device).manual_seed(0)

    timing.run(pipe, arguments, 3, device)
    timed("full", lambda: pipe(**call, generator=generator()))
    run = timed("recorded", lambda: record(pipe, {**call, "generator": generator()}))
    branches = timed("stacked", run.complete_branches)
    timed("cost_tensor", lambda: [dpcache.paper_cost(values, device=device) for values in branches])
    timed("grams", lambda: (run.gram(), run.value_gram()))
    beyond = sum(seconds.values()) - 2 * seconds["full"]
    return {"seconds": seconds, "value": list(branches[0].shape[1:]), "overhead": beyond / seconds["full"]}


def measure(part: str, *, toy: bool) -> Row:
    model, _, kind = part.partition("-")
    subject = Subject(model, toy=toy)
    found = {"told": subject.told, "steps": subject.steps}
    found["device"] = torch.cuda.get_device_name() if subject.device == "cuda" else "CPU"
    measured = calibration(subject) if kind == "calibration" else loops(subject, compiled=kind == "compiled")
    return found | measured


def shown(results: Row) -> str:
    """One table of everything measured."""
    head = ["part", "way", "loop, s", "speedup", "ideal", "efficiency", "skipped step, ms", "dpcache blocks / this"]
    rows: list[list[object]] = []
    for part, found in results.items():
        if part not in PARTS:
            continue
        for row in found.get("table", ()):
            if "error" in row:
                rows.append([part, row["way"], f"does not run: {row['error'][:80]}", *[""] * 5, ""])
                continue
            cells = [row.get(name) for name in ("loop", "speedup", "ideal", "efficiency")]
            cells += [1e3 * row["skipped_step"] if "skipped_step" in row else None, row.get("dpcache_blocks_to_this")]
            numbers = ["" if cell is None else f"{cell:.3f}" for cell in cells]
            rows.append([part, row["way"], *numbers, f"{row['peak_gb']:.2f}" if "peak_gb" in row else ""])
        if "overhead" in found:
            told = ", ".join(f"{name} {value:.3f} s" for name, value in found["seconds"].items())
            rows.append([part, f"{told}: {found['overhead']:.1%} beyond the full run", *[""] * 6, ""])
    sizes = "".join(
        f"- `{part}`: {found['told']}, {found['device']}\n" for part, found in results.items() if part in PARTS
    )
    return sizes + "\n" + table([*head, "peak, GB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.gpu flux flux-calibration"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--toy", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; none at toy size")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not options.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy runs everything at toy size on the CPU")
    logging.disable(logging.WARNING)
    output = options.output or (None if options.toy else RESULT)
    results = json.loads(output.read_text()) if output is not None and output.exists() else {}
    results["versions"] = {package: version(package) for package in ("torch", "diffusers")}
    for part in options.parts or PARTS:
        results[part] = measure(part, toy=options.toy)
        if output is not None:
            output.write_text(json.dumps(results, indent=1) + "\n")
    print(shown(results))


if __name__ == "__main__":
    main()
