"""The nodes as ComfyUI sees them; what they do is in `dpcache.integrations.comfyui`."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import folder_paths

FOLDER = "dpcache"
"""Under ComfyUI's models folder, or where `extra_model_paths.yaml` says: calibrations and schedules."""
# What extra_model_paths.yaml names comes first: it has been read by now.
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {".json", ".safetensors"})
_HOME = Path(folder_paths.get_folder_paths(FOLDER)[0])
_HOME.mkdir(parents=True, exist_ok=True)

_CATEGORY = "model/acceleration"
_APPEND, _START_OVER = "add to the file", "start over"
#: As workflows have it that were saved by an earlier release.
_OLD_WORD = "begin anew"
_NOTHING = "none"
_ANY_ORDER = -1
_MODEL: tuple[Any, ...] = ("MODEL",)


def _library() -> Any:
    """Imported when a node runs, so that ComfyUI starts as fast as without it."""
    try:
        import dpcache.integrations.comfyui as library
    except ModuleNotFoundError as error:
        if error.name != "dpcache":
            raise
        raise RuntimeError("dpcache is not installed in ComfyUI's Python: see README.md beside this node.") from error
    return library


class _Node:
    """The node of a workflow: knows which prompt runs, and shows under itself what its MODEL's runs have to say."""

    def __init__(self, unique_id: str | None) -> None:
        self._id = unique_id

    def prompt(self) -> Hashable | None:
        try:
            from comfy_execution.utils import get_executing_context
        except ImportError:  # of releases before it
            return None
        context = get_executing_context()
        return None if context is None else str(context.prompt_id)

    def show(self, text: str) -> None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and self._id is not None:
            server.send_progress_text(text, self._id)


def _files(suffix: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(suffix)]


def _path(name: str) -> Path:
    """Of a file in any of the folders; in the first where there is none yet."""
    return Path(folder_paths.get_full_path(FOLDER, name) or _HOME / name)


def _changed(name: str) -> float:
    """What ComfyUI compares to know whether a file is still the one it has seen."""
    path = _path(name)
    return path.stat().st_mtime if path.exists() else float("nan")


class DPCacheKeySteps:
    """Computes K steps of every run, wherever they are best, and predicts the model's output at all others."""

    CATEGORY = _CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Computes so many steps of every sampling run and predicts the others: nothing to calibrate. With a "
        "calibration, made by DPCache Calibrate, it plans which, for any number of steps, shift and denoise."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        calibrations = [_NOTHING, *_files(".safetensors")]
        return {
            "required": {
                "model": _MODEL,
                "key_steps": (
                    "INT",
                    {"default": 13, "min": 1, "max": 1000, "tooltip": "Steps to compute, of every run."},
                ),
                "calibration": (calibrations, {"tooltip": f"A file in models/{FOLDER}; {_NOTHING}: a smooth curve."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, calibration: str, **_: Any) -> float:
        return 0.0 if calibration == _NOTHING else _changed(calibration)

    def apply(self, model: Any, key_steps: int, calibration: str, unique_id: str | None = None) -> tuple[Any]:
        library = _library()
        measured = None if calibration == _NOTHING else library.Calibration.load(_path(calibration))
        return (library.plan_and_apply(model, key_steps, measured, _Node(unique_id)),)


class DPCacheApply:
    """Computes the key steps of a schedule and predicts the model's output at all others."""

    CATEGORY = _CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Computes the key steps of a schedule and predicts the others. Made by DPCache Calibrate."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        schedules = (_files(".json"), {"tooltip": f"A file in models/{FOLDER}."})
        return {"required": {"model": _MODEL, "schedule": schedules}, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, schedule: str, **_: Any) -> float:
        return _changed(schedule)

    def apply(self, model: Any, schedule: str, unique_id: str | None = None) -> tuple[Any]:
        library = _library()
        return (library.apply(model, library.Schedule.load(_path(schedule)), _Node(unique_id)),)


class DPCacheCalibrate:
    """Measures the sampling runs of the model that it returns, and plans from all of them."""

    CATEGORY = _CATEGORY
    FUNCTION = "calibrate"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        f"Every sampling run of this model is computed in full, added to a calibration in models/{FOLDER} and planned "
        "from. Five prompts are enough; use the steps, scheduler and guidance that you will use later."
    )
    _INPUTS: ClassVar[dict[str, Any]] = {
        "model": _MODEL,
        "name": ("STRING", {"default": "calibration", "tooltip": "Of the files; the model and grid are good names."}),
        "key_steps": ("INT", {"default": 13, "min": 0, "max": 1000, "tooltip": "Steps to compute; 0: do not plan."}),
        "order": (
            "INT",
            {"default": _ANY_ORDER, "min": _ANY_ORDER, "max": 3, "tooltip": "Of the prediction; -1: whatever is best."},
        ),
        "file": ([_APPEND, _START_OVER], {"tooltip": "Start over: once, and what was there is kept as *.old."}),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls._INPUTS, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, name: str = "linked", file: str = _APPEND) -> bool | str:
        """What other nodes give is known, and checked, when the node runs."""
        if not name or Path(name).name != name:
            return f"the name {name!r} must be that of a file in models/{FOLDER}, without folders."
        if file not in (_APPEND, _START_OVER, _OLD_WORD):
            return f"file must be {_APPEND!r} or {_START_OVER!r}, got {file!r}."
        return True

    def calibrate(
        self, model: Any, name: str, key_steps: int, order: int, file: str, unique_id: str | None = None
    ) -> tuple[Any]:
        valid = self.VALIDATE_INPUTS(name, file)
        if isinstance(valid, str):
            raise ValueError(valid)
        calibrated = _library().calibrate(
            model,
            _path(f"{name}.safetensors"),
            key_steps=key_steps,
            order=None if order == _ANY_ORDER else order,
            append=file == _APPEND,
            node=_Node(unique_id),
        )
        return (calibrated,)


NODE_CLASS_MAPPINGS = {
    "DPCacheKeySteps": DPCacheKeySteps,
    "DPCacheApply": DPCacheApply,
    "DPCacheCalibrate": DPCacheCalibrate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DPCacheKeySteps": "DPCache Key Steps",
    "DPCacheApply": "DPCache Apply",
    "DPCacheCalibrate": "DPCache Calibrate",
}
