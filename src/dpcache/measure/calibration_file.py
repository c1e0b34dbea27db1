"""The file of a calibration: facts in its header, tensors in its body, a digest over both."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save_file
from typing_extensions import Self

from dpcache.errors import CalibrationError, FileFormatError
from dpcache.files.whole import MAKERS, check_version, read_bytes, write_whole
from dpcache.plan.schedule import Boundary, ModelIdentity

FORMAT = "dpcache.calibration"
VERSION = "4"
TENSORS = ("paper_cost", "gram", "value_gram", "influence", "probes", "tried", "tried_error")

Array = npt.NDArray[np.float64]


class Facts(BaseModel):
    """What a calibration was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_inference_steps: int = Field(ge=1, description="T: steps of the sampling loop.")
    boundary: Boundary = Field(description="Where values were read.")
    order: int = Field(ge=0, description="Order of the Taylor prediction whose errors the paper's cost holds.")
    model: ModelIdentity = Field(description="The model measured.")
    pipeline: str = Field(description="Class name of the pipeline.")
    scheduler: str = Field(description="Class name of the scheduler.")
    timesteps: tuple[float, ...] = Field(description="The scheduler's grid, T values; none if not known.")
    sigmas: tuple[float, ...] | None = Field(
        default=None,
        description="Its noise levels, T values and where the last step ends; None where they are not known.",
    )
    prediction: str | None = Field(
        default=None, description='What the model returns, in the words of diffusers: "epsilon", ...'
    )
    recorded_steps: int | None = Field(
        default=None, description="Steps of the grid it was recorded on, if it was interpolated to this one."
    )
    num_inputs: int = Field(ge=1, description="Inputs run.")
    num_branches: int = Field(ge=1, description="Denoiser calls per step.")
    calls: tuple[dict[str, Any], ...] | None = Field(
        description="Arguments of every call, the generator aside, a digest of what JSON cannot hold; None of loops "
        "without a pipeline."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        steps = self.num_inference_steps
        if len(self.timesteps) not in (0, steps):
            raise ValueError(f"timesteps must be {steps} values or none, got {len(self.timesteps)}")
        if self.sigmas is not None and len(self.sigmas) != steps + 1:
            raise ValueError(f"sigmas must be {steps + 1} noise levels, got {len(self.sigmas)}")
        return self


def write(path: "str | os.PathLike[str]", facts: Facts, tensors: Mapping[str, Array]) -> None:
    """Writes the file, whole or not at all; all of `TENSORS` must be there.

    Raises:
        CalibrationError: the tensors do not fit together, so that nobody could read the file.
    """
    whole = {name: np.ascontiguousarray(tensors[name]) for name in TENSORS}
    if wrong := misfit(facts, whole):
        raise CalibrationError(f"the calibration cannot be written: {wrong}.")
    text = facts.model_dump_json()
    metadata = {"format": FORMAT, "version": VERSION, "facts": text, "digest": _digest(text, whole)}
    write_whole(path, lambda part: save_file(whole, part, metadata=metadata))


def read(path: "str | os.PathLike[str]") -> tuple[Facts, dict[str, Array]]:
    """Facts and tensors.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, edited, of another version, or no calibration.
    """
    remedy = f"Make it anew with {MAKERS['calibration']}."
    data = read_bytes(path, "calibration")
    header = _header(data)
    if header is None:
        raise FileFormatError(f"{path} is not a whole safetensors file. {remedy}")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a dpcache calibration. {remedy}")
    check_version(path, "calibration", metadata.get("version"), VERSION)
    invalid = f"{path} is not a valid calibration"
    if set(header) != set(TENSORS):
        odd = ", ".join(sorted(set(header) ^ set(TENSORS)))
        raise FileFormatError(f"{invalid}: tensors are missing or unknown, {odd}. {remedy}")
    facts = _facts(metadata.get("facts"), invalid, remedy)
    if wrong := misfit(facts, {name: _Described(header[name]) for name in TENSORS}):
        raise FileFormatError(f"{invalid}: {wrong}. {remedy}")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise FileFormatError(f"{path} is not a whole safetensors file ({error}). {remedy}") from error
    if metadata.get("digest") != _digest(metadata["facts"], tensors):
        raise FileFormatError(f"{path} was edited after it was written: its digest does not match. {remedy}")
    if wrong := misfit(facts, tensors) or _odd_values(tensors):
        raise FileFormatError(f"{invalid}: {wrong}. {remedy}")
    return facts, tensors


def _header(data: bytes) -> dict[str, Any] | None:
    """What a safetensors file says of itself; None where it is none, or cut short."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        return None
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _facts(text: object, invalid: str, remedy: str) -> Facts:
    try:
        return Facts.model_validate_json(text if isinstance(text, str) else "")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "facts"
        raise FileFormatError(f"{invalid}: {where}: {first['msg']}. {remedy}") from error


class _Described:
    """A tensor as the header of a file has it."""

    def __init__(self, entry: object) -> None:
        said = entry if isinstance(entry, dict) else {}
        shape = said.get("shape")
        self.dtype = {"F64": np.dtype(np.float64)}.get(str(said.get("dtype")), said.get("dtype"))
        self.shape: tuple[int, ...] | None = None
        if isinstance(shape, list) and all(type(size) is int for size in shape):
            self.shape = tuple(shape)


def misfit(facts: Facts, tensors: Mapping[str, Any]) -> str | None:
    """Which of the tensors is not of the shape and type that the facts make it; None where all are."""
    steps, inputs = facts.num_inference_steps, facts.num_inputs
    for name in TENSORS:
        if tensors[name].dtype != np.float64:
            return f"{name} must be float64, not {tensors[name].dtype}"
    shapes = {name: tensors[name].shape for name in TENSORS}
    seen, probed, trials = ((shapes[name] or (0,))[0] for name in ("gram", "probes", "tried"))
    expected: dict[str, list[tuple[int, ...]]] = {
        "paper_cost": [(steps, steps + 1, steps + 1), (0, 0, 0)],
        "gram": [(inputs, steps, steps), (0, steps, steps)],
        "value_gram": [(inputs, steps, steps)],
        "influence": [(seen, steps)],
        "probes": [(min(probed, inputs), steps)],
        "tried": [(trials, steps)],
        "tried_error": [(trials,)],
    }
    for name, shape in shapes.items():
        if shape not in expected[name]:
            of = f"T = {steps} and {inputs} inputs"
            return f"{name} must have the shape {list(expected[name][0])} for {of}, not {shape and list(shape)}"
    return None


def _odd_values(tensors: Mapping[str, Array]) -> str | None:
    """Which of the tensors holds what it cannot; None where all is well."""
    for name in ("gram", "value_gram", "influence", "tried_error"):
        if not np.isfinite(tensors[name]).all():
            return f"{name} must be finite"
    if np.isnan(tensors["paper_cost"]).any() or not tensors["paper_cost"].min(initial=0) > -np.inf:
        return "paper_cost must hold no NaN and no negative infinity"
    probes, tried = tensors["probes"], tensors["tried"]
    if np.isinf(probes).any() or (probes < 0).any():
        return "probes must be 0 or more, or NaN where none was measured"
    if not np.isin(tried, (0, 1)).all() or not tried[:, 0].all():
        return "tried must be 1 at key steps, step 0 among them, and 0 elsewhere"
    if not (tensors["tried_error"] > 0).all():
        return "tried_error must be above 0"
    return None


def _digest(facts: str, tensors: Mapping[str, Array]) -> str:
    data = facts.encode() + b"".join(tensors[name].tobytes() for name in TENSORS if name in tensors)
    return hashlib.sha256(data).hexdigest()
