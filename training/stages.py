"""The training loop of the bundled models: fixed seed, averaged weights, checkpoints that resume exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.muon import Muon


class Interrupted(Exception):
    """Training stopped early, on request; the checkpoint holds all of it."""


@dataclass(frozen=True)
class Stage:
    """One model to train, and how."""

    name: str
    """File name of the stage's checkpoint, and what the progress bar says."""
    model: nn.Module
    """Everything this stage trains; parameters that require no gradient stay as they are."""
    loss: Callable[[torch.Generator], Tensor]
    """Draws one batch with the generator (on the CPU) and returns its loss, a scalar."""
    steps: int
    matrices: Callable[[str], bool]
    """Which weights of two or more dimensions, by name, are hidden matrices that Muon trains; AdamW trains the rest."""
    matrix_rate: float
    """Peak learning rate of Muon; all rates warm up linearly for a short while, then follow half a cosine to zero."""
    other_rate: float
    """Peak learning rate of AdamW."""
    average: float
    """Decay of the running average of the weights that the finished stage keeps, 0 to below 1."""


def _pace(step: int, steps: int) -> float:
    """The learning rate at a step, as a fraction of its peak."""
    warmup = max(1, min(100, steps // 20))
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _write(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


class _Run:
    """The state of one stage's training, which a checkpoint holds in full."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.step = 0
        self.smooth_loss = 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
        self.averaged = {name: p.detach().clone() for name, p in self.weights.items()}
        matrices = [p for name, p in self.weights.items() if p.ndim > 1 and stage.matrices(name)]
        others = [p for name, p in self.weights.items() if p.ndim < 2 or not stage.matrices(name)]
        self.muon = Muon(matrices, lr=stage.matrix_rate)
        self.adam = torch.optim.AdamW(others, lr=stage.other_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.smooth_loss = state["step"], state["smooth_loss"]
        self.generator.set_state(state["generator"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(state["weights"][name])
                self.averaged[name].copy_(state["averaged"][name])

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "steps": self.stage.steps,
            "smooth_loss": self.smooth_loss,
            "generator": self.generator.get_state(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "weights": {name: p.detach() for name, p in self.weights.items()},
            "averaged": self.averaged,
        }
        _write(state, path)

    def advance(self) -> None:
        pace = _pace(self.step, self.stage.steps)
        loss = self.stage.loss(self.generator)
        self.stage.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for optimizer, rate in ((self.muon, self.stage.matrix_rate), (self.adam, self.stage.other_rate)):
            optimizer.param_groups[0]["lr"] = pace * rate
            optimizer.step()
        # The average starts short, or the first random weights would stay in it for long.
        decay = min(self.stage.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.values()), [p.detach() for p in self.weights.values()], 1 - decay)
        self.smooth_loss += (loss.item() - self.smooth_loss) / min(self.step + 1, 100)
        self.step += 1

    def keep_average(self) -> None:
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(self.averaged[name])


def train_stage(
    stage: Stage,
    checkpoint: Path,
    *,
    seed: int,
    save_every: int = 200,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> float:
    """Train one stage, or what is left of it, and leave the averaged weights in its model.

    Args:
        stage: what to train.
        checkpoint: file to resume from if it exists, and to save to; kept when finished, so that a finished stage is
            loaded instead of trained again.
        seed: seed of all that the loss draws.
        save_every: steps between two checkpoints.
        should_stop: asked before every step, with the number of steps done.

    Returns:
        The loss, averaged over about the last hundred steps.

    Raises:
        Interrupted: if `should_stop` said so; the checkpoint is saved.
        ValueError: if the checkpoint is of a run with another number of steps.
    """
    run = _Run(stage, seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] != stage.steps:
            raise ValueError(
                f"{checkpoint} is of a run of {state['steps']} steps, not {stage.steps}; give --restart to start afresh"
            )
        run.load(state)
    with tqdm(total=stage.steps, initial=run.step, desc=stage.name, mininterval=1) as bar:
        while run.step < stage.steps:
            if should_stop(run.step):
                run.save(checkpoint)
                raise Interrupted(f"stopped {stage.name} after step {run.step} of {stage.steps}")
            run.advance()
            bar.update()
            bar.set_postfix(loss=f"{run.smooth_loss:.4f}", refresh=False)
            if run.step % save_every == 0 or run.step == stage.steps:
                run.save(checkpoint)
    run.keep_average()
    return run.smooth_loss
