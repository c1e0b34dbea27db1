"""The file of a calibration: facts in its header, tensors in its body, a digest over both."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save_file

from dpcache.errors import FileFormatError
from dpcache.files.whole import MAKERS, check_version, read_bytes, write_whole
from dpcache.plan.schedule import Boundary, ModelIdentity

FORMAT = "dpcache.calibration"
VERSION = "4"
TENSORS = ("paper_cost", "gram", "value_gram", "influence", "probes", "tried", "tried_error")

Array = npt.NDArray[np.float64]


class Facts(BaseModel):
    """What a calibration was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        description="Arguments of every call, the generator aside; None if there are some that JSON cannot hold."
    )


def write(path: "str | os.PathLike[str]", facts: Facts, tensors: Mapping[str, Array]) -> None:
    """Writes the file, whole or not at all; all of `TENSORS` must be there."""
    text = facts.model_dump_json()
    whole = {name: np.ascontiguousarray(tensors[name]) for name in TENSORS}
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
    try:
        tensors = load_tensors(data)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise FileFormatError(f"{path} is not a whole safetensors file ({error}). {remedy}") from error
    if metadata.get("format") != FORMAT:
        raise FileFormatError(f"{path} is not a dpcache calibration. {remedy}")
    check_version(path, "calibration", metadata.get("version"), VERSION)
    if metadata.get("digest") != _digest(metadata.get("facts", ""), tensors):
        raise FileFormatError(f"{path} was edited after it was written: its digest does not match. {remedy}")
    try:
        return Facts.model_validate_json(metadata["facts"]), tensors
    except ValidationError as error:
        raise FileFormatError(f"{path} is not a valid calibration: {error.errors()[0]['msg']}. {remedy}") from error


def _digest(facts: str, tensors: Mapping[str, Array]) -> str:
    data = facts.encode() + b"".join(tensors[name].tobytes() for name in TENSORS if name in tensors)
    return hashlib.sha256(data).hexdigest()
