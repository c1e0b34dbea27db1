"""The nodes as ComfyUI sees them; what they do is in `dpcache.integrations.comfyui`."""

from pathlib import Path
from typing import Any, ClassVar

import folder_paths

FOLDER = "dpcache"
"""Under ComfyUI's models folder: calibrations and schedules."""
_HOME = Path(folder_paths.models_dir) / FOLDER
_HOME.mkdir(parents=True, exist_ok=True)
folder_paths.folder_names_and_paths[FOLDER] = ([str(_HOME)], {".json"})

_APPEND, _ANEW = "add to the file", "begin anew"


def _library() -> Any:
    """Imported when a node runs, so that ComfyUI starts as fast as without it."""
    try:
        import dpcache.integrations.comfyui as library
    except ModuleNotFoundError as error:
        if error.name != "dpcache":
            raise
        raise RuntimeError("dpcache is not installed in ComfyUI's Python: see README.md beside this node.") from error
    return library


class DPCacheApply:
    """Computes the key steps of a schedule and predicts the model's output at all others."""

    CATEGORY = "model/acceleration"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Computes the key steps of a schedule and predicts the others. Made by DPCache Calibrate."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        schedules = folder_paths.get_filename_list(FOLDER)
        return {"required": {"model": ("MODEL",), "schedule": (schedules, {"tooltip": f"A file in models/{FOLDER}."})}}

    @classmethod
    def IS_CHANGED(cls, model: Any, schedule: str) -> float:
        path = folder_paths.get_full_path(FOLDER, schedule)
        return Path(path).stat().st_mtime if path else float("nan")

    def apply(self, model: Any, schedule: str) -> tuple[Any]:
        library = _library()
        path = folder_paths.get_full_path(FOLDER, schedule) or _HOME / schedule
        return (library.apply(model, library.Schedule.load(path)),)


class DPCacheCalibrate:
    """Measures the sampling runs of the model that it returns, and plans from all of them."""

    CATEGORY = "model/acceleration"
    FUNCTION = "calibrate"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        f"Every sampling run of this model is computed in full, added to a calibration in models/{FOLDER} and planned "
        "from. Five prompts are enough; use the steps, scheduler and guidance that you will use later."
    )
    _INPUTS: ClassVar[dict[str, Any]] = {
        "model": ("MODEL",),
        "name": ("STRING", {"default": "calibration", "tooltip": "Of the files; the model and grid are good names."}),
        "key_steps": ("INT", {"default": 13, "min": 0, "max": 1000, "tooltip": "Steps to compute; 0: do not plan."}),
        "order": ("INT", {"default": 2, "min": 0, "max": 3, "tooltip": "Of the Taylor prediction."}),
        "file": ([_APPEND, _ANEW],),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls._INPUTS}

    def calibrate(self, model: Any, name: str, key_steps: int, order: int, file: str) -> tuple[Any]:
        if not name or Path(name).name != name:
            raise ValueError(f"the name {name!r} must be that of a file in models/{FOLDER}, without folders.")
        path = _HOME / f"{name}.safetensors"
        return (_library().calibrate(model, path, key_steps=key_steps, order=order, append=file == _APPEND),)


NODE_CLASS_MAPPINGS = {"DPCacheApply": DPCacheApply, "DPCacheCalibrate": DPCacheCalibrate}
NODE_DISPLAY_NAME_MAPPINGS = {"DPCacheApply": "DPCache Apply", "DPCacheCalibrate": "DPCache Calibrate"}
