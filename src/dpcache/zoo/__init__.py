"""Small trained pipelines that ship with the package, in plain diffusers format.

A new model is one row in `BUNDLED` and one file in `training/`, beside the package, that builds and trains it.
diffusers and transformers are imported only when a pipeline is loaded.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dpcache.errors import MissingExtraError, UnknownModelError, missing_extra
from dpcache.noise import quietly
from dpcache.zoo import classes, clips, leaves, shapes

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["BUNDLED", "BundledModel", "UnknownModelError", "load_pipeline", "usual_dtype"]

Inputs = str | dict[str, Any]
"""What varies from one call of a pipeline to the next: a prompt, or keyword arguments."""


@dataclass(frozen=True)
class BundledModel:
    """One model that ships with the package."""

    name: str
    description: str
    directory: Path
    """The pipeline in diffusers format."""
    call_defaults: Mapping[str, Any]
    """Keyword arguments of a usual call, beside its inputs."""
    attributes: Mapping[str, Any]
    """Set on the loaded pipeline, where its class would draw at a size this model was not trained for."""
    calibration_pool: Callable[[], tuple[Inputs, ...]]
    """Every input it was trained on, shuffled once and for all."""
    held_out_pool: Callable[[], tuple[Inputs, ...]]
    """Inputs it has never seen, shuffled once and for all; of classes, which are all trained on, another order."""

    def calibration_inputs(self, n: int) -> list[Inputs]:
        """The first `n` inputs for calibrating, all of them trained on.

        Raises:
            ValueError: if there are fewer than `n`, or `n` is negative.
        """
        return _first(self.calibration_pool(), n, "calibration")

    def held_out_inputs(self, n: int) -> list[Inputs]:
        """The first `n` inputs for judging, none of them trained on.

        A class-conditional model has no class it was not trained on, so here are the same classes in another order;
        what makes its pictures new is other seeds than those of the calibration.

        Raises:
            ValueError: if there are fewer than `n`, or `n` is negative.
        """
        return _first(self.held_out_pool(), n, "held-out")


def _first(pool: tuple[Inputs, ...], n: int, kind: str) -> list[Inputs]:
    if not 0 <= n <= len(pool):
        raise ValueError(f"there are {len(pool)} {kind} inputs, so n must be from 0 to {len(pool)}, got {n}")
    return list(pool[:n])


def _class_inputs(numbers: Iterable[int]) -> tuple[Inputs, ...]:
    return tuple({"class_labels": [number]} for number in numbers)


def _directory(name: str) -> Path:
    """Where a model's files are: with the package, or in the package that has those its wheel leaves out."""
    own = Path(__file__).parent / "models" / name
    more = None if own.is_dir() else find_spec("dpcache_zoo")
    return Path(more.origin).parent / name if more is not None and more.origin is not None else own


_ROWS = (
    BundledModel(
        name="hard-flux",
        description="FluxPipeline, text to 64x64 picture of a heap of things, most of it left open, 2.8 M parameters",
        directory=_directory("hard-flux"),
        # The captions have at most 9 tokens. Guided by two calls, since the weights know no guidance of their own.
        call_defaults=MappingProxyType({"max_sequence_length": 16, "negative_prompt": "", "true_cfg_scale": 7.0}),
        attributes=MappingProxyType({"default_sample_size": 16}),
        calibration_pool=lambda: leaves.split_captions()[0],
        # There are few captions: what makes pictures new is other seeds.
        held_out_pool=lambda: 4 * leaves.split_captions()[1],
    ),
    BundledModel(
        name="hard-dit",
        description="DiTPipeline, one of 40 classes to 64x64 picture of a heap of things, most of it left open, 2.3 M "
        "parameters",
        directory=_directory("hard-dit"),
        call_defaults=MappingProxyType({"guidance_scale": 8.0}),
        attributes=MappingProxyType({}),
        calibration_pool=lambda: _class_inputs(leaves.shuffled_classes("calibration")),
        held_out_pool=lambda: _class_inputs(leaves.shuffled_classes("held-out")),
    ),
    BundledModel(
        name="tiny-flux",
        description="FluxPipeline, text to 32x32 picture of a coloured shape, 2.5 M parameters",
        directory=_directory("tiny-flux"),
        # The prompts have at most 12 tokens; FluxPipeline would pad them to 512.
        call_defaults=MappingProxyType({"max_sequence_length": 32}),
        # In latent pixels. FluxPipeline.__init__ fixes 128 for every model.
        attributes=MappingProxyType({"default_sample_size": 8}),
        calibration_pool=lambda: shapes.split_captions()[0],
        held_out_pool=lambda: shapes.split_captions()[1],
    ),
    BundledModel(
        name="tiny-dit",
        description="DiTPipeline, one of 32 classes to 32x32 picture of a coloured shape, 2.0 M parameters",
        directory=_directory("tiny-dit"),
        call_defaults=MappingProxyType({"guidance_scale": 3.0}),
        attributes=MappingProxyType({}),
        calibration_pool=lambda: _class_inputs(classes.shuffled("calibration", rounds=8)),
        held_out_pool=lambda: _class_inputs(classes.shuffled("held-out", rounds=8)),
    ),
    BundledModel(
        name="tiny-hunyuan-video",
        description="HunyuanVideoPipeline, text to nine 32x32 frames of a moving coloured shape, 3.6 M parameters",
        directory=_directory("tiny-hunyuan-video"),
        # The pipeline's own template asks an 8 B language model for a description of a video.
        call_defaults=MappingProxyType(
            {
                "height": 32,
                "width": 32,
                "num_frames": 9,
                "prompt_template": {"template": "{}", "crop_start": 0},
                "max_sequence_length": 16,
            }
        ),
        attributes=MappingProxyType({}),
        calibration_pool=lambda: clips.split_captions()[0],
        held_out_pool=lambda: clips.split_captions()[1],
    ),
)

BUNDLED: Mapping[str, BundledModel] = MappingProxyType({row.name: row for row in _ROWS})
"""The bundled models, by name."""


def load_pipeline(
    name_or_path: str | Path,
    *,
    torch_dtype: "torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
) -> "DiffusionPipeline":
    """Load a pipeline, bundled or any other, ready to be called.

    Args:
        name_or_path: a key of `BUNDLED`, a directory in diffusers format, or the id of a Hugging Face repository.
        torch_dtype: of the weights; unless given, float32 for bundled models and on the CPU, bfloat16 on a GPU.
        device: where to put it; CUDA where available, else the CPU, unless given.

    Raises:
        UnknownModelError: if there is no such model.
        MissingExtraError: a bundled model with a version of transformers that cannot read it.
    """
    name = str(name_or_path)
    model = BUNDLED.get(name)
    source = model.directory if model else Path(name)
    is_repository_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    if not source.is_dir() and (model is not None or not is_repository_id):
        raise UnknownModelError(no_such(name))

    # Of a bundled model there is nothing to be told while it is loaded.
    with quietly(*(["diffusers.pipelines", "transformers.modeling_utils"] if model is not None else [])):
        import torch
        from diffusers import DiffusionPipeline

        if model is not None and '"transformers"' in (source / "model_index.json").read_text(encoding="utf-8"):
            _check_transformers()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch_dtype or usual_dtype(name, device)
        try:
            place = str(source) if source.is_dir() else name
            pipeline = DiffusionPipeline.from_pretrained(place, **{_dtype_argument(): dtype})
        except OSError as error:
            raise UnknownModelError(f"{no_such(name)} (diffusers says: {error})") from error
    for attribute, value in (model.attributes if model else {}).items():
        setattr(pipeline, attribute, value)
    return pipeline.to(device)


def usual_dtype(name: str, device: "str | torch.device") -> "torch.dtype":
    """What `load_pipeline` takes unless told otherwise: float32 for bundled models and on the CPU, else bfloat16."""
    import torch

    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu or name in BUNDLED else torch.bfloat16


def _dtype_argument() -> str:
    """What `from_pretrained` calls the dtype: diffusers before 0.40 overlooks the new name without a word."""
    return "dtype" if _major_minor("diffusers") >= (0, 40) else "torch_dtype"


def _check_transformers() -> None:
    """Transformers before 5 names weights otherwise, and draws at random what it does not find, with a line in a log.

    Raises:
        MissingExtraError: it is one of these, or not installed.
    """
    try:
        found = _major_minor("transformers")
    except PackageNotFoundError as error:
        raise missing_extra("loading a bundled model", error, "dpcache[zoo]") from error
    if found < (5, 0):
        raise MissingExtraError(
            f"the bundled models were saved by transformers 5, and {version('transformers')} would load random "
            "weights: pip install 'transformers>=5', or use a model of your own."
        )


def _major_minor(package: str) -> tuple[int, int]:
    major, minor, *_ = version(package).split(".")
    return int(major), int(minor)


def no_such(name: str) -> str:
    """What to say of a name that is no model's."""
    if name in BUNDLED:
        return (
            f"the files of {name!r} are not in the wheel: from a checkout of dpcache, pip install ./integrations/zoo, "
            f"or train them with: python -m training.train {name}"
        )
    return (
        f"no pipeline named {name!r}. Bundled models: {', '.join(BUNDLED)}. Or give a directory in diffusers format "
        "(one that holds model_index.json) or the id of a Hugging Face repository, like 'owner/name'"
    )
