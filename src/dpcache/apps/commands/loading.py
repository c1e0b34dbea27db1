"""How a model is loaded: precision, place, adapters, scheduler, and a picture to begin with."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from dpcache.errors import HubError, missing_extra
from dpcache.files.hub import repository_file

_PANEL = "How the model is loaded"
#: What people call them -> what torch does.
_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
}
Offload = Literal["model", "sequential", "group"]
#: Of group offloading, so many blocks are on the GPU at a time.
_BLOCKS_IN_A_GROUP = 1


def _option(*flags: str, text: str, **more: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=_PANEL, **more)


@dataclass(frozen=True)
class Loading:
    """What was asked for; every field is an option of each command that loads a model.

    Attributes:
        dtype: of the weights; bfloat16 on a GPU unless given, float32 on the CPU and for bundled models.
        device: where it runs; the GPU unless given, if there is one.
        offload: how weights wait in host memory until they are needed.
        lora: adapters, each a file, a directory or a repository on the Hub.
        scheduler: class name of the scheduler to sample with.
        image: a picture to begin with, for image-to-image and for models that take one.
        strength: how much of it to replace, 0 to 1.
    """

    dtype: Annotated[
        str | None,
        _option("--dtype", metavar="bf16|fp16|fp32", text="Precision [bf16 on a GPU, else and if bundled fp32]."),
    ] = None
    device: Annotated[
        str | None, _option("--device", text="cuda, cuda:1, mps or cpu [a GPU if there is one].", metavar="NAME")
    ] = None
    offload: Annotated[
        Offload | None, _option("--offload", text="Weights wait in host memory: by models, by layers, or by blocks.")
    ] = None
    lora: Annotated[
        list[str] | None,
        _option("--lora", metavar="PATH_OR_ID", text="An adapter: a file, a directory or user/repo; may be repeated."),
    ] = None
    scheduler: Annotated[
        str | None,
        _option("--scheduler", metavar="CLASS_NAME", text="Another one of diffusers, for example DDIMScheduler."),
    ] = None
    image: Annotated[Path | None, _option("--image", text="A picture to begin with: image-to-image.")] = None
    strength: Annotated[
        float | None, _option("--strength", min=0.0, max=1.0, text="With --image: how much of it to replace.")
    ] = None

    def call_arguments(self) -> dict[str, Any]:
        """What of it every call of the pipeline is given.

        Raises:
            typer.BadParameter: a strength without a picture, or the file is no picture.
            OSError: it cannot be read.
        """
        if self.image is None:
            if self.strength is not None:
                raise typer.BadParameter("--strength says how much of a picture to replace: give one with --image.")
            return {}
        from PIL import Image, UnidentifiedImageError

        try:
            picture = Image.open(self.image).convert("RGB")
        except UnidentifiedImageError:
            raise typer.BadParameter(f"--image {self.image} is not a picture: give a PNG, JPEG or WebP.") from None
        return {"image": picture, **({} if self.strength is None else {"strength": self.strength})}

    def facts(self) -> dict[str, Any]:
        """What of it an output depends on; a default is left out."""
        told = {"dtype": self.dtype and _DTYPES[self.dtype], "lora": self.lora or None, "scheduler": self.scheduler}
        return {name: value for name, value in told.items() if value is not None}

    def check(self) -> None:
        """Refuses what cannot be, before anything is loaded.

        Raises:
            typer.BadParameter: no such precision, device or scheduler, or nothing to offload from.
            FileNotFoundError: no such LoRA.
            MissingExtraError: LoRA needs peft, and it is not installed.
        """
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise typer.BadParameter(f"--dtype {self.dtype} is no precision: give bf16, fp16 or fp32.")
        if self.device is not None:
            _check_device(self.device)
        # On the CPU, if asked for, the others change nothing; this one leaves weights nowhere.
        by_name = self.device is not None and not (self.offload == "sequential" and self.device == "cpu")
        if self.offload is not None and not by_name and not _has_gpu():
            raise typer.BadParameter(
                f"--offload {self.offload} keeps weights away from a GPU, and there is none here: leave it out."
            )
        for name in self.lora or []:
            if not Path(name).exists() and repository_file(name, ".safetensors") is None:
                raise FileNotFoundError(
                    f"--lora {name}: there is no such file or directory, and it is no repository's id like user/repo."
                )
        if self.lora and find_spec("peft") is None:
            raise missing_extra("--lora", ImportError(name="peft"), "peft")
        if self.scheduler is not None:
            _scheduler_class(self.scheduler)

    def pipeline(self, model: str) -> Any:
        """The pipeline of this name, as it was asked for.

        Raises:
            UnknownModelError: there is no such model.
            HubError: a LoRA cannot be fetched.
            typer.BadParameter: a scheduler, LoRA, picture or way of offloading is not for it.
        """
        import torch

        from dpcache.zoo import BUNDLED, load_pipeline, usual_dtype

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, _DTYPES[self.dtype]) if self.dtype else usual_dtype(model, device)
        pipeline: Any = load_pipeline(model, torch_dtype=dtype, device="cpu" if self.offload else device)
        if self.scheduler is not None:
            pipeline.scheduler = _scheduler(self.scheduler, pipeline)
        if self.lora:
            _add_loras(pipeline, self.lora)
        if self.image is not None:
            pipeline = _taking_a_picture(pipeline, with_strength=self.strength is not None)
            for attribute, value in (BUNDLED[model].attributes if model in BUNDLED else {}).items():
                setattr(pipeline, attribute, value)
        if self.offload is not None:
            _offloaded(pipeline, self.offload, torch.device(device))
        return pipeline


_FIELDS = tuple(Loading.__dataclass_fields__)


def loads(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `Loading`; it is called with them as `loading`."""
    own = inspect.signature(command, eval_str=True)
    hints = inspect.get_annotations(Loading, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name])
        for name in _FIELDS
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        loading = Loading(**{name: given.pop(name) for name in _FIELDS})
        command(**given, loading=loading)

    kept = [parameter for name, parameter in own.parameters.items() if name != "loading"]
    run.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return run


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"--device {name} is no device: give cuda, cuda:1, mps or cpu.") from None
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        raise typer.BadParameter(f"--device {name} is not here: leave it out, or give --device cpu.")
    if device.index is not None and device.index >= module.device_count():
        there = ", ".join(f"{device.type}:{number}" for number in range(module.device_count()))
        raise typer.BadParameter(f"--device {name} is not here: there is {there}.")


# ----------------------------------------------------------------------------------------------------------- schedulers


def _names() -> list[str]:
    import diffusers

    return [one for one in dir(diffusers.schedulers) if one.endswith("Scheduler") and not one.startswith("Flax")]


def _short(name: str) -> str:
    """What people remember of it."""
    return re.sub("scheduler|discrete|multistep|singlestep", "", name.lower())


def _scheduler_class(name: str) -> Any:
    import diffusers

    if name not in _names():
        short = {_short(one): one for one in _names()}
        close = [short[one] for one in get_close_matches(_short(name), short, n=3, cutoff=0.6)]
        remedy = f"did you mean {' or '.join(close)}?" if close else "for example EulerDiscreteScheduler."
        raise typer.BadParameter(f"--scheduler {name} is no scheduler of diffusers: {remedy}")
    found = getattr(diffusers.schedulers, name)
    if (needs := _not_installed(found)) is not None:
        raise typer.BadParameter(f"--scheduler {name} needs {', '.join(needs)}: pip install {' '.join(needs)}")
    return found


def _not_installed(kind: Any) -> list[str] | None:
    """What is missing where diffusers has a dummy in place of a class."""
    needs = getattr(kind, "_backends", None)
    return None if needs is None else [package for package in needs if find_spec(package) is None]


def _scheduler(name: str, pipeline: Any) -> Any:
    """The scheduler, with the settings of the pipeline's own; for a model of flows it samples a flow."""
    kind, before = _scheduler_class(name), pipeline.scheduler
    config = before.config
    if not _fits(kind, pipeline):
        import diffusers

        kinds = [getattr(diffusers.schedulers, one) for one in _names()]
        there = [one.__name__ for one in kinds if _not_installed(one) is None and _fits(one, pipeline)]
        known = {one.__name__ for one in before.compatibles}  # of some schedulers diffusers says which
        there = [one for one in there if one in known] or there
        what = "a flow" if _is_of_flows(before) else "noise"
        raise typer.BadParameter(
            f"--scheduler {name} cannot sample with {type(pipeline).__name__}, whose model predicts {what} and which "
            f"comes with {type(before).__name__}. These can: {', '.join(there)}."
        )
    flow: dict[str, Any] = {}
    if _is_of_flows(before) and "FlowMatch" not in name:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    takes = inspect.signature(kind.__init__).parameters
    return kind.from_config(config, **{argument: value for argument, value in flow.items() if argument in takes})


def _fits(kind: Any, pipeline: Any) -> bool:
    """Whether it samples what the model predicts, on the noise levels that the pipeline hands over."""
    before = pipeline.scheduler
    if not hasattr(kind, "set_timesteps") or not hasattr(kind, "step"):
        return False
    takes, levels = inspect.signature(kind.__init__).parameters, inspect.signature(kind.set_timesteps).parameters
    if _is_of_flows(before) != ("FlowMatch" in kind.__name__ or (_is_of_flows(before) and "use_flow_sigmas" in takes)):
        return False
    handed = inspect.signature(type(before).set_timesteps).parameters
    return all(name in levels for name in ("sigmas", "mu") if name in handed and _hands_over(pipeline, name))


def _hands_over(pipeline: Any, name: str) -> bool:
    taken = inspect.signature(type(pipeline).__call__).parameters
    return "sigmas" in taken and (name == "sigmas" or bool(pipeline.scheduler.config.get("use_dynamic_shifting")))


def _is_of_flows(scheduler: Any) -> bool:
    config: Mapping[str, Any] = scheduler.config
    told = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    return told or "FlowMatch" in type(scheduler).__name__


# ----------------------------------------------------------------------------------------------------------------- LoRA


def _add_loras(pipeline: Any, names: list[str]) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise typer.BadParameter(f"{type(pipeline).__name__} of diffusers takes no LoRA: leave out --lora.")
    adapters = [f"lora_{number}" for number in range(len(names))]
    for name, adapter in zip(names, adapters, strict=True):
        source, where = _place(name)
        try:
            pipeline.load_lora_weights(source, adapter_name=adapter, use_safetensors=True, **where)
        except OSError as error:
            raise HubError(f"--lora {name}: nothing was found there (diffusers says: {error})") from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise typer.BadParameter(_does_not_fit(name, pipeline, str(error))) from error
        # With the keys of another model diffusers loads nothing and goes on.
        if not any(adapter in loaded for loaded in pipeline.get_list_adapters().values()):
            raise typer.BadParameter(_does_not_fit(name, pipeline, "none of its keys are of this model"))
    if len(adapters) > 1:
        pipeline.set_adapters(adapters)


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """As `load_lora_weights` takes it."""
    path = Path(name)
    if path.is_file():
        return str(path.parent), {"weight_name": path.name}
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return name, {"weight_name": files[0].name}
        if not files:
            raise FileNotFoundError(f"--lora {name}: the directory holds no .safetensors file.")
        named = ", ".join(file.name for file in files)
        raise typer.BadParameter(f"--lora {name}: the directory holds {named}: name one of them.")
    found = repository_file(name, ".safetensors") or {}
    return found["source"], {"weight_name": found["filename"], "revision": found["revision"]}


def _does_not_fit(name: str, pipeline: Any, why: str) -> str:
    why = re.sub(r"\s+", " ", why)[:200].rstrip(" .")
    return f"--lora {name} does not fit {type(pipeline).__name__}, it was made for another model: {why}."


# ------------------------------------------------------------------------------------------------- pictures, offloading


def _taking_a_picture(pipeline: Any, *, with_strength: bool) -> Any:
    """The pipeline if it takes a picture, else its sister that does."""
    from diffusers import AutoPipelineForImage2Image

    from dpcache.run.inputs import accepts

    if accepts(pipeline, "image") and (accepts(pipeline, "strength") or not with_strength):
        return pipeline
    try:
        return AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        what = "--strength" if accepts(pipeline, "image") else "--image"
        raise typer.BadParameter(
            f"diffusers has no image-to-image pipeline for {type(pipeline).__name__}: leave out {what}."
        ) from error


def _offloaded(pipeline: Any, how: Offload, device: Any) -> None:
    assert how in get_args(Offload)
    try:
        if how == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif how == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            streams = device.type == "cuda"
            pipeline.enable_group_offload(device, num_blocks_per_group=_BLOCKS_IN_A_GROUP, use_stream=streams)
    except (ValueError, RuntimeError, AttributeError) as error:
        others = " or ".join(other for other in get_args(Offload) if other != how)
        raise typer.BadParameter(
            f"--offload {how} does not work with {type(pipeline).__name__}: try {others} ({str(error).rstrip('.')})."
        ) from error
