"""A calibrator of cache-dit that predicts as a schedule says."""

import dataclasses
from typing import Any

import torch
from cache_dit.caching.cache_contexts.calibrators import CalibratorBase, CalibratorConfig

from .schedules import Schedule, Terms

TYPE = "dpcache"


class ScheduleCalibrator(CalibratorBase):
    """Keeps the values of key steps, and gives their multiples at the steps between.

    Args:
        schedule: what to follow.
        corrects: whether key steps make up for errors: only where the head reads.
    """

    def __init__(self, schedule: Schedule, corrects: bool) -> None:
        self._schedule, self._corrects = schedule, corrects
        self._last_uses = schedule.last_uses
        self.reset_cache()

    def reset_cache(self, *args: Any, **kwargs: Any) -> None:
        """Another request begins."""
        self._step = -1
        self._kept: dict[str, dict[int, torch.Tensor]] = {}

    def mark_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The next step begins."""
        self._step += 1

    def update(self, Y: torch.Tensor, name: str = "default") -> None:
        """A value was computed; it is corrected in place."""
        kept = self._kept.setdefault(name, {})
        terms = self._schedule.corrections.get(self._step, ()) if self._corrects else ()
        if terms or self._last_uses.get(self._step, -1) > self._step:
            kept[self._step] = Y.detach().clone()
        if terms:
            Y.copy_((Y.float() + _sum(terms, kept)).to(Y.dtype))
        self._drop(kept)

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The value of a skipped step."""
        kept = self._kept[name]
        terms = self._schedule.predictions[self._step]
        found = _sum(terms, kept).to(kept[terms[0][0]].dtype)
        self._drop(kept)
        return found

    def _drop(self, kept: dict[int, torch.Tensor]) -> None:
        for key in [key for key in kept if self._last_uses.get(key, -1) <= self._step]:
            del kept[key]


def _sum(terms: Terms, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """In float32, whatever the dtype of the values."""
    total = torch.zeros_like(kept[terms[0][0]], dtype=torch.float32)
    for key, coefficient in terms:
        total.add_(kept[key], alpha=coefficient)
    return total


@dataclasses.dataclass
class ScheduleCalibratorConfig(CalibratorConfig):
    """What cache-dit makes a `ScheduleCalibrator` from."""

    enable_calibrator: bool = True
    enable_encoder_calibrator: bool = True
    calibrator_type: str = TYPE
    calibrator_cache_type: str = "hidden_states"
    schedule: "Schedule | None" = None
    corrects: bool = False

    def strify(self, **kwargs: Any) -> str:
        """A short name, for logs."""
        return f"dpcache_{self.schedule.name}" if self.schedule else TYPE

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments of `ScheduleCalibrator`."""
        return {"schedule": self.schedule, "corrects": self.corrects}
