"""Draws the small pictures that ComfyUI's template browser shows beside the example workflows.

    python integrations/comfyui/thumbnails.py

Four held-out prompts of the bundled `hard-flux`, drawn by diffusers as the workflow of that name has ComfyUI draw:
computed in full (calibrate), with 13 of 50 steps on a smooth curve (key_steps), and with 13 planned from a calibration
of four other prompts (apply). Enlarged; nothing else is done to them. Takes some minutes on a CPU.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import dpcache
from dpcache.zoo import BUNDLED

HERE = Path(__file__).resolve().parent / "example_workflows"
MODEL = BUNDLED["hard-flux"]
STEPS, KEYS = 50, 13
WIDTH, GAP = 192, 4


def main() -> None:
    """Writes the pictures."""
    pipe = dpcache.load_pipeline(MODEL.name)
    pipe.set_progress_bar_config(disable=True)
    inputs = MODEL.calibration_inputs(4)
    calibration = dpcache.calibrate(
        pipe, inputs, num_inference_steps=STEPS, boundary="output", progress=False, **MODEL.call_defaults
    )
    smooth = dpcache.Schedule.smooth(KEYS, STEPS, boundary="output")
    ways = {"calibrate": None, "key_steps": smooth, "apply": calibration.plan(KEYS)}
    for name, schedule in ways.items():
        sheet = Image.new("RGB", (2 * WIDTH + GAP, 2 * WIDTH + GAP), "white")
        for place, picture in enumerate(draw(pipe, schedule)):
            large = picture.resize((WIDTH, WIDTH), Image.Resampling.LANCZOS)
            sheet.paste(large, ((place % 2) * (WIDTH + GAP), (place // 2) * (WIDTH + GAP)))
        path = HERE / f"{name}.jpg"
        sheet.save(path, quality=85, optimize=True)
        print(path, path.stat().st_size)


def draw(pipe: Any, schedule: dpcache.Schedule | None) -> list[Image.Image]:
    """Four held-out prompts, each from noise of its own."""
    pictures = []
    with dpcache.enabled(pipe, schedule) if schedule is not None else nullcontext():
        for seed, call in enumerate(MODEL.held_out_inputs(4)):
            arguments = {"prompt": call} if isinstance(call, str) else call
            generator = torch.Generator().manual_seed(1000 + seed)
            output = pipe(**arguments, **MODEL.call_defaults, num_inference_steps=STEPS, generator=generator)
            pictures += output.images
    return pictures


if __name__ == "__main__":
    main()
