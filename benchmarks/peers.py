"""This library beside the caches and solvers that people use, at equal full calls, on the bundled models.

    python -m benchmarks.peers                        # every bundled model, then the page and the plots: `make bench`
    python -m benchmarks.peers hard-flux -k 9 --inputs 16   # one model, sooner
    python -m benchmarks.peers --quick                # does it all run? a minute at toy size, into a directory apart
    python -m benchmarks.peers --resume               # go on after an interruption
    python -m benchmarks.peers --page-only            # the page from the figures already measured

Writes benchmarks/results/peers_<model>.json, peers_<model>.svg and peers.md.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import peers_page
from benchmarks.bench import SEARCH_INPUTS, Bench, Outcome
from benchmarks.peer_methods import FULL_NAME, METHODS, Method
from benchmarks.subjects import RESULTS, STEPS, Pictures, Row, plain, rounded, scores
from dpcache.judge.metrics import ssim
from dpcache.judge.ways import FULL, Way
from dpcache.zoo import BUNDLED

BUDGETS = (20, 13, 9)
"""Full calls of 50: 2.5, 3.85 and 5.6 times fewer."""
CONVERGED_INPUTS = 16


def measure(
    model: str,
    path: Path,
    *,
    inputs: int = 64,
    steps: int = STEPS,
    budgets: Sequence[int] = BUDGETS,
    methods: Sequence[Method] = METHODS,
    resume: bool = False,
) -> None:
    """All figures of one model, written to the file after every row."""
    bench = Bench(model, inputs, steps)
    converged = bench.run(FULL, bench.inputs[:CONVERGED_INPUTS], CONVERGED_INPUTS, steps=bench.fine_steps).latents
    result = json.loads(path.read_text()) if resume and path.exists() else _head(bench)
    done = {(row["method"], row["k"]) for row in result["rows"]}
    if (FULL_NAME, steps) not in done:
        figures = _figures(bench, bench.full, 16, converged)
        kept = ("full_calls", "latent_psnr_mean", "cpu_time", "wall_time")
        _add(result, {"method": FULL_NAME, "k": steps, **{name: figures[name] for name in kept}}, path)
    for method in methods:
        for k in budgets:
            if (method.name, k) not in done:
                row = {"method": method.name, "k": k, **_row(bench, method, k, converged)}
                _add(result, row, path)
                tqdm.write(f"{model}: {method.name}, K = {k}: {row.get('full_calls')} {row.get('psnr_mean')}")
        bench.renew()
    bench.bar.close()


def _add(result: Row, row: Row, path: Path) -> None:
    result["rows"].append(json.loads(json.dumps(row, default=plain)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")


def _head(bench: Bench) -> Row:
    return {
        "model": bench.model.name,
        "pipeline": type(bench.pipe).__name__,
        "scheduler": type(bench.pipe.scheduler).__name__,
        "inputs": len(bench.inputs),
        "search_inputs": SEARCH_INPUTS,
        "converged_inputs": min(CONVERGED_INPUTS, len(bench.inputs)),
        "converged_steps": bench.fine_steps,
        "steps": bench.steps,
        "versions": {name: version(name) for name in ("torch", "diffusers", "cache-dit")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32 on the CPU",
        "rows": [],
    }


def _row(bench: Bench, method: Method, k: int, converged: Pictures) -> Row:
    """One method at one budget, or why it cannot run."""
    try:
        setting = method.search(bench, k)
        outcome = bench.run(setting, bench.inputs, method.batch)
    except Exception as error:  # whatever a peer raises is its answer
        bench.renew()
        return {"cannot_run": f"{type(error).__name__}: {error}"}
    row = {"setting": _told(setting), "batch": method.batch, **_figures(bench, outcome, method.batch, converged)}
    if left := bench.left_behind():
        row["left_behind"] = left
        bench.renew()
    return row


def _told(setting: Way) -> Row:
    return setting.told | ({"steps": setting.steps} if setting.steps else {})


def _figures(bench: Bench, outcome: Outcome, batch: int, converged: Pictures) -> Row:
    pairs = list(zip(bench.full.pictures, outcome.pictures, strict=True))
    similar = [ssim(a, b) for a, b in pairs]
    errors = ((outcome.latents[: len(converged)] - converged) ** 2).reshape(len(converged), -1).mean(axis=1)
    reference, of = (bench.full, bench.inputs) if batch > 1 else (bench.full_one_by_one, bench.search_inputs)
    return {
        "full_calls": bench.full_calls(outcome),
        "full_calls_range": [min(outcome.block_runs) / bench.branches, max(outcome.block_runs) / bench.branches],
        **scores(bench.full.pictures, outcome.pictures),
        "ssim_mean": np.mean(similar),
        "ssim_p5": np.percentile(similar, 5),
        "latent_psnr_mean": np.mean(-10 * np.log10(errors / np.ptp(converged) ** 2)),
        "cpu_time": outcome.cpu_seconds / len(bench.inputs) / (reference.cpu_seconds / len(of)),
        "wall_time": outcome.wall_seconds / len(bench.inputs) / (reference.wall_seconds / len(of)),
    }


def present() -> list[str]:
    return [name for name, model in BUNDLED.items() if model.directory.is_dir()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.peers tiny-dit --inputs 16",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(BUNDLED)} (default: all)")
    parser.add_argument("-k", "--key-steps", type=int, nargs="+", default=BUDGETS, help="K (default 20, 13 and 9)")
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are measured already")
    parser.add_argument("--quick", action="store_true", help="2 inputs, 10 steps, two peers, into a new directory")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write page and plots")
    options = parser.parse_args()
    if unknown := set(options.models) - set(BUNDLED):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(BUNDLED)}")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    out, models, size = (
        options.out,
        options.models or present(),
        {"inputs": options.inputs, "budgets": options.key_steps},
    )
    if options.quick:
        out = Path(tempfile.mkdtemp(prefix="peers-")) if options.out == RESULTS else options.out
        models, size = options.models or ["tiny-flux"], QUICK
    for model in () if options.page_only else models:
        measure(model, out / f"peers_{model}.json", resume=options.resume, **size)
    page = peers_page.write(out, BUNDLED)
    print(f"wrote {page}")


QUICK: dict[str, Any] = {
    "inputs": 2,
    "steps": 10,
    "budgets": (5,),
    "methods": tuple(
        method for method in METHODS if method.name in ("uniform interval, Taylor 2", "diffusers TaylorSeer")
    ),
}

if __name__ == "__main__":
    main()
