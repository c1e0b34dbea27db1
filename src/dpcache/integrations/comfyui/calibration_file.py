"""The calibration file that a node adds its runs to, whoever else does: checked before a run, merged under a lock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from dpcache.errors import CalibrationError, DPCacheError
from dpcache.measure.calibration import Calibration
from dpcache.measure.calibration_file import Facts
from dpcache.measure.recording import RecordedRun
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import ModelIdentity

#: Files that were started over in this process. ComfyUI makes nodes anew as it likes; a file is started over once.
_STARTED_OVER: set[Path] = set()
#: Of the Taylor prediction whose errors the paper's cost holds, where no order is asked for.
_ORDER = 2
#: So many seconds another writer is waited for.
_PATIENCE = 60
_REMEDY = "Give another name, or start over."
_PIPELINE = "ComfyUI"


@dataclass(frozen=True)
class CalibrationFile:
    """Where the runs of a MODEL go.

    Attributes:
        path: of the calibration.
        key_steps: if above 0, also plan for so many key steps after every run.
        schedule_path: of that plan.
        order: of the Taylor prediction to plan for; None: whatever plans best.
        append: add to what the file holds already; else the first run in this process starts it over, and what it held
            is kept beside it, with `.old` after its name.
        model: whose runs these are.
        prediction: as in `Facts`.
    """

    path: Path
    key_steps: int
    schedule_path: Path
    order: int | None
    append: bool
    model: ModelIdentity
    prediction: str

    def check(self, levels: Sequence[float], sampler: str) -> None:
        """Checks that a run can be added, before it is made.

        Args:
            levels: its noise levels, the last where it ends.
            sampler: its name.

        Raises:
            CalibrationError: it cannot.
            FileFormatError: the file is damaged or something else.
        """
        if not self._starts_over and self.path.exists():
            self._check_same(Calibration.load(self.path).facts, levels, sampler)
        steps = len(levels) - 1
        if self.key_steps > steps:
            raise CalibrationError(
                f"{self.key_steps} key steps cannot be planned for a run of {steps} steps: lower key_steps, or 0 to "
                "plan later."
            )
        if self.order is not None and steps <= self.order:
            raise CalibrationError(f"order {self.order} needs more than {steps} steps: lower the order.")

    def add(self, run: RecordedRun, sampler: str) -> str:
        """Adds a run that has been made.

        Returns:
            what was done; or why nothing was, in words: the picture has been drawn by now and is not to be lost.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=_PATIENCE):
                return self._add(run, sampler)
        except (DPCacheError, OSError) as error:
            return f"the run was not added to {self.path.name}: {error}"

    def _add(self, run: RecordedRun, sampler: str) -> str:
        from dpcache.measure.measuring import from_run

        if self._starts_over and self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        known = Calibration.load(self.path) if self.path.exists() else None
        order, model = min(_ORDER if self.order is None else self.order, run.num_steps - 1), self.model
        if known is not None:
            assert run.sigmas is not None
            self._check_same(known.facts, run.sigmas, sampler)
            # Levels of another device may differ in the last digit, and weights not be known.
            run, order, model = replace(run, sigmas=known.facts.sigmas), known.facts.order, known.facts.model
        if len(run.received) < run.num_steps:
            raise CalibrationError("what the sampler was given was not seen at every step: sample with another guider.")
        added = from_run(
            run,
            boundary="output",
            order=order,
            model=model,
            pipeline=_PIPELINE,
            scheduler=sampler,
            prediction=self.prediction,
        )
        whole = Calibration.merged([known, added]) if known is not None else added
        whole.save(self.path)
        if not self.append:
            _STARTED_OVER.add(self.path.resolve())
        runs = whole.facts.num_inputs
        said = f"{self.path.name} holds {runs} run{'s' if runs > 1 else ''}"
        if not self.key_steps:
            return said
        schedule = whole.plan(self.key_steps, recipe=Recipe(order=self.order))
        schedule.save(self.schedule_path)
        return f"{said}; {self.schedule_path.name} computes {schedule.num_key_steps} of {run.num_steps} steps"

    @property
    def _starts_over(self) -> bool:
        return not self.append and self.path.resolve() not in _STARTED_OVER

    def _check_same(self, facts: Facts, levels: Sequence[float], sampler: str) -> None:
        known, steps = facts.sigmas or (), len(levels) - 1
        pairs = zip(known, levels, strict=False)
        if facts.pipeline != _PIPELINE:
            wrong = f"was calibrated with {facts.pipeline}, not in ComfyUI"
        elif not facts.model.is_same(self.model):
            wrong = f"holds runs of another model, {facts.model.denoiser} with other weights or another configuration"
        elif facts.prediction != self.prediction:
            wrong = f"holds runs of a model of {facts.prediction}, this one is of {self.prediction}"
        elif facts.scheduler != sampler:
            wrong = f"holds runs with the sampler {facts.scheduler}, this one is with {sampler}"
        elif facts.num_inference_steps != steps:
            wrong = f"holds runs of {facts.num_inference_steps} steps, this one has {steps}"
        elif not all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in pairs):
            wrong = "holds runs on other noise levels (scheduler, shift or denoise)"
        else:
            return
        raise CalibrationError(f"{self.path.name} {wrong}. {_REMEDY}")
