"""Planned key steps against evenly spaced ones, on held-out inputs of a bundled model, at equal full calls.

    python -m benchmarks.held_out tiny-flux

Writes benchmarks/results/held_out_<model>.md and .json.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import dpcache
from dpcache.zoo import BUNDLED

RESULTS = Path(__file__).parent / "results"
STEPS = 50
KEY_STEPS = (13, 9)


def measure(model: str, num_inputs: int, num_calibration: int) -> list[dict[str, object]]:
    """One row per number of key steps and way of choosing them."""
    bundled = BUNDLED[model]
    pipe = dpcache.load_pipeline(model)
    arguments = dict(bundled.call_defaults)
    calibration = dpcache.calibrate(
        pipe, bundled.calibration_inputs(num_calibration), num_inference_steps=STEPS, **arguments
    )
    schedules = {}
    for budget in KEY_STEPS:
        schedules[f"{budget} uniform"] = dpcache.Schedule.uniform(budget, STEPS, order=calibration.facts.order)
        schedules[f"{budget} planned"] = calibration.plan(budget)
        schedules[f"{budget} planned, first_key_steps=1"] = calibration.plan(budget, first_key_steps=1)
        schedules[f'{budget} planned, method="paper"'] = calibration.plan(budget, method="paper")
    comparisons = dpcache.compare_all(
        pipe, list(schedules.values()), bundled.held_out_inputs(num_inputs), seeds=1000, **arguments
    )
    return [
        {
            "schedule": name,
            "key_steps": list(c.schedule.key_steps),
            "blocks_run_per_call": c.cached_block_runs / len(c.samples),
            "psnr_mean": c.psnr_mean,
            "psnr_5th_percentile": c.psnr_p5,
            "psnr_worst": c.psnr_worst,
            "ssim_mean": c.ssim_mean,
            "speedup": c.speedup,
            "psnr": [s.psnr for s in c.samples],
        }
        for name, c in zip(schedules, comparisons, strict=True)
    ]


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| key steps of 50 | PSNR mean | 5th percentile | worst | SSIM | speedup | better than uniform |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "uniform" in row["schedule"]:
            uniform, wins = np.array(row["psnr"]), ""
        else:
            wins = f"{int(np.sum(np.array(row['psnr']) > uniform))} of {len(uniform)}"
        lines.append(
            f"| {row['schedule']} | {row['psnr_mean']:.1f} dB | {row['psnr_5th_percentile']:.1f} dB "
            f"| {row['psnr_worst']:.1f} dB | {row['ssim_mean']:.4f} | {row['speedup']:.2f}x | {wins} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-flux", choices=BUNDLED)
    parser.add_argument("--inputs", type=int, default=32, help="held-out inputs (default 32)")
    parser.add_argument("--calibration", type=int, default=5, help="calibration inputs (default 5)")
    options = parser.parse_args()
    rows = measure(options.model, options.inputs, options.calibration)
    RESULTS.mkdir(exist_ok=True)
    stem = f"held_out_{options.model.replace('-', '_')}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
