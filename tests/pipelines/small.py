"""How pipelines are built from small random components: small_image.py and small_video.py have them all.

Text encoders are left out and their results passed in: a pipeline's own `__call__` runs from there, to its latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
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


def make(kind: str, **config: Any) -> Any:
    """A diffusers model whose random weights make it answer clearly to the step.

    Models start with some layers zero and others tiny, so that a new one hardly depends on its inputs.
    """
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return model.eval()


def assemble(kind: str, denoiser: Any, scheduler: Any = None, **components: Any) -> Any:
    """The pipeline with these components, and None for those not given."""
    pipe_class = getattr(diffusers, kind)
    expected, _ = pipe_class._get_signature_keys(pipe_class)
    denoisers = {"transformer" if "transformer" in expected else "unet": denoiser}
    schedulers = {"scheduler": scheduler or FlowMatchEulerDiscreteScheduler()}
    pipe = pipe_class(**{**dict.fromkeys(expected), **denoisers, **schedulers, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
