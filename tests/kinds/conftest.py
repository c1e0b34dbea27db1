"""tiny-flux with a schedule, and twins of it."""

from typing import Any

import diffusers
import numpy as np
import pytest

import dpcache
from tests.conftest import STEPS, draw, flux, loaded_flux  # noqa: F401 - fixtures

KEYS = dpcache.Schedule.from_key_steps((0, 1, 2, 5, 8), STEPS)
FEW = dpcache.Schedule.from_key_steps((0, 6), STEPS, order=1)
OTHER = "a large blue star on a white background, center"


def twin_of(pipe: Any, *, own_scheduler: bool = False, kind: Any = diffusers.FluxPipeline) -> Any:
    """Another pipeline over the same parts."""
    parts = dict(pipe.components)
    if own_scheduler:
        parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin = kind(**parts)
    twin.set_progress_bar_config(disable=True)
    twin.default_sample_size = pipe.default_sample_size
    return twin


def at_step(step: int, do: Any) -> Any:
    """A callback that does something at the end of one step."""

    def callback(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            do(given)
        return given

    return callback


def bare_call(pipe: Any, latents: Any) -> Any:
    """One call of the transformer, without a pipeline."""
    import torch

    embeds, pooled, text_ids = pipe.encode_prompt(OTHER, None, max_sequence_length=24)
    ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=latents,
            timestep=torch.full((1,), 0.4),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]


@pytest.fixture
def cached(flux: Any) -> np.ndarray:  # noqa: F811
    """What the schedule draws when nothing else goes on."""
    with dpcache.enabled(flux, KEYS):
        return draw(flux)
