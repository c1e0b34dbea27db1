"""What a pipeline calls at every step: its denoisers, their blocks, and which model they are."""

import functools
import hashlib
import inspect
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpcache.errors import UnsupportedPipelineError
from dpcache.plan.schedule import ModelIdentity

from .layouts import BLOCK_STACKS

#: Where pipelines keep the networks that are called at every step. Those that switch between two within one sampling
#: loop call the second `transformer_2`; a second one for the unconditional call has a name of its own.
_DENOISER_ATTRIBUTES = ("transformer", "unet", "transformer_2", "unconditional_transformer")
#: Where pipelines keep it that have none of the above.
_OTHER_ATTRIBUTES = ("prior", "decoder", "image_unet")
#: Networks that are called beside it at every step, for the denoiser alone to read what they return.
_AUXILIARY_ATTRIBUTES = ("controlnet",)

#: What schedulers can do in whose loops steps are not what a schedule means by it, and why.
_OTHER_STEPS = {
    "undo_step": "goes back to noisier steps again and again",
    "step_correct": "corrects its steps by further calls of the denoiser at noise levels of their own",
}
#: How the class names of pipelines begin whose loop has no step of the whole to skip, why, and what to use instead.
_IMPOSSIBLE = {
    "SkyReelsV2DiffusionForcing": (
        "steps every frame by itself, with copies of its scheduler, so there is no step of the whole to skip",
        "SkyReelsV2Pipeline",
    ),
    "TextToVideoZero": (
        "takes its frames through parts of the loop several times, with copies of its scheduler",
        "AnimateDiffPipeline",
    ),
    "StableDiffusionParadigms": (
        "takes many steps at once, again and again until they agree",
        "StableDiffusionPipeline",
    ),
    "StableDiffusionSAG": ("reads attention inside its UNet at every step", "StableDiffusionPAGPipeline"),
    "StableDiffusionAttendAndExcite": (
        "reads attention and gradients inside its UNet at every step",
        "StableDiffusionPipeline",
    ),
}


@dataclass(frozen=True)
class Block:
    """One transformer block of a denoiser, with how to return its inputs as if it had run.

    Attributes:
        module: the block.
        returns: names of the arguments that its results replace, in the order it returns them.
        parameters: names of all its arguments, in order.
        head: which of its results the denoiser's head reads; empty except for the last block.
    """

    module: nn.Module
    returns: tuple[str, ...]
    parameters: tuple[str, ...]
    head: tuple[str, ...] = ()

    def streams(self, output: Any) -> list[torch.Tensor]:
        """What the head reads among what the block returned."""
        results = (output,) if len(self.returns) == 1 else output
        return [results[self.returns.index(name)] for name in self.head]

    def skipped(self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Sequence[torch.Tensor]) -> Any:
        """What the block returns when it does not run: its inputs, with `streams` in place of those the head reads."""
        given = dict(zip(self.head, streams, strict=True)) if self.head else kwargs
        results = [given[name] if name in given else self._argument(name, args, kwargs) for name in self.returns]
        return results[0] if len(results) == 1 else tuple(results)

    def layer(self) -> nn.Module:
        """A layer inside that runs once whenever the block does, and at no other time: for counting."""
        layers: list[tuple[str, nn.Module]] = [
            (name, module) for name, module in self.module.named_modules() if not any(True for _ in module.children())
        ]
        # Blocks begin with a norm or a modulation. Its embedding the denoiser's head may use as well (DiT); attention
        # may be left out (guidance by perturbation), a feed-forward shared by two streams runs twice.
        return next((module for name, module in layers if "emb" not in name), layers[0][1])

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self.parameters.index(name)]


def find_denoisers(pipeline: Any) -> list[nn.Module]:
    """The networks the pipeline calls at every step: one, or several where it switches within a sampling loop.

    Raises:
        UnsupportedPipelineError: the object is no diffusers pipeline with a transformer or UNet and a scheduler, or its
            frames step one by one.
    """
    found = _modules(pipeline, _DENOISER_ATTRIBUTES) or _modules(pipeline, _OTHER_ATTRIBUTES)[:1]
    scheduler = getattr(pipeline, "scheduler", None)
    for name, reason in _OTHER_STEPS.items():
        if found and hasattr(scheduler, name):
            raise UnsupportedPipelineError(
                f"{type(pipeline).__name__} cannot be followed: {type(scheduler).__name__} {reason}. Use a "
                "scheduler that goes from step to step, for example DDIMScheduler."
            )
    follows = hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")
    if not found or not follows:
        raise UnsupportedPipelineError(
            f"{type(pipeline).__name__} is not a pipeline this library can follow: it needs a denoiser in "
            f"{' or '.join(f'`.{name}`' for name in _DENOISER_ATTRIBUTES)} and a scheduler with `set_timesteps` and "
            "`step`. Pass a diffusers pipeline, for example FluxPipeline."
        )
    for name, (reason, other) in _IMPOSSIBLE.items():
        if type(pipeline).__name__.startswith(name):
            raise UnsupportedPipelineError(
                f"{type(pipeline).__name__} cannot be followed: it {reason}. Use another, for example {other}."
            )
    return list(dict.fromkeys(unwrapped(module) for module in found))


def find_auxiliaries(pipeline: Any) -> list[nn.Module]:
    """Networks that run at every step beside the denoiser, and for it alone."""
    return _modules(pipeline, _AUXILIARY_ATTRIBUTES)


def _modules(pipeline: Any, names: Sequence[str]) -> list[nn.Module]:
    found = [getattr(pipeline, name, None) for name in names]
    return [module for module in found if isinstance(module, nn.Module)]


def as_called(pipeline: Any, denoiser: nn.Module) -> nn.Module:
    """The denoiser as the pipeline has it now: torch.compile may have wrapped it."""
    found = _modules(pipeline, (*_DENOISER_ATTRIBUTES, *_OTHER_ATTRIBUTES, *_AUXILIARY_ATTRIBUTES))
    return next((module for module in found if unwrapped(module) is denoiser), denoiser)


def find_blocks(denoiser: nn.Module) -> list[Block]:
    """The denoiser's transformer blocks in the order they run.

    Raises:
        UnsupportedPipelineError: the class is not in the table, or this model is not built as the table says.
    """
    name = _known_as(denoiser)
    if name not in BLOCK_STACKS:
        raise UnsupportedPipelineError(
            f'boundary="blocks" needs to know the transformer blocks of {name}, which are described only for '
            f'{", ".join(sorted(BLOCK_STACKS))}. Use boundary="output", which works for any denoiser, or describe its '
            "blocks with dpcache.register_denoiser."
        )
    layout = BLOCK_STACKS[name]
    if hasattr(denoiser, "config") and not layout.fits(denoiser.config):
        raise _misdescribed(name, "something is added after its last block that skipped parts would have to compute")
    blocks = [
        _block(module, returns, attribute, name)
        for attribute, returns in layout.stacks.items()
        for module in _stack(denoiser, attribute, name)
    ]
    if not blocks or not set(layout.head) <= set(blocks[-1].returns):
        raise _misdescribed(name, f"its last block does not return {' and '.join(layout.head)}")
    return [*blocks[:-1], replace(blocks[-1], head=layout.head)]


def find_feeders(denoiser: nn.Module) -> list[nn.Module]:
    """The denoiser's modules whose results only the blocks read."""
    found = [getattr(denoiser, name, None) for name in BLOCK_STACKS[_known_as(denoiser)].feeders]
    return [unwrapped(module) for module in found if isinstance(module, nn.Module)]


def _known_as(denoiser: nn.Module) -> str:
    """The name under which the table has it: its class, or the one whose `forward` it inherits unchanged.

    Quantized and sharded models are of such subclasses.
    """
    kinds = type(denoiser).__mro__
    own = next((number for number, kind in enumerate(kinds) if "forward" in vars(kind)), 0)
    return next((kind.__name__ for kind in kinds[: own + 1] if kind.__name__ in BLOCK_STACKS), kinds[0].__name__)


def _stack(denoiser: nn.Module, attribute: str, name: str) -> list[nn.Module]:
    try:
        stack = operator.attrgetter(attribute)(denoiser)
    except AttributeError as error:
        raise _misdescribed(name, f"it has no `{attribute}`") from error
    if stack is not None and not isinstance(stack, Iterable):
        raise _misdescribed(name, f"its `{attribute}` is no list of blocks")
    return list(stack or ())


def _block(module: nn.Module, returns: tuple[str, ...], attribute: str, name: str) -> Block:
    module = unwrapped(module)
    parameters = _parameters(type(module).forward)
    if not set(returns) <= set(parameters):
        raise _misdescribed(name, f"the blocks in `{attribute}` take {', '.join(parameters)}, not {', '.join(returns)}")
    return Block(module, returns, parameters)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _misdescribed(name: str, fault: str) -> UnsupportedPipelineError:
    return UnsupportedPipelineError(
        f'this {name} is not built as boundary="blocks" expects: {fault}. Use boundary="output", or describe its '
        "blocks with dpcache.register_denoiser."
    )


def identify(denoisers: Sequence[nn.Module]) -> ModelIdentity:
    """What tells one model from another: the class, and a digest of the configurations that shape the networks."""
    text = "".join(_configuration(denoiser) for denoiser in denoisers)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return ModelIdentity(denoiser=_class_name(denoisers[0]), config=digest)


def _class_name(denoiser: nn.Module) -> str:
    """Name of the model's class, as it was before torch sharded it."""
    return next(kind.__name__ for kind in type(denoiser).__mro__ if not kind.__module__.startswith("torch.distributed"))


def _configuration(denoiser: nn.Module) -> str:
    config = {
        key: value
        for key, value in dict(getattr(denoiser, "config", {})).items()
        if not key.startswith("_") and key != "quantization_config"
    }
    return json.dumps(config, sort_keys=True, default=str)


def unwrapped(module: Any) -> Any:
    """The module itself where torch.compile has wrapped it."""
    return getattr(module, "_orig_mod", module)
