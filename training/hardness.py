"""Is a model hard, as large models are? `python -m training.hardness hard-flux` says so, on held-out inputs.

A model is hard if few key steps change its pictures as much as they change those of FLUX. Two numbers are known of it:
with 9 key steps of 50 the paper's plans are at about 19 dB and far above evenly spaced steps (DPCache, arXiv
2602.22654), and the best of all schedules crowd their key steps at the beginning (arXiv 2609.39343).
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import dpcache
from dpcache import Calibration, Comparison, Schedule
from dpcache.zoo import BUNDLED, BundledModel, Inputs, load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STEPS, KEY_STEPS = 50, 9
CALIBRATED = 10
"""Inputs that the paper's plan is made from; other ones than those it is judged on."""
EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0)
ENDS = (38, 42, 46, 49)
PSNRS = (17.0, 26.0)
"""What the paper's plan has to lie between: easier pictures lie above, and below it two pictures have nothing in
common."""
LEAD = 3.0
"""How far, in dB, it has to be above even spacing."""
BATCH = 16
"""Inputs drawn in one call."""


def paper_plan(calibration: Calibration) -> Schedule:
    """The plan of the paper."""
    return calibration.plan(KEY_STEPS, recipe=dpcache.Recipe(method="paper"))


def curve(exponent: float, end: int, key_steps: int = KEY_STEPS) -> tuple[int, ...]:
    """Key steps t = end (m / (K - 1))^exponent, rounded, and moved on where two would be one."""
    wanted = np.rint(end * np.linspace(0, 1, key_steps) ** exponent).astype(int).tolist()
    return tuple(itertools.accumulate(wanted, lambda before, step: max(step, before + 1)))


def is_front_loaded(key_steps: Sequence[int], steps: int = STEPS) -> bool:
    """Whether a third of the key steps lie within the first tenth of all steps."""
    return 3 * sum(10 * step < steps for step in key_steps) >= len(key_steps)


@dataclass(frozen=True)
class Result:
    """How hard a model is."""

    paper: Comparison
    even: tuple[Comparison, ...]
    """Evenly spaced steps with Taylor of order 1 and 2."""
    curves: tuple[Comparison, ...]

    @property
    def best_even(self) -> Comparison:
        """The better of the orders."""
        return max(self.even, key=lambda one: one.psnr_mean)

    @property
    def best_curve(self) -> Comparison:
        """The best of the curves in closed loop."""
        return max(self.curves, key=lambda one: one.psnr_mean)

    @property
    def is_like_published(self) -> bool:
        """Criterion a."""
        paper, even = self.paper.psnr_mean, self.best_even.psnr_mean
        return PSNRS[0] <= paper <= PSNRS[1] and paper >= even + LEAD

    @property
    def is_front_loaded(self) -> bool:
        """Criterion b."""
        return is_front_loaded(self.best_curve.schedule.key_steps)


def together(inputs: Sequence[Inputs], seed: int, call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of few calls that draw all the inputs, each from noise of its own seed."""
    calls = []
    for start in range(0, len(inputs), BATCH):
        some = inputs[start : start + BATCH]
        drawn = {"prompt": list(some)} if isinstance(some[0], str) else {}
        labels = [label for item in some if isinstance(item, dict) for label in item["class_labels"]]
        drawn |= {"class_labels": labels} if labels else {}
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(some))]
        # FluxPipeline wants as many negative prompts as prompts.
        lists = {name: [value] * len(some) for name, value in call.items() if name == "negative_prompt"}
        calls.append({**call, **lists, **drawn, "generator": generators})
    return calls


def measure(pipeline: "DiffusionPipeline", row: BundledModel, count: int, call: Mapping[str, Any]) -> Result:
    """Run the paper's plan, even spacing and the curves on held-out inputs.

    Args:
        pipeline: the model.
        row: where the inputs come from.
        count: how many held-out inputs.
        call: arguments of every call.
    """
    pipeline.set_progress_bar_config(disable=True)
    # The size is an attribute of a bundled pipeline that a directory does not know.
    for attribute, value in row.attributes.items():
        setattr(pipeline, attribute, value)
    inputs = row.calibration_inputs(CALIBRATED)
    calibration = dpcache.calibrate(pipeline, inputs, num_inference_steps=STEPS, progress=False, **call)
    even = [Schedule.uniform(KEY_STEPS, STEPS, order=order) for order in (1, 2)]
    shapes = dict.fromkeys(itertools.starmap(curve, itertools.product(EXPONENTS, ENDS)))
    curves = [Schedule.from_key_steps(keys, STEPS, order=1) for keys in shapes]
    schedules = [paper_plan(calibration), *even, *curves]
    calls = together(row.held_out_inputs(count), 1000, call)
    found = dpcache.compare_all(pipeline, schedules, calls, progress=False)
    return Result(found[0], tuple(found[1:3]), tuple(found[3:]))


def _line(name: str, one: Comparison) -> str:
    keys = ", ".join(map(str, one.schedule.key_steps))
    return f"{name:24s}{one.psnr_mean:6.1f} ({one.psnr_p5:4.1f}) dB   {keys}"


def report(result: Result) -> str:
    """What was found, as text."""
    best = result.best_curve
    lines = [_line("paper's plan", result.paper)]
    lines += [_line(f"even, Taylor {order}", one) for order, one in enumerate(result.even, start=1)]
    ranked = sorted(result.curves, key=lambda one: -one.psnr_mean)
    lines += [_line("best curve, Taylor 1", best), *(_line("", one) for one in ranked[1:4])]
    lines.append(_line("worst curve", ranked[-1]))
    lead = result.paper.psnr_mean - result.best_even.psnr_mean
    verdicts = (
        (result.is_like_published, f"a) the paper's plan is {lead:.1f} dB above even spacing"),
        (result.is_front_loaded, "b) the best curve is front-loaded"),
    )
    lines += [f"{'yes' if holds else 'NO':4s}{text}" for holds, text in verdicts]
    return "\n".join(lines)


def save_pictures(result: Result, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Save full pictures, a row of those of the paper's plan below each row, enlarged without smoothing."""
    from PIL import Image

    samples = result.paper.samples
    samples = samples[: len(samples) // columns * columns]
    frames = np.stack([[one.full, one.cached] for one in samples])
    frames = np.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    side = frames.shape[2]
    sheet = frames.reshape(-1, columns, 2, side, side, 3).transpose(0, 2, 3, 1, 4, 5)
    image = Image.fromarray(np.rint(255 * sheet.reshape(-1, columns * side, 3)).astype(np.uint8))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.hardness",
        description="Say whether a model is hard: mean PSNR (5th percentile) against its full runs.",
        epilog="example: python -m training.hardness runs/hard-flux/pipeline --as hard-flux",
    )
    parser.add_argument("model", help="a bundled model, or a directory in diffusers format")
    parser.add_argument("--as", dest="row", choices=list(BUNDLED), help="whose inputs and call to use [its own]")
    parser.add_argument("--count", type=int, default=16, help="how many held-out inputs [16]")
    parser.add_argument("--guidance", type=float, help="guide by this instead, in two calls")
    parser.add_argument("--shift", type=float, help="sample with this shift instead")
    parser.add_argument("--sheet", type=Path, help="save the pictures, in full and by the paper's plan, in one image")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge as the command line says; returns the exit status, 0 if the model is hard."""
    options = _parse(arguments)
    name = options.row or options.model
    if name not in BUNDLED:
        print(f"error: {name!r} is no known model; say with --as whose inputs to use", file=sys.stderr)
        return 2
    row = BUNDLED[name]
    pipeline = load_pipeline(options.model)
    if options.shift is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=options.shift)
    guided = "true_cfg_scale" if "true_cfg_scale" in row.call_defaults else "guidance_scale"
    given = {} if options.guidance is None else {guided: options.guidance}
    row = replace(row, call_defaults={**row.call_defaults, **given})
    result = measure(pipeline, row, options.count, row.call_defaults)
    shift = pipeline.scheduler.config.get("shift")
    print(f"{options.model}: {options.count} held-out inputs, K = {KEY_STEPS} of {STEPS}, shift {shift}")
    print(f"call: {dict(row.call_defaults)}")
    print(report(result))
    if options.sheet:
        save_pictures(result, options.sheet)
    return 0 if result.is_like_published and result.is_front_loaded else 1


if __name__ == "__main__":
    sys.exit(main())
