"""What is left of a schedule when another program runs it: this library beside what it exports to cache-dit.

    python -m benchmarks.exported        # tiny-flux, 13 of 50 steps, 16 held-out inputs: a few minutes
    python -m benchmarks.exported -k 9   # prints only

Prints a table; without arguments it is also written to benchmarks/results/exported.md.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import dpcache
from benchmarks.bench import Bench, Outcome, Setting
from benchmarks.peer_methods import scheduled
from benchmarks.subjects import RESULTS, STEPS, scores, table
from dpcache.integrations import cache_dit as exports
from dpcache.run.denoisers import find_blocks, find_denoisers

KEY_STEPS = 13
ABOUT = """# Exported schedules

Made by `python -m benchmarks.exported`. {model}, {inputs} held-out inputs in one batch, T = {steps}; cache-dit
{cache_dit}, diffusers {diffusers}, torch {torch}, {machine}. PSNR of decoded outputs against the full run, in float.
Steps are those at which a layer inside the last block really ran, seen by a plain torch hook.

"""


@contextmanager
def cache_dit_enabled(pipe: Any, arguments: dict[str, Any]) -> Iterator[None]:
    import cache_dit

    cache_dit.enable_cache(pipe, **arguments)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def as_exported(schedule: dpcache.Schedule) -> Setting:
    return Setting(partial(cache_dit_enabled, arguments=exports.export(schedule).arguments()), {})


def as_vllm_omni_says(schedule: dpcache.Schedule) -> Setting:
    """The settings for vLLM-Omni, which hands them to cache-dit as they are."""
    import cache_dit

    settings = exports.vllm_omni(schedule) | {"num_inference_steps": schedule.num_inference_steps}
    read = cache_dit.load_configs({"cache_config": settings | {"enable_encoder_taylorseer": bool(schedule.order)}})
    arguments = {name: read[name] for name in ("cache_config", "calibrator_config")}
    return Setting(partial(cache_dit_enabled, arguments=arguments), {})


def run(bench: Bench, setting: Setting) -> tuple[Outcome, list[int]]:
    """The held-out inputs, and the steps at which the last block ran."""
    denoiser = find_denoisers(bench.pipe)[0]
    steps: list[int] = []
    step = -1

    def begin(*call: Any) -> None:
        nonlocal step
        step += 1

    hooks = [
        denoiser.register_forward_pre_hook(begin),
        find_blocks(denoiser)[-1].layer().register_forward_hook(lambda *call: steps.append(step)),
    ]
    try:
        return bench.run(setting, bench.inputs, len(bench.inputs)), steps
    finally:
        for hook in hooks:
            hook.remove()


def page(bench: Bench, schedules: dict[str, dpcache.Schedule]) -> str:
    head = ["schedule", "run by", "full calls", "the planned steps", "PSNR, dB", "worst"]
    body = []
    for name, schedule in schedules.items():
        ways = {
            "dpcache": scheduled(schedule),
            f"cache-dit, exported mask, TaylorSeer {schedule.order}": as_exported(schedule),
            "cache-dit, what vLLM-Omni can be told": as_vllm_omni_says(schedule),
        }
        for way, setting in ways.items():
            outcome, steps = run(bench, setting)
            found = scores(bench.full.pictures, outcome.pictures)
            exactly = "exactly" if tuple(steps) == schedule.key_steps else "others"
            body.append([name, way, len(steps), exactly, f"{found['psnr_mean']:.1f}", f"{min(found['psnr']):.1f}"])
    versions = {name.replace("-", "_"): version(name) for name in ("cache-dit", "diffusers", "torch")}
    about = ABOUT.format(
        model=bench.model.name, inputs=len(bench.inputs), steps=bench.steps, machine=platform.machine(), **versions
    )
    planned = "\n".join(f"{name}: key steps {', '.join(map(str, s.key_steps))}.\n" for name, s in schedules.items())
    return f"{about}{planned}\n{table(head, body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=16, help="held-out inputs (default 16)")
    parser.add_argument("-k", "--key-steps", type=int, default=KEY_STEPS, help=f"K (default {KEY_STEPS})")
    options = parser.parse_args()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    bench = Bench("tiny-flux", options.inputs, STEPS)
    schedules = {
        "one plan, Taylor 2": bench.calibration.plan(options.key_steps),
        "one plan, Taylor 1": bench.calibration.plan(options.key_steps, recipe=dpcache.Recipe(order=1)),
        "even spacing, Taylor 2": dpcache.Schedule.uniform(options.key_steps, STEPS),
        "optimized": bench.selected(options.key_steps),
    }
    found = page(bench, schedules)
    bench.bar.close()
    print(found)
    if (options.inputs, options.key_steps) == (16, KEY_STEPS):
        (RESULTS / "exported.md").write_text(found)


if __name__ == "__main__":
    main()
