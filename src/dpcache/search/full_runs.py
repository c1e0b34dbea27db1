"""Full runs: what plans are made from, what coefficients are fitted to, and what trials are held against."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import CalibrationError
from dpcache.measure.calibration import Calibration
from dpcache.measure.calibration_file import TENSORS, Facts
from dpcache.measure.measuring import TRIAL_SEED, device_of, from_run
from dpcache.measure.recording import RecordedRun, record
from dpcache.measure.sensitivity import measure, ratios
from dpcache.plan.schedule import Boundary
from dpcache.run.denoisers import find_denoisers, identify
from dpcache.run.inputs import quiet, seeded
from dpcache.run.schedulers import prediction_type

from .objectives import Objective, Output
from .sharing import Spans

#: Of the inputs, the share that coefficients are fitted on. Candidates are judged on the others, plans made from all.
FITTED_SHARE = 1 / 3
#: Of plans that are made from full runs, the highest order of the prediction.
_ORDER = 2


@dataclass(frozen=True)
class Draw:
    """One call of the pipeline with its noise.

    Attributes:
        name: of it in the checkpoint.
        call: its arguments.
        seed: of its noise, where the arguments bring no generator.
    """

    name: str
    call: Mapping[str, Any]
    seed: int


def dealt(calls: Sequence[Mapping[str, Any]], count: int, seed: int) -> tuple[list[Draw], list[Draw]]:
    """What coefficients are fitted on, and what candidates are judged on: so many draws in all.

    Calls are repeated with other noise where there are fewer; those that bring their own noise are not. A single call
    serves for both, as does a single draw.
    """
    fitted = math.ceil(FITTED_SHARE * len(calls))
    sides = calls[:fitted], calls[fitted:] or calls
    fitting = max(1, round(FITTED_SHARE * count))
    found = []
    for name, some, size, first in zip(
        ("fitting", "judging"), sides, (fitting, count - fitting), (seed, TRIAL_SEED + seed), strict=True
    ):
        fresh = len(some) if any(call.get("generator") is not None for call in some) else size
        found.append([Draw(f"{name} {n}", some[n % len(some)], first + n) for n in range(min(size, fresh))])
    return found[0], found[1] or found[0]


@dataclass(frozen=True)
class FullRun:
    """What is kept of a full run.

    Attributes:
        output: what the pipeline returned.
        calibration: what was measured in it; None where there was nothing to measure.
        num_steps: T, the steps that it took; 0 where nobody looked.
        sigmas: its noise levels; None where not known.
        spans: as in `sharing.known_until`.
        samples: as in `RecordedRun`; none where they could not all be seen, None where they were not kept, as in a
            journal.
    """

    output: Output
    calibration: Calibration | None = None
    num_steps: int = 0
    sigmas: tuple[float, ...] | None = None
    spans: Spans = ()
    samples: Mapping[int, torch.Tensor] | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, for a journal."""
        found = self.calibration
        measured = found and {
            "facts": found.facts.model_dump(mode="json"),
            "tensors": {name: _packed(getattr(found, name)) for name in TENSORS},
        }
        return {
            "output": _packed(self.output),
            "calibration": measured,
            "num_steps": self.num_steps,
            "sigmas": self.sigmas,
            "spans": self.spans,
        }

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> "FullRun":
        """What `to_json` gave."""
        measured, sigmas = known["calibration"], known["sigmas"]
        calibration = measured and Calibration(
            facts=Facts.model_validate(measured["facts"]),
            **{name: _unpacked(measured["tensors"][name]) for name in TENSORS},
        )
        return cls(
            output=_unpacked(known["output"]),
            calibration=calibration,
            num_steps=known["num_steps"],
            sigmas=None if sigmas is None else tuple(sigmas),
            spans=tuple((start, end) for start, end in known["spans"]),
        )


def recorded(pipeline: Any, draw: Draw, boundary: Boundary, objective: Objective, *, samples: bool = False) -> FullRun:
    """A full run that plans can be made from; with its samples, if they are asked for.

    Raises:
        CalibrationError: as `recording.record`.
    """
    run = record(pipeline, seeded(pipeline, draw.call, draw.seed), boundary=boundary, samples=samples)
    try:
        calibration = _measured(pipeline, run, boundary)
    except CalibrationError:  # no branch is called at every step: what needs no plan is tried all the same
        calibration = None
    spans = tuple(sorted({(min(steps), max(steps)) for steps in run.values.values()}))
    kept = (run.samples if len(run.samples) == run.num_steps else {}) if samples else None
    return FullRun(objective.output(run.output), calibration, run.num_steps, run.sigmas, spans, kept)


def probed(pipeline: Any, draw: Draw, probes: int) -> dict[str, float]:
    """What an error at so many steps does to the outcome, for a journal (see `sensitivity.measure`)."""
    found = measure(pipeline, partial(seeded, pipeline, draw.call, draw.seed), probes=probes)
    return {str(step): moved for step, moved in found.items()}


def with_probes(run: FullRun, found: Mapping[str, float]) -> FullRun:
    """The run whose calibration knows what `probed` found."""
    assert run.calibration is not None
    known = ratios({int(step): moved for step, moved in found.items()}, run.calibration.influence[0])
    return replace(run, calibration=replace(run.calibration, probes=known[None]))


def plain(pipeline: Any, draw: Draw, objective: Objective, **other: Any) -> FullRun:
    """A full run that candidates are judged by; with other arguments, if any are given."""
    with quiet(pipeline):
        returned = pipeline(**seeded(pipeline, {**draw.call, **other}, draw.seed))
    return FullRun(objective.output(returned))


def _measured(pipeline: Any, run: RecordedRun, boundary: Boundary) -> Calibration:
    return from_run(
        run,
        boundary=boundary,
        order=min(_ORDER, run.num_steps - 1),
        model=identify(find_denoisers(pipeline)),
        pipeline=type(pipeline).__name__,
        scheduler=type(pipeline.scheduler).__name__,
        prediction=prediction_type(pipeline.scheduler),
        device=device_of(pipeline),
    )


def _packed(array: npt.NDArray[Any]) -> dict[str, Any]:
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": text}


def _unpacked(known: Mapping[str, Any]) -> npt.NDArray[Any]:
    data = np.frombuffer(base64.b64decode(known["data"]), dtype=np.dtype(known["dtype"]))
    return data.reshape(known["shape"]).copy()
