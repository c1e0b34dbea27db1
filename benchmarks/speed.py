"""Everything in docs/performance.md that a CPU can measure: ratios of processor times taken in turns, on one thread.

    python -m benchmarks.speed                    # everything anew, then the page: about 12 minutes
    python -m benchmarks.speed planner startup    # these parts anew
    python -m benchmarks.speed --resume           # what a run that was cut short has not measured

Every round is written to benchmarks/results/speed.json when it is done.
"""

import argparse
import copy
import json
import logging
import platform
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dpcache
import dpcache.run.generation
from benchmarks import random_pipelines, speed_page, timing
from benchmarks.timing import Row, median
from dpcache.plan.planner import plan_all
from dpcache.plan.predictors import taylor_coefficients
from dpcache.run.layouts import BLOCK_STACKS, Layout
from dpcache.run.sums import weighted_sum

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "speed.json"
STEPS, BUDGETS = 50, (13, 9)
HEAD = ("x_embedder", "context_embedder", "pos_embed", "time_text_embed", "norm_out", "proj_out")
"""Of FluxTransformer2DModel: everything beside its blocks."""


def flux(size: str) -> tuple[Any, Row]:
    return random_pipelines.flux(random_pipelines.FLUX[size], "cpu", torch.float32)


# --------------------------------------------------------------------------------------------------------------- loops


def loops(found: Row, rounds: int, size: str, steps: int = STEPS, budgets: tuple[int, ...] = BUDGETS) -> Row:
    """Full and cached loops of one pipeline in turns."""
    if found.get("size") != random_pipelines.FLUX[size].told:
        found = {"size": random_pipelines.FLUX[size].told, "rounds": []}
    pipe, arguments = flux(size)
    other = copy.deepcopy(pipe.transformer)
    other = random_pipelines.assembled("FluxPipeline", copy.deepcopy(pipe.scheduler), other)
    compared = timing.ways(budgets, steps)
    timing.run(pipe, arguments, 2, "cpu")  # what is set up once
    while len(found["rounds"]) < rounds:
        results = timing.one_round(pipe, arguments, steps, "cpu", compared, len(found["rounds"]), other)
        found["rounds"].append(results)
        found["table"] = timing.summed_up(found["rounds"])
        found["full_step"] = median(median(r["full"]["steps"]) for r in found["rounds"])
        yield_part("loops", found)
    return found


# ------------------------------------------------------------------------------------------------------------- profile


def profile(found: Row, rounds: int, size: str, steps: int = 30) -> Row:
    """Where the time of a skipped step goes, with all that comes before the blocks and without."""
    pipe, arguments = flux(size)
    kind = type(pipe.transformer).__name__
    layout = BLOCK_STACKS[kind]
    result: Row = {"size": random_pipelines.FLUX[size].told}
    try:
        for name, feeders in (("before", ()), ("after", layout.feeders)):
            BLOCK_STACKS[kind] = Layout(layout.stacks, layout.head, feeders)
            result[name] = _skipped_step(pipe, arguments, steps)
    finally:
        BLOCK_STACKS[kind] = layout
    return result


def _skipped_step(pipe: Any, arguments: Row, steps: int) -> Row:
    """Median milliseconds: of all, of the denoiser's parts beside its blocks, and of the prediction."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                seconds.setdefault(name, []).append(time.process_time() - start)

        return measured

    schedule = dpcache.Schedule.from_key_steps((0, 1, 2), steps)
    with dpcache.enabled(pipe, schedule):
        whole = timing.run(pipe, arguments, steps, "cpu")["steps"]
        parts = {name: getattr(pipe.transformer, name) for name in HEAD}
        forwards = {name: part.forward for name, part in parts.items()}
        predict, dpcache.run.generation.weighted_sum = (
            dpcache.run.generation.weighted_sum,
            timed("sum", dpcache.run.generation.weighted_sum),
        )
        for name, part in parts.items():
            part.forward = timed(name, part.forward)
        timing.run(pipe, arguments, steps, "cpu")
        for name, part in parts.items():
            part.forward = forwards[name]
        dpcache.run.generation.weighted_sum = predict
    result = {name: 1e3 * median(taken[3:]) for name, taken in seconds.items()}
    all_of_it = 1e3 * median(timing.skipped(whole))
    return {"all": all_of_it, **result, "rest": all_of_it - sum(result.values())}


def sums(found: Row, rounds: int, size: str) -> Row:
    """Milliseconds of a prediction from three values of FLUX.1-dev at 1024 x 1024: in pieces, and as whole tensors."""
    count = 4096 * 3072 if size == "cpu" else 10_000
    coefficients, cpu = [0.31, -1.7, 2.39], torch.device("cpu")
    result: Row = {"elements": count}
    for dtype in (torch.float32, torch.bfloat16):
        values = [torch.randn(count).to(dtype) for _ in range(3)]
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "pieces": lambda values=values: weighted_sum(values, coefficients, cpu),  # type: ignore[misc]
            "whole": lambda values=values: _whole_sum(values, coefficients),  # type: ignore[misc]
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5 * rounds):
            for name, way in ways.items():
                start = time.process_time()
                way()
                taken[name].append(time.process_time() - start)
        result[str(dtype).removeprefix("torch.")] = {name: 1e3 * median(times) for name, times in taken.items()}
    return result


def _whole_sum(values: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    total = values[0].to(torch.float32) * coefficients[0]
    for value, coefficient in zip(values[1:], coefficients[1:], strict=True):
        total.add_(value, alpha=coefficient)
    return total.to(values[0].dtype)


# --------------------------------------------------------------------------------------------------------- calibration


def calibration(found: Row, rounds: int, size: str, steps: int = STEPS) -> Row:
    """Time of a calibration with one input, against the full call that it makes."""
    pipe, arguments = flux(size)
    found = found if found.get("size") == random_pipelines.FLUX[size].told else {"ratios": []}
    found["size"] = random_pipelines.FLUX[size].told
    call = {**arguments, "num_inference_steps": steps}
    pipe(**{**call, "num_inference_steps": 2})
    while len(found["ratios"]) < rounds:
        seconds = {}
        order = (True, False) if len(found["ratios"]) % 2 else (False, True)
        for calibrates in order:
            start = time.process_time()
            if calibrates:
                dpcache.calibrate(pipe, [arguments], num_inference_steps=steps, progress=False)
            else:
                pipe(**call, generator=torch.Generator().manual_seed(0))
            seconds[calibrates] = time.process_time() - start
        found["ratios"].append(seconds[True] / seconds[False])
        found["overhead"] = median(found["ratios"]) - 1
        yield_part("calibration", found)
    return found


def papers_cost(found: Row, rounds: int, size: str, steps: int = STEPS, width: int = 10**6) -> Row:
    """The cost tensor of one branch, in a batched pass and in the straightforward loop."""
    width = width if size == "cpu" else 2000
    values = torch.randn(steps, width, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    dpcache.paper_cost(values[:, :1000])
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        cost = dpcache.paper_cost(values)
        seconds.append(time.process_time() - start)
    start = time.process_time()
    reference = straightforward_cost(values, 2)
    loop = time.process_time() - start
    known = np.isfinite(reference)
    difference = float(np.abs(cost[known] / reference[known] - 1).max())
    batched = median(seconds)
    return {"width": width, "loop": loop, "batched": batched, "speedup": loop / batched, "difference": difference}


def straightforward_cost(values: torch.Tensor, order: int) -> Any:
    """`dpcache.paper_cost` as one would write it down: an error and a number read back for every i, j and k.

    The errors of a hop are added up as it gets longer, none is computed twice. The sentinel column is left out.
    """
    steps = len(values)
    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(order, steps):
        for i in range(max(order - 1, j - int(0.3 * steps + 1e-9)), j):
            history = [*range(i - order + 1, i + 1), j]
            total = 0.0
            for k in range(j + 1, steps):
                weights = taylor_coefficients(history, k, order)
                prediction = sum(float(weight) * values[key] for weight, key in zip(weights, history, strict=True))
                total += ((prediction - values[k]).abs().mean() / 2).item()
                cost[i, j, k] = total
    return cost


# ------------------------------------------------------------------------------------------------- planner and start-up


def planner(found: Row, rounds: int, size: str) -> Row:
    """Processor time and memory of all budgets: T alone, and with gaps to 64."""
    rows = []
    sizes = [(25, None, None), (50, None, None), (100, None, None), (200, None, None)]
    sizes += [(250, 64, 63), (500, 64, 125)]
    if size == "toy":
        sizes = [(12, None, None), (25, None, None), (50, 8, 12)]
    for steps, gap, budget in sizes:
        cost = np.random.default_rng(0).random((steps, steps + 1, steps + 1))
        seconds = []
        for _ in range(rounds if steps > 100 else 10 * rounds):
            start = time.thread_time()
            plan_all(cost, max_gap=gap, max_key_steps=budget)
            seconds.append(time.thread_time() - start)
        tracemalloc.start()
        plan_all(cost, max_gap=gap, max_key_steps=budget)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row = {"T": steps, "max_gap": gap, "max_key_steps": budget or steps, "seconds": median(seconds)}
        rows.append({**row, "cost_mb": cost.nbytes / 1e6, "peak_mb": (peak + cost.nbytes) / 1e6})
    return {"rows": rows}


def startup(found: Row, rounds: int, size: str) -> Row:
    """Seconds: the least of several, for other processes only ever add to it."""
    run_help = "import sys; sys.argv = ['dpcache', '--help']; from dpcache.apps.cli import main; main()"
    codes = {"nothing": "pass", "torch": "import torch", "both": "import torch, dpcache"}
    codes |= {"dpcache": "import dpcache", "planner": "import dpcache; dpcache.plan", "help": run_help}
    taken: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(3 * rounds):
        for name, code in codes.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            taken[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in taken.items()}


# --------------------------------------------------------------------------------------------------------------- files

PARTS: dict[str, Callable[..., Row]] = {
    "loops": loops,
    "profile": profile,
    "sums": sums,
    "calibration": calibration,
    "paper_cost": papers_cost,
    "planner": planner,
    "startup": startup,
}
GOING_ON = ("loops", "calibration")
"""What can be cut short between rounds."""
_measured: Row = {}
_target = RESULT


def yield_part(name: str, found: Row) -> None:
    """Writes what is known of a part, the rest as it was."""
    _measured[name] = found
    _measured["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s) of torch, float32 on the CPU"
    _measured["versions"] = {package: version(package) for package in ("torch", "diffusers", "cache-dit", "numpy")}
    text = json.dumps(speed_page.rounded(_measured), indent=1)
    _target.write_text(text + "\n")


def measure(parts: list[str], *, rounds: int, size: str, target: Path, resume: bool = False) -> None:
    """Measures the parts, anew or going on with what is known of them, and writes them beside what is there."""
    global _target
    _target = target
    target.parent.mkdir(parents=True, exist_ok=True)
    _measured.clear()
    _measured.update(json.loads(target.read_text()) if target.exists() else {})
    for name in parts:
        if not resume:
            _measured.pop(name, None)
        small = {"steps": 8, "budgets": (4, 3)} if name == "loops" else {"steps": 8}
        more = small if size == "toy" and name in ("loops", "profile", "calibration") else {}
        yield_part(name, PARTS[name](_measured.get(name, {}), rounds, size, **more))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{name}: done, the process has taken {peak:.0f} MB at most", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.speed loops --rounds 5"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=6, help="of every measurement (default 6)")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    parser.add_argument("--toy", action="store_true", help="at toy size: whether it runs, not how fast")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: benchmarks/results/speed.json")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    logging.disable(logging.WARNING)
    parts = options.parts or list(PARTS)
    if options.resume:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        parts = [name for name in parts if name not in known or name in GOING_ON]
    if not options.page_only:
        size = "toy" if options.toy else "cpu"
        measure(parts, rounds=options.rounds, size=size, target=options.output, resume=options.resume)
    if options.output == RESULT:
        speed_page.write(ROOT)


if __name__ == "__main__":
    main()
