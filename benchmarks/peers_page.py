"""The page of the comparison with peers, and its plots, from the figures that `benchmarks.peers` has measured."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.bench import CALIBRATED, INPUTS
from benchmarks.subjects import Row, table

OURS = "dpcache"
ABOUT = """# Beside its peers

Made by `make bench` (`python -m benchmarks.peers`); the figures behind it lie next to this page.

Every method is run with the same held-out inputs and seeds, and its settings are searched until it takes as many full
calls as the others: the mean is to be within 0.5 of K, and among settings that reach this the one is taken that has
the highest PSNR on the inputs of the search. These are calibration inputs, with other noise. Where nothing comes within
0.5, the nearest is shown with its true count.

- **full calls**: how often the last transformer block really ran for an output, counted by a plain torch hook inside
  it. What a method runs besides (the first block, the head) does not count, but takes time.
- **PSNR, SSIM**: of decoded outputs against the full run, in float. **5 %**: the 5th percentile.
- **converged**: PSNR of final latents, mean over {converged_inputs} inputs, against the same pipeline with eight or
  more times the steps (the peak is the range of those latents). The full run is itself no more than one approximation
  of that solution, and fewer steps, which know nothing of the full run, can be nearer to it than to the full run.
- **time**: of the sampling loop, as a share of the full run's. It is processor time on one thread, so that other work
  on the machine does not blur it; wall time beside it is worth as much as the machine was idle. In models this small
  what surrounds the blocks weighs much more than in large ones.
- Methods that decide from the values at hand (FirstBlockCache, DBCache) run one input a call, since a batch decides
  together; their times are compared with a full run of one input a call. All others run in batches of 16. Where the
  count varies between inputs, the range is given.
- TaylorSeer of diffusers is its lite mode (whole blocks are skipped) with factors in float32; its default keeps them
  in bfloat16. DBCache is F1 B0: one block runs at skipped steps.
- dpcache is given {inputs} inputs and the default budget ("default", `optimize`'s way), or plans from a calibration on
  {calibrated} of them alone ("one plan", "the paper's plan").
- "dpcache's key steps as mask" gives the schedule that was selected here to cache-dit, which predicts by itself.
"""


def write(directory: Path, order: Iterable[str]) -> Path:
    """The page and one plot a model, from the files of figures in the directory."""
    results = [json.loads(path.read_text()) for name in order if (path := directory / f"peers_{name}.json").exists()]
    parts = [_about(results[0])] if results else []
    for result in results:
        parts.append(_section(result))
        with matplotlib.rc_context({"svg.hashsalt": "dpcache"}):  # the same figures, the same file
            plot(result).savefig(directory / f"peers_{result['model']}.svg", metadata={"Date": None})
    path = directory / "peers.md"
    path.write_text("\n".join(parts))
    return path


def _about(result: Row) -> str:
    return ABOUT.format(converged_inputs=result["converged_inputs"], inputs=INPUTS, calibrated=CALIBRATED)


def _section(result: Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    name = result["model"]
    rows = [row for row in result["rows"] if "cannot_run" not in row]
    full = [row for row in rows if row["k"] == result["steps"]]
    parts = [
        f"## {name} ({result['pipeline']}, {result['scheduler']})\n",
        f"T = {result['steps']}; {result['inputs']} held-out inputs, {result['search_inputs']} to search on; "
        f"converged: {result['converged_steps']} steps. {versions}; {result['machine']}.\n",
        *(f"The full run's latents are {row['latent_psnr_mean']:.1f} dB from the converged ones.\n" for row in full),
        f"![PSNR and full calls of every method on {name}](peers_{name}.svg)\n",
    ]
    for k in sorted({row["k"] for row in result["rows"]} - {result["steps"]}, reverse=True):
        parts += [f"### {name}, K = {k}\n", _table([row for row in rows if row["k"] == k])]
    if any("cannot_run" in row for row in result["rows"]):
        parts += [f"### What does not run on {name}\n", _refusals(result["rows"])]
    if left := sorted({row["method"] for row in rows if "left_behind" in row}):
        parts.append(f"The pipeline gave other outputs afterwards and was loaded anew: {', '.join(left)}.\n")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    body = [
        [
            f"**{row['method']}**" if row["method"].startswith(OURS) else row["method"],
            _calls(row),
            f"{row['psnr_mean']:.1f}",
            f"{row['psnr_p5']:.1f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['ssim_p5']:.4f}",
            f"{row['latent_psnr_mean']:.1f}",
            f"{row['cpu_time']:.2f}",
            f"{row['wall_time']:.2f}",
            _told(row["setting"]),
        ]
        for row in sorted(rows, key=lambda row: -row["psnr_mean"])
    ]
    head = ["method", "full calls", "PSNR, dB", "5 %", "SSIM", "5 %", "converged, dB", "time", "wall", "setting"]
    return table(head, body)


def _calls(row: Row) -> str:
    low, high = row["full_calls_range"]
    return f"{row['full_calls']:.1f} ({low:.0f} to {high:.0f})" if low != high else f"{row['full_calls']:.0f}"


def _told(setting: dict[str, Any]) -> str:
    texts = [
        f"key steps {', '.join(map(str, value))}" if name == "key_steps" else f"{name} {value}"
        for name, value in setting.items()
        if value is not None and name != "source"
    ]
    return "; ".join(texts)


def _refusals(rows: Sequence[Row]) -> str:
    why: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if "cannot_run" in row:
            why.setdefault(row["method"], {}).setdefault(row["cannot_run"], []).append(str(row["k"]))
    body = [
        [method, ", ".join(ks), reason.replace("\n", " ").replace("|", "/")]
        for method, reasons in why.items()
        for reason, ks in reasons.items()
    ]
    return table(["method", "K", "what it said"], body)


def plot(result: Row) -> Any:
    """PSNR of every method against the full calls counted: the mean, and thinner the 5th percentile."""
    methods: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if "cannot_run" not in row and row["k"] != result["steps"]:
            methods.setdefault(row["method"], []).append(row)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for number, (method, rows) in enumerate(methods.items()):
            rows = sorted(rows, key=lambda row: row["full_calls"])
            calls = [row["full_calls"] for row in rows]
            colour, ours = colours[number % len(colours)], method.startswith(OURS)
            axes.plot(
                calls,
                [row["psnr_mean"] for row in rows],
                color=colour,
                marker="oDs^v"[number % 5],
                markersize=5,
                linewidth=2.6 if ours else 1.6,
                label=method,
            )
            axes.plot(calls, [row["psnr_p5"] for row in rows], color=colour, linewidth=0.6, marker=".", markersize=2)
        axes.set_xlabel(f"full calls of {result['steps']}, counted")
        axes.set_ylabel("PSNR against the full run, dB (thin: 5th percentile)")
        axes.set_title(f"{result['model']}: {result['inputs']} held-out inputs", loc="left")
        axes.grid(linewidth=0.4)
        figure.legend(loc="outside right upper", frameon=False)
    return figure
