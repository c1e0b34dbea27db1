"""What is gained on the models that people use, and what it costs: docs/gains.md and the rows of README's table.

Both are written by `python -m benchmarks.gains`.

Quality is what was published, with its source: none of these models was run here. Memory is computed from the models'
published configurations, which are the defaults of their classes in diffusers, by `value`; tests/test_gains.py holds
that against what small models of the same classes really take.
"""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

import dpcache
from dpcache.measure import measuring
from dpcache.measure.sensitivity import probing_calls

PAGE, README = (Path(__file__).parents[1] / name for name in ("docs/gains.md", "README.md"))
SPEEDUP = 50 / 13
INPUTS = 10
#: Values held of each call of a step: by Taylor of order 2, the default of plans; by the trend, without a calibration.
HELD, HELD_UNCALIBRATED = 3, 2
BYTES, RECEIVED_BYTES = 2, 4
"""Of a number: bfloat16 at the boundary, float32 of what the scheduler receives."""
SECONDS = {False: 20, True: 600}
"""Of a full run, assumed: of a picture and of a clip."""
DPCACHE = "[DPCache](https://arxiv.org/abs/2602.22654)"
GOLDEN = "[Golden Path](https://arxiv.org/abs/2609.39343)"
UNMEASURED = "unmeasured here"


@dataclass(frozen=True)
class Model:
    """A model at the size that it is published for.

    Attributes:
        name: for people.
        pipeline: class in diffusers; its call's default is T.
        denoiser: class in diffusers.
        size: height, width, and frames.
        packed: pixels of a side, and frames, that become one latent.
        steps: T where the model's own release says another than the pipeline.
        batch: of all calls of a step, with and without the prompt.
        text: tokens of text that the last block returns too.
        audio: tokens of sound.
        config: where it is not the default of the class.
        quality: published, with source.
    """

    name: str
    pipeline: str
    denoiser: str
    size: tuple[int, int, int]
    packed: tuple[int, int] = (8, 1)
    steps: int = 0
    batch: int = 1
    text: int = 0
    audio: int = 0
    config: tuple[tuple[str, Any], ...] = ()
    quality: str = UNMEASURED

    @property
    def short(self) -> str:
        return self.name.split(",")[0]

    @property
    def is_video(self) -> bool:
        return self.size[2] > 1

    def __post_init__(self) -> None:
        if not self.steps:
            call = getattr(diffusers, self.pipeline).__call__
            object.__setattr__(self, "steps", inspect.signature(call).parameters["num_inference_steps"].default)

    @property
    def key_steps(self) -> int:
        return round(self.steps / SPEEDUP)

    def values(self) -> dict[str, int]:
        """Numbers that a step gives at each boundary."""
        defaults = inspect.signature(getattr(diffusers, self.denoiser).__init__).parameters
        config = {name: parameter.default for name, parameter in defaults.items()} | dict(self.config)
        return value(config, self.size, self.packed, self.batch, self.text, self.audio)


#: Sound of LTX-2: a latent for each of 25 frames a second, at 24 frames a second of picture.
SOUND = round(121 / 24 * 25)
FLUX = Model(
    "FLUX.1-dev",
    "FluxPipeline",
    "FluxTransformer2DModel",
    (1024, 1024, 1),
    packed=(16, 1),
    steps=50,  # the model card's example and both papers; diffusers: 28
    quality=f"21.65 dB at K = 13, 18.77 at 9 ({DPCACHE}); 20.94 at 9 by the best of all schedules ({GOLDEN})",
)
HUNYUAN = Model(
    "HunyuanVideo, 129 frames of 720p",
    "HunyuanVideoPipeline",
    "HunyuanVideoTransformer3DModel",
    (720, 1280, 129),
    packed=(8, 4),
    quality=f"23.11 dB at K = 11, 21.04 at 9; VBench 80.35 and 80.23, in full 80.93 ({DPCACHE})",
)
MODELS = (
    FLUX,
    Model("FLUX.2-dev", "Flux2Pipeline", "Flux2Transformer2DModel", (1024, 1024, 1), packed=(16, 1), text=512),
    Model("Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel", (1328, 1328, 1), batch=2),
    Model(
        "Wan 2.1 14B, 81 frames of 720p",
        "WanPipeline",
        "WanTransformer3DModel",
        (720, 1280, 81),
        packed=(8, 4),
        batch=2,
    ),
    Model(
        "Wan 2.2 A14B, 81 frames of 720p",
        "WanPipeline",
        "WanTransformer3DModel",
        (720, 1280, 81),
        packed=(8, 4),
        steps=40,  # sample_steps in the release's wan/configs/wan_t2v_A14B.py; diffusers: 50
        batch=2,
    ),
    HUNYUAN,
    Model(
        "HunyuanVideo 1.5, 121 frames of 720p",
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        (720, 1280, 121),
        packed=(16, 4),
        batch=2,
    ),
    Model(
        "LTX-2, 121 frames of 512 x 768",
        "LTX2Pipeline",
        "LTX2VideoTransformer3DModel",
        (512, 768, 121),
        packed=(32, 8),
        batch=4,  # with and without the prompt, without some blocks, without the other modality: all on by default
        audio=SOUND,
    ),
    Model(
        "SD3.5 large",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        (1024, 1024, 1),
        batch=2,
        config=(("num_attention_heads", 38), ("num_layers", 38)),
    ),
    Model("SDXL", "StableDiffusionXLPipeline", "UNet2DConditionModel", (1024, 1024, 1), batch=2),
)


def value(
    config: dict[str, Any],
    size: tuple[int, int, int],
    packed: tuple[int, int],
    batch: int = 1,
    text: int = 0,
    audio: int = 0,
) -> dict[str, int]:
    """Numbers that a step gives at each boundary; only of the output where the blocks are not described.

    Args:
        config: of the denoiser.
        size: height, width and frames of what is drawn.
        packed: pixels of a side, and frames, that become one latent: the autoencoder's, with what the pipeline packs.
        batch: of all calls of a step.
        text: tokens of text that the last block returns too.
        audio: tokens of sound.
    """
    across, patch_frames = _patch(config)
    height, width, frames = (size[0] // packed[0], size[1] // packed[0], (size[2] - 1) // packed[1] + 1)
    tokens = (height // across) * (width // across) * (frames // patch_frames)
    out = config["out_channels"] or config["in_channels"]
    pixels = tokens * across * across * patch_frames
    found = {"output": batch * (pixels * out + audio * config.get("audio_in_channels", 0))}
    if heads := config.get("num_attention_heads"):
        hidden = heads * config["attention_head_dim"]
        heard = audio * config.get("audio_num_attention_heads", 0) * config.get("audio_attention_head_dim", 0)
        found["blocks"] = batch * ((tokens + text) * hidden + heard)
    return found


def _patch(config: dict[str, Any]) -> tuple[int, int]:
    """Latents of a side, and frames of them, that become one token."""
    patch = config.get("patch_size", 1)
    if isinstance(patch, tuple | list):
        return patch[1], patch[0]
    return patch, config.get("patch_size_t") or 1


def held(model: Model) -> dict[str, float]:
    """Bytes held on the device at each boundary, by a plan."""
    return {where: HELD * count * BYTES for where, count in model.values().items()}


def while_calibrating(model: Model) -> dict[str, float]:
    """Bytes of host memory that one recorded run takes: values of all steps at the boundary, and what was received."""
    received = model.values()["output"] // model.batch * RECEIVED_BYTES
    return {where: model.steps * (count * BYTES + received) for where, count in model.values().items()}


def calibration_runs(steps: int = 50) -> dict[str, float]:
    """What ways to a schedule cost, in full runs: by the defaults of the functions, with so many inputs."""
    tried = measuring.TRIED_INPUTS * (1 + sum(measuring._tried_budgets(steps)) / steps)
    probed = measuring.PROBED_INPUTS * probing_calls(steps) / steps
    budget = inspect.signature(dpcache.optimize).parameters["budget"].default
    return {"plan": INPUTS, "measured": INPUTS + probed + tried, "search": float(budget)}


HEAD = """# What I gain on my model

<!-- Written by `python -m benchmarks.gains`; edit benchmarks/gains.py instead. -->

What to expect of models that many use: how many calls are computed, what quality others have published, and what it
costs in calibration and memory. **None of these models was run here.** Quality is PSNR against the full run of 50
steps, of schedules by the method that this library began with. Where nothing is published it is unmeasured here:
`dpcache bench MODEL` measures it where the weights are. What this library adds to that method is measured on small
models that are as hard ([every default at every K](defaults.md)).

| model | computed | T / K | published quality | one plan | measured plan | search |
|---|---|---|---|---|---|---|
"""

MEMORY = """
Calibration in full runs, and in minutes at {picture} s a picture and {clip} s a clip. These times are assumed:
multiply the runs by your own. *One plan* is `calibrate` with {inputs} inputs; *measured plan*, which large models want,
the same with `sensitivity="measured"`; *search* is `optimize` with its default budget. With nothing calibrated,
`enable(pipe, num_key_steps=K)`, there is nothing to run. T is the default of diffusers' pipeline; for FLUX.1-dev and
Wan 2.2 that of their own releases.

## Memory

For one picture or clip in bfloat16, with the guidance that is on by default: LTX-2 has four values a step. Held on the
device: {held} values of each call of a step by a plan of order 2, {fewer} with nothing calibrated. In host memory while
calibrating: the values of all steps of one run, and what the scheduler received. Computed from the published
configurations; the tests hold the same formula against small models of the same classes.

| model | size | held at `"output"` | held at `"blocks"` | calibrating at `"output"` | at `"blocks"` |
|---|---|---|---|---|---|
"""

AFTER = """
`enable(..., offload=True)` keeps in host memory what is otherwise held on the device. At the boundary `"output"` a
skipped step runs nothing of the denoiser, at `"blocks"` its head. With nothing calibrated it is `"output"`;
`calibrate(..., boundary="output")` makes plans for it.
"""


def render() -> str:
    """The page."""
    gains, memory = [], []
    for model in MODELS:
        seconds = SECONDS[model.is_video]
        runs = [_runs(count, seconds) for count in calibration_runs(model.steps).values()]
        ratio = f"{model.steps / model.key_steps:.2f}"
        cells = (model.name, f"{model.key_steps} of {model.steps}", ratio, model.quality, *runs)
        gains.append(f"| {' | '.join(cells)} |")
        size = " x ".join(map(str, model.size[: 2 + model.is_video]))
        of = [
            _bytes(some.get(where))
            for some in (held(model), while_calibrating(model))
            for where in ("output", "blocks")
        ]
        memory.append(f"| {' | '.join((model.short, size, *of))} |")
    about = MEMORY.format(inputs=INPUTS, picture=SECONDS[False], clip=SECONDS[True], held=HELD, fewer=HELD_UNCALIBRATED)
    return HEAD + "\n".join(gains) + "\n" + about + "\n".join(memory) + "\n" + AFTER


def rows() -> list[str]:
    """README's: a line for each model with published figures, one for the other pictures, one for the other clips."""
    paper = DPCACHE.replace("DPCache", "paper")
    published = {
        FLUX: ("13 of 50", f"21.65 dB, at K = 9 18.77 ({paper}), 20.94 ([best of all](docs/golden.md))"),
        HUNYUAN: ("11 of 50", f"23.11 dB, at K = 9 21.04 ({paper})"),
    }
    found = []
    for known in (FLUX, HUNYUAN):
        others = [model for model in MODELS if model.is_video == known.is_video and model not in published]
        for models in ([known], others):
            runs = [calibration_runs(model.steps) for model in models]
            measured, search = sorted(some["measured"] for some in runs), runs[0]["search"]
            unit = "h" if known.is_video else "min"
            each = SECONDS[known.is_video] / {"h": 3600, "min": 60}[unit]
            cells = [
                ", ".join(model.short for model in models),
                ", ".join(dict.fromkeys(f"{model.key_steps} of {model.steps}" for model in models)),
                UNMEASURED,
                f"{_range([f'{count:.0f}' for count in measured])}, {search:.0f} "
                f"({measured[-1] * each:.0f}, {search * each:.0f} {unit})",
                ", ".join(_held(models, where) for where in ("output", "blocks")),
            ]
            if models == [known]:
                cells[1:3] = published[known]
            found.append(f"| {' | '.join(cells)} |")
    return found


def _held(models: "list[Model]", where: str) -> str:
    amounts = sorted(held(model)[where] for model in models if where in held(model))
    return _range([_bytes(amount) for amount in amounts])


def _range(texts: list[str]) -> str:
    """From the first to the last; a unit that both have is told once."""
    low, high = texts[0], texts[-1]
    unit = f" {high.split()[-1]}" if " " in high else ""
    return high if low == high else f"{low.removesuffix(unit)} to {high}"


def _runs(count: float, seconds: float) -> str:
    minutes = count * seconds / 60
    return f"{count:.0f} ({f'{minutes:.0f} min' if minutes < 100 else f'{minutes / 60:.0f} h'})"


def _bytes(count: "float | None") -> str:
    if count is None:
        return "not described"
    return (
        f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count < 1e7 else f"{count / 1e6:.0f} MB"
    )


def main() -> int:
    PAGE.write_text(render(), encoding="utf-8")
    lines = README.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| model | full calls |")) + 2
    after = lines.index("", first)
    README.write_text("\n".join([*lines[:first], *rows(), *lines[after:], ""]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
