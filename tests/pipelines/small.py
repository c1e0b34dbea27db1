"""How pipelines are built from small random components: small_image.py and small_video.py have them all.

Text encoders are left out and their results passed in: a pipeline's own `__call__` runs from there, to its latents.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

STEPS = 8

#: A pipeline and the arguments of its call.
Built = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Small:
    """How to build and call one pipeline.

    Attributes:
        name: shown in tests and in docs/models.md.
        build: makes the pipeline and the arguments of its call.
        branches: denoiser calls in a step.
        heads: layers of the denoiser whose inputs are the streams predicted at the boundary "blocks"; none, where only
            the boundary "output" is supported.
        keys: key steps for which every other step is predicted.
        order: of the prediction.
        switch: the step from which the second denoiser is called.
        bfloat16: whether the pipeline runs in it on a CPU.
        note: for docs/models.md.
    """

    name: str
    build: Callable[[], Built]
    branches: int = 1
    heads: tuple[str, ...] = ("norm_out",)
    keys: tuple[int, ...] = (0, 1, 2, 5)
    order: int = 2
    switch: int = STEPS
    bfloat16: bool = True
    note: str = ""

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Where it can be cached."""
        return ("blocks", "output") if self.heads else ("output",)


#: By name; filled by the modules that build them.
SMALL: dict[str, Small] = {}


def small(name: str = "", **facts: Any) -> Callable[[Any], Any]:
    """Enters a function that builds a pipeline in the list; it has the pipeline's class name unless given another."""

    def enter(build: Callable[[], Built]) -> Any:
        entry = Small(name or build.__name__, build, **facts)
        SMALL[entry.name] = entry
        return build

    return enter


def of_diffusers(name: str) -> Any:
    """One of its classes; older ones lack some, and the test is skipped there."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


def make(kind: str, **config: Any) -> Any:
    """A diffusers model whose random weights make it answer clearly to the step.

    Models start with some layers zero and others tiny, so that a new one hardly depends on its inputs.
    """
    torch.manual_seed(0)
    model = of_diffusers(kind)(**config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and parameter.numel():
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return model.eval()


def assemble(kind: str, denoiser: Any, scheduler: Any = None, **components: Any) -> Any:
    """The pipeline with these components, and None for those not given."""
    pipe_class = of_diffusers(kind)
    expected, _ = pipe_class._get_signature_keys(pipe_class)
    denoisers = {"transformer" if "transformer" in expected else "unet": denoiser}
    schedulers = {"scheduler": scheduler or FlowMatchEulerDiscreteScheduler()}
    pipe = pipe_class(**{**dict.fromkeys(expected), **denoisers, **schedulers, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fitted(kind: str, parts: dict[str, Any], given: dict[str, Any], stubs: dict[str, Any] | None = None) -> Built:
    """The pipeline of these parts, and of what is given the arguments that its call takes.

    Pipelines of one family share parts and arguments, and each takes some of them.

    Args:
        kind: class of the pipeline.
        parts: components by name; those the class does not take are left out.
        given: arguments of the call by name.
        stubs: results of methods of the pipeline's own, by name, where there is no argument to pass them in by.
    """
    pipe_class = of_diffusers(kind)
    takes = inspect.signature(pipe_class.__init__).parameters
    components = {**dict.fromkeys(pipe_class._get_signature_keys(pipe_class)[0]), **parts}
    pipe = pipe_class(**{name: part for name, part in components.items() if name in takes})
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    for name, result in (stubs or {}).items():
        if hasattr(pipe, name):
            setattr(pipe, name, result if callable(result) else lambda *_, result=result, **__: result)
    called = inspect.signature(pipe_class.__call__).parameters
    return pipe, {name: value for name, value in given.items() if name in called}


class Absent(torch.nn.Module):
    """Stands where a pipeline asks a text encoder for its dtype and device although nothing is left to encode."""

    dtype, device = torch.float32, torch.device("cpu")
    image_processor = tokenizer = None
    text_model = SimpleNamespace(dtype=torch.float32)


#: Pipelines of diffusers that are counted (see count.py), beside those in SMALL: name -> how to build it.
WIDE: dict[str, Callable[[], Built]] = {}


def wide(*kinds: str, parts: Callable[[], dict[str, Any]], given: Callable[[], dict[str, Any]], **more: Any) -> None:
    """Enters pipelines of one family in the list of those that are counted.

    Args:
        kinds: their classes.
        parts: makes their components.
        given: makes the arguments of their calls.
        more: further arguments of the calls; `config` for `parts`; `stubs` as in `fitted`; and `ready`, which does to
            the pipeline what is left to do.
    """
    stubs, config, ready = more.pop("stubs", {}), more.pop("config", {}), more.pop("ready", lambda pipe: None)
    for kind in kinds:

        def build(kind: str = kind) -> Built:
            pipe, arguments = fitted(kind, parts(**config), {**given(), **more}, stubs)
            ready(pipe)
            return pipe, arguments

        WIDE[kind] = build


def texts(length: int = 5, width: int = 8) -> dict[str, Any]:
    """What text encoders return for a prompt and a negative one, by the names that pipelines have for it."""
    found: dict[str, Any] = {}
    for prefix, seed in (("", 0), ("negative_", 1)):
        found |= {
            f"{prefix}prompt_embeds": noise(1, length, width, seed=seed),
            f"{prefix}prompt_embeds_2": noise(1, length, width, seed=seed + 2),
            f"{prefix}pooled_prompt_embeds": noise(1, width, seed=seed),
            f"{prefix}prompt_attention_mask": ones(1, length),
            f"{prefix}prompt_attention_mask_2": ones(1, length),
            f"{prefix}prompt_embeds_mask": ones(1, length),
            f"{prefix}prompt_embeds_mask_2": ones(1, length),
            f"{prefix}attention_mask": ones(1, length),
        }
    return found


def picture(pixels: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """A picture as a tensor, values from 0 to 1."""
    return noise(1, channels, pixels, pixels, seed=50 + seed).sigmoid()


def pil(pixels: int, seed: int = 0) -> Any:
    """The same for those that take no tensors."""
    return to_pil(picture(pixels, seed)[0])


def to_pil(values: torch.Tensor) -> Any:
    return PIL.Image.fromarray((values.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().squeeze())


def mask(pixels: int) -> torch.Tensor:
    """One that has the right half painted anew."""
    found = torch.zeros(1, 1, pixels, pixels)
    found[..., pixels // 2 :] = 1
    return found


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another dtype, also in lists; other arguments of a pipeline's call as they are."""
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def size(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}
