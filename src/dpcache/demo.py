"""The main job on a bundled model, end to end: calibrate, plan, draw in full and cached, report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Comparison, compare_all
from .files import write_whole
from .measuring import calibrate
from .metrics import Picture
from .report import write_report
from .selection import select
from .zoo import BUNDLED, load_pipeline

CALIBRATION_INPUTS, JUDGING_INPUTS = 5, 3
#: K / T: 13 and 9 of 50 steps.
SHARES = (0.26, 0.18)
#: What pictures are written as, by suffix.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}


def run_demo(
    model: str,
    folder: Path,
    num_inputs: int,
    say: Callable[[str], object] = print,
    *,
    num_inference_steps: int = 50,
    progress: bool = True,
) -> tuple[list[Comparison], Path]:
    """Calibrates, selects, compares; writes calibration, schedules, pictures and `report.html` into the folder.

    Returns:
        one Comparison per number of key steps, and the report's path.

    Raises:
        ValueError: not a bundled model, or it has fewer held-out inputs.
    """
    if model not in BUNDLED:
        raise ValueError(f"{model} is not a bundled model; the demo runs on: {', '.join(BUNDLED)}.")
    bundled = BUNDLED[model]
    held_out = bundled.held_out_inputs(num_inputs)
    pipeline = load_pipeline(model)
    inputs = bundled.calibration_inputs(CALIBRATION_INPUTS + JUDGING_INPUTS)
    say(f"calibrating {model} on {CALIBRATION_INPUTS} inputs, {num_inference_steps} steps each")
    calibration = calibrate(
        pipeline,
        inputs[:CALIBRATION_INPUTS],
        num_inference_steps=num_inference_steps,
        sensitivity="measured",
        progress=progress,
        **bundled.call_defaults,
    )
    calibration.save(folder / "calibration.safetensors")
    schedules = []
    for budget in sorted({max(2, round(share * num_inference_steps)) for share in SHARES}, reverse=True):
        # Half the trials and rounds of the default: a demonstration should be short.
        schedule = select(
            pipeline,
            calibration,
            budget,
            inputs=inputs[CALIBRATION_INPUTS:],
            num_trials=4,
            tune=1,
            progress=progress,
            **bundled.call_defaults,
        )
        say(f"selected {schedule}: {schedule.source}")
        schedule.save(folder / f"schedule-{budget}.json")
        schedules.append(schedule)
    say(f"drawing {num_inputs} held-out inputs in full and with {len(schedules)} schedules")
    comparisons = compare_all(pipeline, schedules, held_out, seeds=1000, progress=progress, **bundled.call_defaults)
    for number, sample in enumerate(comparisons[0].samples):
        save_picture(folder / f"{number:02d}-full.png", sample.full)
    for comparison in comparisons:
        for number, sample in enumerate(comparison.samples):
            save_picture(folder / f"{number:02d}-{comparison.schedule.num_key_steps}-key-steps.png", sample.cached)
    report = write_report(
        folder / "report.html",
        title=f"dpcache on {model}",
        model=model,
        calibration=calibration,
        comparisons=comparisons,
        plans=calibration.plan_all(),
    )
    return comparisons, report


def save_picture(path: Path, picture: Picture) -> None:
    """Writes a float picture [H, W, C], or a clip [F, H, W, C] as an animated one, in the format of the suffix.

    Raises:
        ValueError: the suffix is none of PNG, JPEG, WebP and GIF, or JPEG is wanted of a clip.
    """
    from PIL import Image

    kind = _FORMATS.get(path.suffix.lower())
    if kind is None or (kind == "JPEG" and picture.ndim == 4):
        raise ValueError(
            f"{path.name} cannot hold {'a clip' if picture.ndim == 4 else 'a picture'}: use .png or .webp."
        )

    pixels = (picture * 255).round().clip(0, 255).astype(np.uint8)
    first, *others = [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    if others:
        options |= {"save_all": True, "append_images": others, "duration": 125, "loop": 0}
    write_whole(path, lambda part: first.save(part, format=kind, **options))
