"""The trained tiny-flux pipeline, and ways to look at a pipeline from outside."""

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

import dpcache

# Their handlers keep the standard error of the moment that they are made: this one lasts, that of a test does not.
diffusers.utils.logging.get_logger()
transformers.utils.logging.get_logger()

STEPS = 12
PROMPT = "a small red ring on a striped background, top left"
#: Arguments of a quick call of tiny-flux.
QUICK = {"num_inference_steps": STEPS, "max_sequence_length": 24, "output_type": "np"}


@pytest.fixture(scope="session")
def loaded_flux() -> Any:
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    draw(pipe)  # a call sets attributes of the pipeline's own
    return pipe


@pytest.fixture
def flux(loaded_flux: Any) -> Any:
    """tiny-flux as loaded: a test that leaves something on it fails."""
    before = traces(loaded_flux)
    yield loaded_flux
    assert traces(loaded_flux) == before


def type_in(monkeypatch: Any, capsys: Any, *words: str) -> tuple[int, str, str]:
    """Types `dpcache` and these words; exit code, standard output and standard error."""
    from dpcache.apps import cli  # the oldest environment has no command line

    monkeypatch.setattr(sys, "argv", ["dpcache", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def draw(pipe: Any, prompt: Any = PROMPT, seed: int = 0, **arguments: Any) -> np.ndarray:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**QUICK, **arguments})[0]


def traces(pipe: Any) -> dict[str, Any]:
    """Every place where a hook could hide: attributes of the pipeline, its scheduler, and of every module."""
    found: dict[str, Any] = {
        "pipeline": sorted(vars(pipe)),
        # What a scheduler computes changes from call to call; what hangs on it as a method must not.
        "scheduler": sorted(name for name, value in vars(pipe.scheduler).items() if callable(value)),
    }
    for name, module in pipe.transformer.named_modules():
        # Opening a cache context makes an (empty) registry on the denoiser: that is diffusers' own doing.
        own = {key for key in vars(module) if key != "_diffusers_hook"}
        registry = getattr(module, "_diffusers_hook", None)
        hooks = sorted(registry.hooks) if registry is not None else []
        found[name] = (sorted(own), hooks, registry is not None and name != "", type(module).forward)
        assert not module._forward_hooks and not module._forward_pre_hooks
    return found
