"""A bundled model on which any cache can be tried: what really ran is counted, and nothing of it may stay behind."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

import dpcache
from benchmarks.subjects import FIRST_SEED, Pictures, Subject
from dpcache.judge.metrics import psnr
from dpcache.judge.ways import FULL, Way
from dpcache.run.denoisers import find_blocks, find_denoisers
from dpcache.zoo import Inputs

INPUTS, CALIBRATED = 16, 10
"""Inputs that `optimize` is given, and how many of them single plans are made from."""
SEARCH_INPUTS = 8
SEARCH_SEED = 2_000_000
"""Settings are searched on inputs of the calibration, from noise that nothing else is drawn from."""
FINER = 8
"""So many times the steps of the full run, at least, are taken for the converged solution."""


@dataclass
class Outcome:
    """What one setting gave: outputs and final latents, and what the loops of all calls took together."""

    pictures: Pictures
    latents: Pictures
    block_runs: list[int]
    """Of the last block, in each call of the pipeline."""
    cpu_seconds: float
    wall_seconds: float


@dataclass
class _Watch:
    """Plain torch hooks: runs of a layer inside the last block; the loop lies between denoiser and decoder."""

    runs: int = 0
    latents: list[torch.Tensor] = field(default_factory=list)
    started: tuple[float, float] | None = None
    ended: tuple[float, float] = (0.0, 0.0)

    def count(self, *call: Any) -> None:
        self.runs += 1

    def start(self, *call: Any) -> None:
        self.started = self.started or (time.process_time(), time.perf_counter())

    def end(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self.ended = (time.process_time(), time.perf_counter())
        self.latents.append(arguments[0].float().cpu())


class Bench(Subject):
    """A bundled model with its held-out inputs, a few others for searching settings, and the full run of both."""

    def __init__(self, model: str, num_inputs: int, steps: int) -> None:
        super().__init__(model, num_inputs)
        self.steps = steps
        self.search_inputs = self.model.calibration_inputs(SEARCH_INPUTS)
        self.tried: dict[Any, Any] = {}
        self.plain = self._few_steps()
        self.branches = self.run(FULL, self.search_inputs[:1], 1).block_runs[0] / steps

    def run(
        self, setting: Way, inputs: Sequence[Inputs], batch: int, seed: int = FIRST_SEED, steps: int | None = None
    ) -> Outcome:
        """Draws the inputs in batches, as the setting says."""
        pictures: list[Any] = []
        latents: list[torch.Tensor] = []
        runs: list[int] = []
        seconds = np.zeros(2)
        calls = self.batches(inputs, steps or setting.steps or self.steps, batch, seed)
        with self._watched() as watch, setting.applied(self.pipe):
            for arguments in calls:
                watch.runs, watch.started, watch.latents = 0, None, []
                pictures.extend(np.asarray(self.pipe(**arguments)[0], dtype=np.float32))
                runs.append(watch.runs)
                latents.extend(watch.latents)
                seconds += np.subtract(watch.ended, watch.started or watch.ended)
                self.bar.update(len(arguments["generator"]))
        return Outcome(np.stack(pictures), np.concatenate([part.numpy() for part in latents]), runs, *seconds)

    @contextmanager
    def _watched(self) -> Iterator[_Watch]:
        watch = _Watch()
        denoiser = find_denoisers(self.pipe)[0]
        hooks = [
            find_blocks(denoiser)[-1].layer().register_forward_hook(watch.count),
            denoiser.register_forward_pre_hook(watch.start),
            self.pipe.vae.decoder.register_forward_pre_hook(watch.end),
        ]
        try:
            yield watch
        finally:
            for hook in hooks:
                hook.remove()

    def full_calls(self, outcome: Outcome) -> float:
        """Mean over the calls of the pipeline, per branch."""
        return float(np.mean(outcome.block_runs)) / self.branches

    def trial(self, setting: Way, batch: int) -> tuple[float, float]:
        """Full calls and mean PSNR on the inputs of the search."""
        outcome = self.run(setting, self.search_inputs, batch, SEARCH_SEED)
        values = [psnr(a, b) for a, b in zip(self.search_full.pictures, outcome.pictures, strict=True)]
        return self.full_calls(outcome), float(np.mean(values))

    @cached_property
    def search_full(self) -> Outcome:
        return self.run(FULL, self.search_inputs, SEARCH_INPUTS, SEARCH_SEED)

    @cached_property
    def full(self) -> Outcome:
        return self.run(FULL, self.inputs, 16)

    @cached_property
    def full_one_by_one(self) -> Outcome:
        """For the times of what runs with one input a call."""
        return self.run(FULL, self.search_inputs, 1, SEARCH_SEED)

    @property
    def fine_steps(self) -> int:
        """8 T, or the next number that divides the steps of the training: with others DDIM begins later."""
        train = self.pipe.scheduler.config.num_train_timesteps
        return next(steps for steps in range(min(FINER * self.steps, train), train + 1) if train % steps == 0)

    @cached_property
    def calibration(self) -> dpcache.Calibration:
        return dpcache.calibrate(
            self.pipe,
            self.model.calibration_inputs(CALIBRATED),
            num_inference_steps=self.steps,
            sensitivity="measured",
            progress=False,
            **self.model.call_defaults,
        )

    def selected(self, k: int) -> dpcache.Schedule:
        """What this library does when nothing is asked of it."""
        if ("selected", k) not in self.tried:
            self.tried["selected", k] = dpcache.optimize(
                self.pipe,
                self.model.calibration_inputs(INPUTS),
                num_key_steps=k,
                num_inference_steps=self.steps,
                progress=False,
                **self.model.call_defaults,
            )
        return self.tried["selected", k]  # type: ignore[no-any-return]

    def left_behind(self) -> str:
        """What the last setting has changed for good: nothing, or something on the objects, or even the outputs."""
        if not np.array_equal(self._few_steps(), self.plain):
            return "other outputs"
        return ""

    def renew(self) -> None:
        """A pipeline that no setting has touched.

        Raises:
            RuntimeError: its outputs are not those of the first: something is left on a class.
        """
        self.pipe = dpcache.load_pipeline(self.model.name)
        self.pipe.set_progress_bar_config(disable=True)
        if self.left_behind():
            raise RuntimeError(f"a new {type(self.pipe).__name__} does not give the outputs of the first one.")

    def _few_steps(self) -> Pictures:
        (arguments,) = self.batches(self.search_inputs[:1], 3, 1, SEARCH_SEED)
        return np.asarray(self.pipe(**arguments)[0], dtype=np.float32)
