"""Schedules for cache-dit and the engines that embed it: what is exported is run by cache-dit itself."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import dpcache
from dpcache.errors import ExportError
from dpcache.integrations import cache_dit as exports
from dpcache.judge.metrics import psnr
from dpcache.plan.schedule import ModelIdentity, Term
from dpcache.run.denoisers import find_blocks, find_denoisers, identify
from tests.pipelines.every import SMALL

from .conftest import draw, type_in

cache_dit = pytest.importorskip("cache_dit")

STEPS = 20
KEYS = (0, 1, 2, 5, 9, 14, 19)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline of this file's own, for cache-dit does not promise to leave it as it was."""
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedule(keys: Any = KEYS, **more: Any) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, STEPS, **more)


@contextmanager
def computed_steps(pipe: Any) -> Iterator[list[int]]:
    """The steps at which the last block really ran."""
    steps: list[int] = []
    calls = [0]
    block = find_blocks(pipe.transformer)[-1].layer()
    hooks = [
        block.register_forward_hook(lambda *_: steps.append(calls[0])),
        pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)),
    ]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


def test_cache_dit_computes_exactly_the_planned_steps(pipe: Any, tmp_path: Path) -> None:
    full = draw(pipe, num_inference_steps=STEPS)
    pasted = tmp_path / "pasted.py"
    pasted.write_text(exports.text(schedule(), "cache-dit"))
    exec(compile(pasted.read_text(), pasted, "exec"), {"pipe": pipe})
    try:
        with computed_steps(pipe) as steps:
            found = draw(pipe, num_inference_steps=STEPS)
    finally:
        cache_dit.disable_cache(pipe)
    assert tuple(steps) == KEYS
    assert 25 < psnr(full[0], found[0]) < 90


def test_calls_of_other_lengths_compute_what_lies_beyond_the_schedule(pipe: Any) -> None:
    cache_dit.enable_cache(pipe, **exports.export(schedule()).arguments())
    try:
        for steps in (STEPS + 4, STEPS, STEPS - 8):
            with computed_steps(pipe) as computed:
                draw(pipe, num_inference_steps=steps)
            assert computed == [step for step in range(steps) if step in KEYS or step >= STEPS]
    finally:
        cache_dit.disable_cache(pipe)


def test_arguments_settings_and_bins_say_the_same(tmp_path: Path) -> None:
    exported = exports.export(schedule())
    assert [step for step, computed in enumerate(exported.mask) if computed] == list(KEYS)
    file = tmp_path / "cache.json"
    file.write_text(json.dumps(exports.as_json(schedule(), "cache-dit")))
    read = cache_dit.load_configs(str(file))
    for name, value in exported.arguments().items():
        assert read[name] == value
    environment = exports.sglang(schedule())
    bins = [
        [int(length) for length in environment[f"SGLANG_CACHE_DIT_SCM_{kind}_BINS"].split(",")]
        for kind in ("COMPUTE", "CACHE")
    ]
    assert cache_dit.steps_mask(*bins, total_steps=STEPS) == list(exported.mask)
    # SGLang has cache-dit cut the mask to a request's length, and fails where it is too short.
    assert cache_dit.steps_mask(*bins, total_steps=STEPS + 9) == [*exported.mask, *[1] * 9]
    assert cache_dit.steps_mask(*bins, total_steps=4) == [1, 1, 1, 0]
    request = exports.as_json(schedule(), "sglang")["cache_dit_params"]
    assert [request["scm_compute_bins"], request["scm_cache_bins"]] == bins
    assert json.dumps(request) in exports.text(schedule(), "sglang")
    xdit = exports.as_json(schedule(), "xdit")["cache_config"]
    assert cache_dit.DBCacheConfig(num_inference_steps=STEPS, **xdit) == exported.arguments()["cache_config"]
    assert json.dumps(xdit) in exports.text(schedule(), "xdit")


def test_a_mask_that_ends_with_skipped_steps_goes_on_with_computed_ones() -> None:
    environment = exports.sglang(schedule((0, 1, 5)))
    assert environment["SGLANG_CACHE_DIT_SCM_COMPUTE_BINS"] == "2,1,150"
    assert environment["SGLANG_CACHE_DIT_SCM_CACHE_BINS"] == "3,14"


def test_of_a_model_with_two_calls_a_step_one_is_told_apart() -> None:
    """Without guidance cache-dit takes every second step for a call of the other kind, unless it is told."""
    qwen, call = SMALL["QwenImagePipeline"].build()
    alone = {**call, "true_cfg_scale": 1.0, "num_inference_steps": STEPS, "output_type": "latent"}
    model = identify(find_denoisers(qwen))
    exported = exports.export(schedule(model=model))
    assert any("say enable_separate_cfg=False in DBCacheConfig" in note for note in exported.notes)
    assert "without this cache" in exports.text(schedule(model=model), "sglang")
    found = []
    for told in ({}, {"enable_separate_cfg": False}):
        cache_dit.enable_cache(qwen, cache_config=cache_dit.DBCacheConfig(**exported.cache_config, **told))
        try:
            with computed_steps(qwen) as steps:
                qwen(**alone)
        finally:
            cache_dit.disable_cache(qwen)
        found.append(tuple(steps))
    assert found[0] != KEYS and found[1] == KEYS
    wan = schedule(model=ModelIdentity(denoiser="WanTransformer3DModel"))
    assert all("two experts" in exports.text(wan, target) for target in ("cache-dit", "sglang", "vllm-omni", "xdit"))
    assert not exports.export(schedule(model=ModelIdentity(denoiser="FluxTransformer2DModel"))).notes[1:]


def test_what_vllm_omni_can_be_told_computes_the_steps_that_its_note_names(pipe: Any) -> None:
    settings = exports.vllm_omni(schedule())
    expected = exports.vllm_omni_steps(schedule())
    assert len(expected) == len(KEYS)
    read = cache_dit.load_configs({"cache_config": {**settings, "num_inference_steps": STEPS}})
    cache_dit.enable_cache(pipe, cache_config=read["cache_config"], calibrator_config=read["calibrator_config"])
    try:
        with computed_steps(pipe) as steps:
            draw(pipe, num_inference_steps=STEPS)
    finally:
        cache_dit.disable_cache(pipe)
    assert steps == expected
    assert ", ".join(map(str, expected)) in exports.text(schedule(), "vllm-omni")


def test_notes_tell_what_stays_behind() -> None:
    taylor = schedule()
    predictions = {**taylor.predictions, 3: (Term(key_step=2, coefficient=0.9),)}
    tuned = taylor.model_copy(update={"predictions": predictions, "predictor": "tuned"})
    for target in ("cache-dit", "sglang", "vllm-omni", "xdit"):
        assert "stay behind" not in exports.text(taylor, target)
        assert "coefficients of this schedule (tuned)" in exports.text(tuned, target)
        assert "denoiser's output" in exports.text(schedule(boundary="output"), target)
    repeated = schedule(order=0)
    assert "TaylorSeer" in exports.text(repeated, "cache-dit")
    assert exports.export(repeated).arguments()["calibrator_config"] is None
    assert exports.sglang(repeated)["SGLANG_CACHE_DIT_TAYLORSEER"] == "false"
    assert exports.vllm_omni(repeated)["enable_taylorseer"] is False
    assert exports.sglang(schedule(order=3))["SGLANG_CACHE_DIT_TS_ORDER"] == "3"
    assert "order 1, whatever" in exports.text(taylor, "xdit")
    twos = dpcache.Schedule.from_key_steps(range(0, STEPS, 2), STEPS)
    assert "before 1.5.3" in exports.text(twos, "vllm-omni") and "before 1.5.3" not in exports.text(taylor, "vllm-omni")


def test_nothing_to_skip_is_refused() -> None:
    with pytest.raises(ExportError, match="computes every step"):
        exports.export(schedule(range(STEPS)))


def test_command(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    schedule().save("s.json")
    schedule(range(STEPS)).save("every.json")

    export = partial(type_in, monkeypatch, capsys, "export")
    code, out, _ = export("s.json", "--to", "sglang")
    assert code == 0
    assert "export SGLANG_CACHE_DIT_SCM_COMPUTE_BINS=3,1,1,1,151\n" in out
    code, out, _ = export("s.json", "--to", "cache-dit", "-o", "cache.json")
    assert (code, out) == (0, "wrote cache.json\n")
    written = json.loads(Path("cache.json").read_text())
    assert sum(written["cache_config"]["steps_computation_mask"][:STEPS]) == len(KEYS)
    code, out, _ = export("s.json", "--to", "cache-dit", "--json")
    assert (code, json.loads(out)) == (0, written)
    code, out, _ = export("s.json", "--to", "cache-dit", "-o", "mask.py", "--json")
    assert (code, json.loads(out)) == (0, {"output": "mask.py", **written})
    assert Path("mask.py").read_text() == exports.text(schedule(), "cache-dit")
    code, _, err = export("s.json", "--to", "sglang", "-o", "mask.py")
    assert code == 2 and "call it mask.sh (or .json)" in err
    code, _, err = export("every.json", "--to", "cache-dit")
    assert code == 1 and "computes every step" in err
    code, _, err = export("s.json", "--to", "nowhere")
    assert code == 2 and "vllm-omni" in err
