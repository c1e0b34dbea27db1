"""docs/performance.md from benchmarks/results/speed.json, and from gpu.json where there is one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.subjects import table
from benchmarks.timing import Row, median, summed_up

#: What a skipped step is made of -> for people.
PARTS_OF_A_STEP = {
    "x_embedder": "patch embedding",
    "context_embedder": "text projection",
    "pos_embed": "rotary tables",
    "time_text_embed": "embedding of time and pooled text",
    "norm_out": "head: norm",
    "proj_out": "head: projection",
    "sum": "weighted sum",
    "rest": "hooks of 57 blocks, scheduler, pipeline",
}
TARGET = 0.97
"""For the efficiency at either boundary."""
#: What the head needs: the least a skipped step can take at the boundary "blocks".
LIMIT = ("time_text_embed", "norm_out", "proj_out", "sum")


def rounded(value: Any) -> Any:
    """Five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _loops(found: Row) -> Iterable[str]:
    rounds = len(found["rounds"])
    yield "## Efficiency: what a skipped step costs\n"
    yield (
        f"{found['size']}; T = 50. A full step takes {1e3 * found['full_step']:.0f} ms. Efficiency is (full loop time "
        "/ cached loop time) / (T / K), 1 if skipped steps cost nothing; the target is 0.97 (the paper's own "
        f"figures: 0.92 and 0.88 on FLUX). Medians of {rounds} rounds, in each of which every way runs once, in an "
        "order of its own; ratios are taken within a round. The full steps of two loops of a round differ by per "
        "cents, for other programs share the memory and its caches; `of steps` is the efficiency had every full step "
        "taken the median of the full loop, so what the skipped steps alone cost. Full calls are counted inside the "
        "last block.\n"
    )
    rows = []
    for row in found["table"]:
        names = ("loop", "speedup", "ideal", "efficiency", "efficiency_of_steps")
        cells = [row["way"], row.get("block_runs", ""), *(row.get(name) for name in names)]
        cells.append(1e3 * row["skipped_step"] if "skipped_step" in row else None)
        rows.append([_cell(cell) for cell in cells] if "error" not in row else [row["way"], row["error"], *[""] * 6])
    head = ["way", "full calls", "loop, s", "speedup", "ideal", "efficiency", "of steps", "skipped step, ms"]
    yield table(head, rows)
    own = [row for row in found["table"] if row["way"].startswith("dpcache")]
    if low := [row for row in own if row["efficiency"] < TARGET]:
        told = ", ".join(f"{row['way']}: {row['efficiency']:.3f}" for row in low)
        ours, theirs = _key_steps(found["rounds"], "dpcache"), _key_steps(found["rounds"], "TaylorSeer")
        yield (
            f"Missed as measured: {told}. There the key steps took longer than the steps of the full loop, "
            f"{min(ours):.2f} to {max(ours):.2f} times as long over all rounds (those of TaylorSeer "
            f"{min(theirs):.2f} to {max(theirs):.2f} times): more than the skipped steps add, and not explained yet "
            "beyond the load on the machine.\n"
        )
    yield (
        "### Against peers\n\nTime of this library's loop over the peer's at equal full calls; the target is at most "
        "1. `of steps`: likewise had every full step taken the same. TaylorSeer is the lite mode, which skips whole "
        "blocks, at an interval that takes as many full steps; cache-dit runs its TaylorSeer of order 2 behind one "
        "block, by a mask of the same key steps.\n"
    )
    columns = [f"dpcache_{boundary}_to_this{of}" for boundary in ("blocks", "output") for of in ("", "_of_steps")]
    peers = [row for row in found["table"] if not row["way"].startswith(("dpcache", "full")) and "error" not in row]
    head = ["peer", "`blocks` / peer", "of steps", "`output` / peer", "of steps"]
    yield table(head, [[row["way"], *(_cell(row[column]) for column in columns)] for row in peers])
    above = [row["way"] for row in peers if max(row[column] for column in columns[::2]) > 1]
    if above:
        yield (
            f"Above 1 as measured: {'; '.join(above)}. Full steps are most of such a loop, and theirs were "
            "shorter there; `of steps` says what the rest is.\n"
        )


def _key_steps(rounds: list[Row], name: str) -> list[float]:
    """Median key step of every loop so named, over the median step of the full loop of its round."""
    ratios = []
    for one in rounds:
        for way, found in one.items():
            if way.startswith(name) and "error" not in found:
                keys = [step for step in found["steps"] if step >= max(found["steps"]) / 2]
                ratios.append(median(keys) / median(one["full"]["steps"]))
    return ratios


def _cell(cell: Any) -> str:
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _profile(found: Row, full_step: float) -> Iterable[str]:
    before, after = found["before"], found["after"]
    limit = sum(after[name] for name in LIMIT)
    yield "### One skipped step at the boundary `blocks`\n"
    yield (
        "Median ms of the same pipeline. Before: everything that comes before the blocks runs, as it did until it "
        "was hooked; after: what only the blocks read returns a blank instead (`Layout.feeders` in `run/layouts.py`).\n"
    )
    rows = [[told, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name, told in PARTS_OF_A_STEP.items()]
    rows.append(["**all**", f"**{before['all']:.3f}**", f"**{after['all']:.3f}**"])
    yield table(["", "before", "after"], rows)
    yield (
        f"The head and what it needs take {limit:.3f} ms: the limit. What is left between it and the whole is "
        f"{after['all'] - limit:.3f} ms, {(after['all'] - limit) / (1e3 * full_step):.2%} of a full step: each of the "
        "57 blocks is still called, by way of diffusers' hooks, and passes its inputs through, since loops may count "
        "their blocks (ControlNet adds a residual after each, by its number); then the scheduler and the pipeline's "
        "own Python. At the boundary `output` nothing of the denoiser runs: the step is the weighted sum, the "
        "scheduler and the pipeline.\n"
    )
    yield (
        "No operation of this library waits for the device within the loop, neither in cached runs nor in recorded "
        "ones; `tests/pipelines/test_loop.py` traces every operation and fails on one that reads a value or moves a "
        "tensor.\n"
    )


def _sums(found: Row) -> Iterable[str]:
    told = ", ".join(
        f"{name} {found[name]['pieces']:.1f} ms instead of {found[name]['whole']:.1f}"
        for name in ("float32", "bfloat16")
    )
    yield (
        "The weighted sum goes over the values in pieces whose partial sum, in float32, stays in the cache: one pass "
        f"over memory, and little memory beside. For a value of FLUX.1-dev at 1024 x 1024, three of them: {told} with "
        "one whole tensor after another. It is not one kernel: that would need a compiler where the library runs.\n"
    )


def _calibration(calibration: Row, cost: Row) -> Iterable[str]:
    yield "## Calibration\n"
    yield (
        f"Of the pipeline above, one input, T = 50: {calibration['overhead']:.1%} beyond the full run (median of "
        f"{len(calibration['ratios'])} rounds: {', '.join(f'{r - 1:.1%}' for r in calibration['ratios'])}; the target "
        "is at most 5 %). Values go to host memory as they come, and are held once.\n"
    )
    told = "reached" if cost["speedup"] >= 30 else "missed"
    yield (
        f"The paper's cost tensor at T = 50, D = {cost['width']:,}: {cost['batched']:.2f} s in one batched pass, "
        f"{cost['loop']:.1f} s in the straightforward loop (`straightforward_cost` in `benchmarks/speed.py`: every "
        f"error once, on whole values, one number read back for each): {cost['speedup']:.1f} times faster, largest "
        f"relative difference {cost['difference']:.0e}. The target is 30 times: {told}.\n"
    )
    if cost["speedup"] < 30:
        yield (
            "On one core the loop does not wait, it computes: about eight passes over memory for each of 13 055 "
            "errors. The batched pass keeps its numbers in the cache and makes four passes of vector instructions "
            "over them: multiply and add, subtract, absolute value, sum. Tried and no faster: batched matrix "
            "products of a history of three values with the coefficients; `cdist` and `linalg.vector_norm` of order "
            "1, which join the last passes but use no vector instructions on a CPU; `embedding_bag` with weights; "
            "other sizes of the pieces. Only a kernel that does all four at once would get further, and it would "
            "need a compiler where the library runs. On a GPU the loop waits for the device at every entry, the "
            "batched pass once.\n"
        )


def _planner(found: Row) -> Iterable[str]:
    yield "## Planning\n"
    yield (
        "All budgets in one pass, processor time; random costs, no hop forbidden. Memory is the most that is "
        "allocated, the costs included. The target is T = 50 in 10 ms.\n"
    )
    rows = []
    for row in found["rows"]:
        seconds = f"{1e3 * row['seconds']:.1f} ms" if row["seconds"] < 1 else f"{row['seconds']:.2f} s"
        gap = row["max_gap"] or "none"
        rows.append([row["T"], gap, row["max_key_steps"], seconds, f"{row['cost_mb']:.1f}", f"{row['peak_mb']:.1f}"])
    yield table(["T", "max_gap", "budgets to", "time", "costs, MB", "peak, MB"], rows)
    yield (
        "Without a gap limit time grows as T^4 and memory as T^3: at step j lie paths of at most j + 1 key steps, "
        "gaps of at most j, hops of at most T - j. With a limit W and budgets to K it is K T W^2 and K T W, beside "
        "the cost tensor itself, which takes 8 T^3 bytes.\n\n![growth](performance_planner.svg)\n"
    )


def _startup(found: Row) -> Iterable[str]:
    yield "## Start-up\n"
    nothing = found["nothing"]
    told = {
        "import torch": found["torch"] - nothing,
        "import torch, dpcache": found["both"] - nothing,
        "import dpcache": found["dpcache"] - nothing,
        "import dpcache; dpcache.plan": found["planner"] - nothing,
        "dpcache --help (the whole process)": found["help"],
    }
    yield (
        "Wall-clock time, least of several, less what starting Python takes. Targets: the import 0.3 s beyond torch's, "
        "`--help` 1 s.\n"
    )
    yield table(["", "seconds"], [[name, f"{seconds:.3f}"] for name, seconds in told.items()])


def _gpu(path: Path) -> Iterable[str]:
    yield "## On a GPU\n"
    if not path.exists():
        yield (
            "All this has not been measured on a GPU yet: there was none. `python -m benchmarks.gpu` will measure "
            "FLUX.1-dev, HunyuanVideo and DiT-XL/2 at their published configurations with random weights in "
            "bfloat16: efficiency (the target is 0.98) with and without `torch.compile`, the time of a skipped step, "
            "peak memory, what a calibration adds, the time of the cost tensor, and the peers' loops. It runs at toy "
            "size on the CPU in the tests. Not measured either, for want of a GPU: offloaded values, and that no "
            "step waits for the device, which is asserted by tracing alone.\n"
        )
        return
    from benchmarks.gpu import shown

    yield shown(json.loads(path.read_text()))


def growth(rows: list[Row], path: Path) -> None:
    """Time and memory against T, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dpcache"  # the same file from the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for limited, label in ((False, "all gaps, all budgets"), (True, "gaps to 64, budgets to T / 4")):
        some = [row for row in rows if (row["max_gap"] is not None) == limited]
        for axis, name, unit in ((axes[0], "seconds", "time, s"), (axes[1], "peak_mb", "peak memory, MB")):
            axis.loglog([row["T"] for row in some], [row[name] for row in some], "o-", label=label)
            axis.set(xlabel="T", ylabel=unit)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(root: Path) -> Path:
    """Writes docs/performance.md and its plot, of what has been measured; returns the page's path."""
    results = root / "benchmarks" / "results"
    found = json.loads((results / "speed.json").read_text())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    parts = [
        "# Performance\n",
        "Made by `make bench-speed`; the figures behind it are in `benchmarks/results/speed.json`. "
        f"{found['machine']}; {versions}. Times are of the processor unless said otherwise, taken in turns, for "
        "other work may go on beside it.\n",
    ]
    if "loops" in found:
        found["loops"]["table"] = summed_up(found["loops"]["rounds"])
        parts += _loops(found["loops"])
    if "profile" in found and "loops" in found:
        parts += _profile(found["profile"], found["loops"]["full_step"])
    if "sums" in found:
        parts += _sums(found["sums"])
    if "calibration" in found and "paper_cost" in found:
        parts += _calibration(found["calibration"], found["paper_cost"])
    if "planner" in found:
        parts += _planner(found["planner"])
        growth(found["planner"]["rows"], root / "docs" / "performance_planner.svg")
    if "startup" in found:
        parts += _startup(found["startup"])
    parts += _gpu(results / "gpu.json")
    page = root / "docs" / "performance.md"
    page.write_text("\n".join(parts))
    return page
