"""What a skipped step costs with two versions of the package, in one run.

    python -m benchmarks.skipped --against ../other/src

A FLUX of 19 + 38 blocks, 128 wide, random weights; all but three of 50 steps are skipped. Each version has a process
of its own; they take turns. Prints ms of a whole step of the loop, the scheduler's share included: least and median.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS, ROUNDS, REPEATS = 50, 3, 5


def measure(boundary: str) -> list[float]:
    """Median ms of a skipped step, for each of several generations."""
    import diffusers
    import torch

    import dpcache

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=32,
        num_attention_heads=4,
        in_channels=16,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, shift_factor=0.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)

    def generation() -> float:
        marks: list[float] = []

        def mark(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            marks.append(time.perf_counter())
            return given

        pipe(
            prompt_embeds=torch.zeros(1, 16, 64),
            pooled_prompt_embeds=torch.zeros(1, 64),
            height=64,
            width=64,
            num_inference_steps=STEPS,
            output_type="latent",
            callback_on_step_end=mark,
        )
        return 1e3 * statistics.median([after - before for before, after in pairwise(marks)][5:])

    schedule = dpcache.Schedule.from_key_steps((0, 1, 2), STEPS, boundary=boundary)
    with dpcache.enabled(pipe, schedule):
        generation()
        return [generation() for _ in range(REPEATS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the src folder of the other version")
    parser.add_argument("--measure", choices=("blocks", "output"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(*measure(options.measure))
        return
    sources = {"this version": Path(__file__).parents[1] / "src"}
    if options.against is not None:
        sources["the other"] = options.against.resolve()
    for boundary in ("blocks", "output"):
        found: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(ROUNDS):
            for name, source in sources.items():
                command = [sys.executable, __file__, "--measure", boundary]
                told = subprocess.run(
                    command, env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True, check=True
                )
                found[name] += [float(number) for number in told.stdout.split("\n")[-2].split()]
        for name, times in found.items():
            print(f"{boundary:8}{name:14}{min(times):8.3f}{statistics.median(times):8.3f} ms", flush=True)


if __name__ == "__main__":
    main()
