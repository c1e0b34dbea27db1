"""The bundled models as benchmarks use them: held-out inputs drawn in batches, scores, and tables for the pages."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

import dpcache
from dpcache.judge.metrics import psnr
from dpcache.run.inputs import call_arguments, label
from dpcache.zoo import BUNDLED, Inputs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 50
WARM, COLD = ("red", "orange", "yellow", "pink"), ("green", "cyan", "blue", "purple")
FIRST_SEED = 1000
"""Of held-out inputs; calibration counts from 0."""

Pictures = npt.NDArray[np.float32]
Row = dict[str, Any]


class Subject:
    """A bundled model, and its outputs drawn in batches."""

    def __init__(self, model: str, num_inputs: int) -> None:
        self.model = BUNDLED[model]
        self.pipe = dpcache.load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.inputs = self.model.held_out_inputs(num_inputs)
        self.bar = tqdm(desc=model, unit="picture")

    def draw(self, schedule: dpcache.Schedule | None = None, steps: int = STEPS) -> tuple[Pictures, int]:
        """Every held-out input, in full or with a schedule; and the denoiser calls run in full for each batch."""
        return self.drawn(self.inputs, schedule, steps)

    def drawn(
        self, inputs: Sequence[Inputs], schedule: dpcache.Schedule | None, steps: int, batch: int = 16
    ) -> tuple[Pictures, int]:
        """As `draw`, with other inputs."""
        pictures: list[Pictures] = []
        calls = 0
        for arguments in self.batches(inputs, steps, batch):
            if schedule is None:
                output = self.pipe(**arguments)
            else:
                with dpcache.enabled(self.pipe, schedule):
                    output = self.pipe(**arguments)
                    calls = dpcache.stats(self.pipe).full_calls
            pictures.extend(np.asarray(output[0], dtype=np.float32))
            self.bar.update(len(arguments["generator"]))
        return np.stack(pictures), calls

    def batches(
        self, inputs: Sequence[Inputs], steps: int, batch: int, first_seed: int = FIRST_SEED
    ) -> Iterator[dict[str, Any]]:
        """Arguments of the pipeline's calls; every input has its own seed, whatever the batch."""
        for start in range(0, len(inputs), batch):
            some = call_arguments(inputs[start : start + batch], {})
            varying = {name: [value for item in some for value in _listed(item[name])] for name in some[0]}
            generators = [torch.Generator().manual_seed(first_seed + start + row) for row in range(len(some))]
            arguments = {"num_inference_steps": steps, "output_type": "np", "generator": generators}
            # FluxPipeline wants as many negative prompts as prompts.
            usual = {k: [v] * len(some) if k == "negative_prompt" else v for k, v in self.model.call_defaults.items()}
            yield {**arguments, **usual, **varying}

    def uncalibrated(self, num_key_steps: int, steps: int = STEPS) -> dpcache.Schedule:
        """What `enable(pipe, num_key_steps=K)` follows: a short call has the scheduler know its steps."""
        from dpcache.run.plans import Curves  # `benchmarks.worth` runs with a package that has none

        (call,) = self.batches(self.inputs[:1], steps, 1)
        with dpcache.enabled(self.pipe, num_key_steps=1):
            self.pipe(**call)
        return Curves(num_key_steps).of(steps, self.pipe.scheduler)

    def calibrate(self, inputs: Sequence[Inputs], **more: Any) -> dpcache.Calibration:
        arguments = {**self.model.call_defaults, **more}
        return dpcache.calibrate(self.pipe, inputs, num_inference_steps=STEPS, progress=False, **arguments)

    def coloured(self, colours: Sequence[str], count: int) -> list[Inputs]:
        """The first calibration inputs of some colours."""
        pool = self.model.calibration_pool()
        texts = [label(self.pipe, call) for call in call_arguments(pool[:2000], {})]
        return [item for item, text in zip(pool, texts, strict=False) if set(text.split()) & set(colours)][:count]


def regime(model: str) -> str:
    """Of a bundled model: whether few steps are within reach of many, or far from them as with real ones."""
    return "hard" if model.startswith("hard") else "easy"


def titled(model: str) -> str:
    """A bundled model with its regime, for people."""
    return f"{model} ({regime(model)})"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def scores(full: Pictures, other: Pictures) -> Row:
    """PSNR of every output, in dB and in float, summed up."""
    values = [psnr(a, b) for a, b in zip(full, other, strict=True)]
    row: Row = {"psnr_mean": np.mean(values), "psnr_p5": np.percentile(values, 5), "psnr": values}
    if full.ndim == 5:
        frames = [[psnr(a, b) for a, b in zip(*clips, strict=True)] for clips in zip(full, other, strict=True)]
        row["psnr_by_frame"] = np.mean(frames, axis=0)
    return row


def shown(row: Row) -> str:
    """Mean and 5th percentile of what `scores` found, in dB, for people."""
    return f"{row['psnr_mean']:.1f} ({row['psnr_p5']:.1f})"


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
