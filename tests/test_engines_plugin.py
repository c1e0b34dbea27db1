"""The plug-in for serving engines, in cache-dit itself: it predicts as dpcache does, and says what it cannot do."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dpcache
from tests.pipelines.every import SMALL

from .test_export import computed_steps

cache_dit = pytest.importorskip("cache_dit")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations" / "engines"))

import dpcache_engines  # noqa: E402  found by the line before

STEPS, PROMPTS = 20, ["a large red ring on a white background, top", "a small blue star on a black background, left"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline of this file's own, for cache-dit does not promise to leave it as it was."""
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def calibration(pipe: Any) -> dpcache.Calibration:
    call = {"num_inference_steps": STEPS, "max_sequence_length": 24}
    return dpcache.calibrate(pipe, PROMPTS, progress=False, **call)


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    context = cache_dit.caching.cache_contexts.cache_context
    before = context.Calibrator, context.CachedContext.__post_init__
    yield
    dpcache_engines.unregister()
    assert (context.Calibrator, context.CachedContext.__post_init__) == before


def latents(pipe: Any, steps: int = STEPS) -> Any:
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": steps, "max_sequence_length": 24, "output_type": "latent", "generator": generator}
    return pipe(PROMPTS[0], **call).images.numpy()


def in_cache_dit(pipe: Any, steps: int = STEPS, calls: int = 1) -> tuple[list[Any], list[int]]:
    """Latents of so many calls, and the steps computed in the last of them."""
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps))
    try:
        found = [latents(pipe, steps) for _ in range(calls - 1)]
        with computed_steps(pipe) as computed:
            found.append(latents(pipe, steps))
    finally:
        cache_dit.disable_cache(pipe)
    return found, computed


@pytest.mark.parametrize(
    ("num_key_steps", "recipe"),
    [(7, dpcache.Recipe()), (5, dpcache.Recipe("fitted", order=2)), (6, dpcache.Recipe("trend", correct=False))],
)
def test_it_predicts_what_dpcache_predicts(pipe: Any, calibration: Any, tmp_path: Path, num_key_steps, recipe) -> None:
    schedule = calibration.plan(num_key_steps, recipe=recipe)
    assert bool(schedule.corrections) == (recipe.correct is not False)
    schedule.save(tmp_path / "s.json")
    with dpcache.enabled(pipe, schedule):
        expected = latents(pipe)
    dpcache_engines.register(tmp_path / "s.json")
    found, computed = in_cache_dit(pipe, calls=2)
    assert tuple(computed) == schedule.key_steps
    for one in found:  # the second request begins with nothing of the first
        assert np.abs(one - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_schedule_for_every_number_of_steps(pipe: Any, calibration: Any, tmp_path: Path, caplog: Any) -> None:
    for steps in (STEPS, 12):
        calibration.plan(5, num_inference_steps=steps).save(tmp_path / f"{steps}.json")
    dpcache_engines.register(tmp_path)
    for steps in (STEPS, 12, STEPS):
        with dpcache.enabled(pipe, tmp_path / f"{steps}.json"):
            expected = latents(pipe, steps)
        assert np.abs(in_cache_dit(pipe, steps)[0][0] - expected).max() <= 1e-5 * np.abs(expected).max()
    full = latents(pipe, 8)
    with caplog.at_level(logging.WARNING, "dpcache_engines"):
        found, computed = in_cache_dit(pipe, 8)
    assert computed == list(range(8)) and np.array_equal(found[0], full)
    assert "no schedule for requests of 8 steps (only for 12, 20)" in caplog.text


def test_engines_that_refresh_the_transformer_for_every_request(pipe: Any, calibration: Any, tmp_path: Path) -> None:
    """As SGLang and vLLM-Omni do: the cache is put on the transformer once, and told the steps of each request."""
    for steps in (STEPS, 12):
        calibration.plan(5, num_inference_steps=steps).save(tmp_path / f"{steps}.json")
    expected = {}
    for steps in (STEPS, 12):
        with dpcache.enabled(pipe, tmp_path / f"{steps}.json"):
            expected[steps] = latents(pipe, steps)
    dpcache_engines.register(tmp_path)
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    cache_dit.enable_cache(pipe.transformer, cache_config=cache_dit.DBCacheConfig(), calibrator_config=taylor)
    try:
        for steps in (STEPS, 12, STEPS, STEPS):
            cache_dit.refresh_context(pipe.transformer, num_inference_steps=steps)
            assert np.abs(latents(pipe, steps) - expected[steps]).max() <= 1e-5 * np.abs(expected[steps]).max()
    finally:
        cache_dit.disable_cache(pipe.transformer)


def test_without_a_schedule_nothing_changes(monkeypatch: Any) -> None:
    monkeypatch.delenv(dpcache_engines.VARIABLE, raising=False)
    before = cache_dit.caching.cache_contexts.cache_context.Calibrator
    dpcache_engines.register()
    assert cache_dit.caching.cache_contexts.cache_context.Calibrator is before


def test_the_environment_names_the_schedules(pipe: Any, calibration: Any, tmp_path: Path, monkeypatch: Any) -> None:
    schedule = calibration.plan(5)
    schedule.save(tmp_path / "s.json")
    monkeypatch.setenv(dpcache_engines.VARIABLE, str(tmp_path / "s.json"))
    dpcache_engines.register()
    assert tuple(in_cache_dit(pipe)[1]) == schedule.key_steps


def test_what_it_cannot_do_is_refused_by_name(pipe: Any, calibration: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calibration.plan(5).save(tmp_path / "s.json")
    dpcache_engines.register(tmp_path / "s.json")
    two_experts, _ = SMALL["WanPipeline (2.2, two transformers)"].build()
    with pytest.raises(dpcache_engines.EngineError, match=r"Wan 2\.2's two experts"):
        cache_dit.enable_cache(two_experts, cache_config=cache_dit.DBCacheConfig(num_inference_steps=STEPS))
    # SGLang, which splits guidance between processes: a stand-in, for its own needs a GPU.
    state = SimpleNamespace(get_classifier_free_guidance_world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "sglang.multimodal_gen.runtime.distributed.parallel_state", state)
    config = cache_dit.DBCacheConfig(num_inference_steps=STEPS, enable_separate_cfg=True)
    with pytest.raises(dpcache_engines.EngineError, match="guidance runs in parallel"):
        cache_dit.caching.cache_contexts.cache_context.CachedContext(cache_config=config)


def test_files_that_are_no_schedules_are_refused(calibration: Any, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    calibration.plan(5).save(file)
    document = json.loads(file.read_text())
    (tmp_path / "again.json").write_text(file.read_text())
    with pytest.raises(dpcache_engines.EngineError, match=r"again\.json and s\.json are both for 20 steps"):
        dpcache_engines.register(tmp_path)
    for wrong, message in (
        ({**document, "version": 99}, "of version 99"),
        ({**document, "key_steps": [0, 1, 2, 3, 5]}, "was edited"),
        ({"format": "other"}, "other"),
        ([1], "cannot be read"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(dpcache_engines.EngineError, match=message):
            dpcache_engines.register(file)
    with pytest.raises(dpcache_engines.EngineError, match="cannot be read"):
        dpcache_engines.register(tmp_path / "none.json")
