"""The plug-in in the engines' own code, what imports on a CPU; which engine, PYTHONPATH says (`make engines`)."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpcache

from .test_export import computed_steps

pytest.importorskip("cache_dit")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations" / "engines"))

import dpcache_engines
import on_cpu

PROMPT = "a large red ring on a white background, top"


@pytest.fixture(scope="module")
def engine() -> Any:
    return on_cpu.installed()


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline of this file's own, for cache-dit does not promise to leave it as it was."""
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def taken_off(engine: Any) -> Iterator[None]:
    yield
    engine.leave()
    dpcache_engines.unregister()


def latents(pipe: Any, steps: int) -> Any:
    import torch

    call = {"num_inference_steps": steps, "max_sequence_length": 24, "output_type": "latent"}
    return pipe(PROMPT, **call, generator=torch.Generator().manual_seed(5)).images.numpy()


def test_its_loader_finds_the_plug_in_which_predicts_as_dpcache(
    engine: Any, pipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    calibration = dpcache.calibrate(pipe, [PROMPT], num_inference_steps=20, max_sequence_length=24, progress=False)
    expected, keys = {}, {}
    for steps, k in ((20, 6), (12, 5)):
        schedule = calibration.plan(k, num_inference_steps=steps)
        schedule.save(tmp_path / f"{steps}.json")
        with dpcache.enabled(pipe, schedule):
            expected[steps], keys[steps] = latents(pipe, steps), schedule.key_steps
    monkeypatch.setenv(dpcache_engines.VARIABLE, str(tmp_path))
    engine.load_plugins()
    for steps in (20, 12, 20, 20):
        engine.request(pipe, steps)
        with computed_steps(pipe) as computed:
            found = latents(pipe, steps)
        assert tuple(computed) == keys[steps]
        assert np.abs(found - expected[steps]).max() <= 1e-5 * np.abs(expected[steps]).max()


def test_a_schedule_of_another_model_is_refused_by_name(engine: Any, pipe: Any, tmp_path: Path, caplog: Any) -> None:
    schedule = dpcache.Schedule.from_key_steps((0, 1, 3), 6)
    for denoiser, config in (("WanTransformer3DModel", None), ("FluxTransformer2DModel", "another")):
        identity = dpcache.plan.schedule.ModelIdentity(denoiser=denoiser, config=config)
        schedule.model_copy(update={"model": identity}).save(tmp_path / "s.json")
        dpcache_engines.register(tmp_path / "s.json")
        if config is None:
            with pytest.raises(dpcache_engines.EngineError, match=r"for WanTransformer3DModel, and .* FluxTransformer"):
                engine.request(pipe, 6)
            engine.leave()
        else:
            engine.request(pipe, 6)
            assert "of another configuration than the FluxTransformer2DModel here" in caplog.text
