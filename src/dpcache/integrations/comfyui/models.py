"""What tells one MODEL of ComfyUI from another."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from dpcache.measure.fingerprint import weights_digest
from dpcache.plan.grids import FLOW
from dpcache.plan.schedule import ModelIdentity

#: In a model's configuration, what says nothing of the network.
_NOT_OF_THE_NETWORK = ("dtype", "disable_unet_model_creation")
#: So many parameters are looked at, from the first to the last: weights may still be on disk.
_PARAMETERS = 64


def identity(model: Any) -> ModelIdentity:
    """ComfyUI's class for a MODEL, and digests of its network's configuration and of its weights.

    What it predicts (noise, flow, v, ...), as nodes may have patched it, is part of the configuration. LoRA is not part
    of the weights.
    """
    inner = model.model
    config = getattr(getattr(inner, "model_config", None), "unet_config", None) or {}
    told = {name: value for name, value in config.items() if name not in _NOT_OF_THE_NETWORK}
    text = json.dumps([told, predicts(model)], sort_keys=True, default=str)
    return ModelIdentity(
        denoiser=type(inner).__name__,
        config=hashlib.sha256(text.encode()).hexdigest()[:16],
        weights=weights_digest(_weights(model)),
    )


def prediction(model: Any) -> str:
    """What the model's noise levels are: shares of noise (flow matching), or ratios of noise to signal."""
    kinds = {kind.__name__ for kind in _kinds(model)}
    return FLOW if "CONST" in kinds else "epsilon"


def predicts(model: Any) -> str:
    """The class that turns the network's output into a picture: EPS, CONST, V_PREDICTION, ..."""
    kinds = _kinds(model)
    return next((kind.__name__ for kind in kinds if "calculate_denoised" in vars(kind)), kinds[0].__name__)


def _kinds(model: Any) -> tuple[type, ...]:
    return type(model.get_model_object("model_sampling")).__mro__


def _weights(model: Any) -> Iterator[torch.Tensor]:
    """Some parameters as they were loaded: where LoRA has been added to one, ComfyUI keeps what it was before."""
    named = sorted(model.model.diffusion_model.named_parameters())
    before = getattr(model, "backup", {})
    for name, parameter in named[:: max(1, len(named) // _PARAMETERS)]:
        kept = before.get(f"diffusion_model.{name}")
        yield parameter if kept is None else kept.weight
