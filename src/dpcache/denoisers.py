"""The one table that knows model classes: where their blocks are, and in which order a block returns its streams."""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedPipelineError
from .schedule import Boundary, ModelIdentity


@dataclass(frozen=True)
class BlockStack:
    """Transformer blocks that run one after another.

    Attributes:
        attribute: name of the denoiser's ModuleList.
        returns: names of the block's arguments that its results replace, in the order it returns them; one name means
            a bare tensor. `"hidden_states"` is the stream that the head reads.
    """

    attribute: str
    returns: tuple[str, ...]


_HIDDEN = ("hidden_states",)
_HIDDEN_ENCODER = ("hidden_states", "encoder_hidden_states")
_ENCODER_HIDDEN = ("encoder_hidden_states", "hidden_states")

#: Denoiser class name -> its block stacks, in the order they run.
BLOCK_STACKS: dict[str, tuple[BlockStack, ...]] = {
    "FluxTransformer2DModel": (
        BlockStack("transformer_blocks", _ENCODER_HIDDEN),
        BlockStack("single_transformer_blocks", _ENCODER_HIDDEN),
    ),
}

#: Where pipelines keep the network that is called at every step.
_DENOISER_ATTRIBUTES = ("transformer", "unet")


@dataclass(frozen=True)
class Block:
    """One transformer block of a denoiser, with how to return its inputs as if it had run."""

    module: nn.Module
    returns: tuple[str, ...]
    parameters: tuple[str, ...]

    def hidden(self, output: Any) -> Any:
        """The hidden stream among what the block returned."""
        return output if len(self.returns) == 1 else output[self.returns.index("hidden_states")]

    def skipped(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Any | None) -> Any:
        """What the block returns when it does not run: its inputs, the hidden stream replaced where one is given."""
        results = tuple(
            hidden if hidden is not None and name == "hidden_states" else self._argument(name, args, kwargs)
            for name in self.returns
        )
        return results[0] if len(results) == 1 else results

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self.parameters.index(name)]


def find_denoiser(pipeline: Any) -> nn.Module:
    """The network the pipeline calls at every step.

    Raises:
        UnsupportedPipelineError: the object is no diffusers pipeline with a transformer or UNet and a scheduler.
    """
    denoiser = next((m for name in _DENOISER_ATTRIBUTES if (m := getattr(pipeline, name, None)) is not None), None)
    scheduler = getattr(pipeline, "scheduler", None)
    if not isinstance(denoiser, nn.Module) or not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise UnsupportedPipelineError(
            f"{type(pipeline).__name__} is not a pipeline this library can follow: it needs a denoiser in "
            f"{' or '.join(f'`.{name}`' for name in _DENOISER_ATTRIBUTES)} and a scheduler with `set_timesteps` and "
            "`step`. Pass a diffusers pipeline, for example FluxPipeline."
        )
    return _unwrapped(denoiser)


def find_blocks(denoiser: nn.Module) -> list[Block]:
    """The denoiser's transformer blocks in the order they run.

    Raises:
        UnsupportedPipelineError: the class is not in the table.
    """
    name = type(denoiser).__name__
    if name not in BLOCK_STACKS:
        raise UnsupportedPipelineError(
            f'boundary="blocks" needs to know the transformer blocks of {name}, which are described only for '
            f'{", ".join(sorted(BLOCK_STACKS))}. Use boundary="output", which works for any denoiser.'
        )
    blocks = []
    for stack in BLOCK_STACKS[name]:
        for module in getattr(denoiser, stack.attribute):
            inner: Callable[..., Any] = type(_unwrapped(module)).forward
            parameters = tuple(inspect.signature(inner).parameters)[1:]
            blocks.append(Block(_unwrapped(module), stack.returns, parameters))
    return blocks


def check_boundary(denoiser: nn.Module, boundary: Boundary) -> None:
    """Raises UnsupportedPipelineError unless the library can cache this denoiser at this boundary."""
    if boundary == "blocks":
        find_blocks(denoiser)


def identify(denoiser: nn.Module) -> ModelIdentity:
    """What tells one model from another: the class, and a digest of the configuration that shapes the network."""
    config = {
        key: value
        for key, value in dict(getattr(denoiser, "config", {})).items()
        if not key.startswith("_") and key != "quantization_config"
    }
    text = json.dumps(config, sort_keys=True, default=str)
    return ModelIdentity(denoiser=type(denoiser).__name__, config=hashlib.sha256(text.encode()).hexdigest()[:16])


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile has wrapped it."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner
