"""`dpcache bench`: every way at equal full calls, on one model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpcache
from dpcache.apps.varied import inputs_for
from dpcache.judge.metrics import psnr
from dpcache.judge.ways import Held, taylorseers
from tests.conftest import PROMPT, draw, type_in
from tests.test_cli import Calls

STEPS, KEYS = 12, 4
WORDS = ["tiny-flux", "-t", str(STEPS), "--count", "2"]
TAYLORSEER = "diffusers TaylorSeer"


@pytest.fixture
def bench(monkeypatch: Any, capsys: Any, tmp_path: Path) -> Any:
    """Types `dpcache bench` in a fresh folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    return partial(type_in, monkeypatch, capsys, "bench")


@pytest.fixture
def own_flux() -> Any:
    """One that may keep what diffusers leaves on it."""
    return dpcache.load_pipeline("tiny-flux", device="cpu")


def test_a_schedule_beside_the_others(bench: Any, tmp_path: Path, own_flux: Any) -> None:
    flux = own_flux
    schedule = dpcache.Schedule.from_key_steps((0, 1, 3, 7), STEPS, boundary="output")
    schedule.save(tmp_path / "s.json")
    code, out, err = bench(*WORDS, "-s", "s.json", "-o", "found.json")
    assert code == 0, err
    assert "bench: a full run takes" in err and "the whole about" in err
    found = json.loads(Path("found.json").read_text())
    assert (found["format"], found["version"], found["model"]) == ("dpcache.bench", 1, "tiny-flux")
    assert (found["num_inference_steps"], found["num_key_steps"], found["size"]) == (STEPS, KEYS, [32, 32, 3])
    assert found["versions"]["torch"] == torch.__version__ and found["device"]
    rows = {row["name"]: row for row in found["rows"]}
    names = ["full", "no calibration", "schedule s.json", "even spacing", TAYLORSEER, "4 sampler steps"]
    assert list(rows) == names
    assert [row["full_calls"] for row in rows.values()] == [STEPS] + 5 * [KEYS]
    assert all(row["cannot_run"] is None and row["seconds"] > 0 for row in rows.values())
    assert all(len(row["psnr"]) == 2 and row["psnr_worst"] == min(row["psnr"]) for row in list(rows.values())[1:])

    # What it says of each way is what the pipeline gives, set up by hand.
    prompt, seed = found["inputs"][1], 1
    call = {"num_inference_steps": STEPS, "max_sequence_length": 32}
    full = draw(flux, prompt, seed, **call)[0]
    fewer = draw(flux, prompt, seed, **{**call, "num_inference_steps": KEYS})[0]
    assert rows["4 sampler steps"]["psnr"][1] == pytest.approx(psnr(full, fewer))
    with dpcache.enabled(flux, schedule):
        assert rows["schedule s.json"]["psnr"][1] == pytest.approx(psnr(full, draw(flux, prompt, seed, **call)[0]))
        assert rows["schedule s.json"]["cached_bytes"] == dpcache.stats(flux).peak_cached_bytes > 0
    from diffusers import TaylorSeerCacheConfig

    told = rows[TAYLORSEER]["told"]
    flux.transformer.enable_cache(TaylorSeerCacheConfig(**told, taylor_factors_dtype=torch.float32, use_lite_mode=True))
    theirs = draw(flux, prompt, seed, **call)[0]
    flux.transformer.disable_cache()
    assert rows[TAYLORSEER]["psnr"][1] == pytest.approx(psnr(full, theirs))
    # A value of the denoiser's output for each order; [1, 16, 16 x 4 channels] in float32.
    values = 1 + told["max_order"]
    assert rows[TAYLORSEER]["cached_bytes"] == values * rows["schedule s.json"]["cached_bytes"] / 3

    lines = [line for line in out.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert all(any(line.strip().startswith(name) for line in lines) for name in names)
    page = Path("found.html").read_text()
    assert page.count('class="timeline"') == 3 and TAYLORSEER in page and found["device"] in page


def test_a_calibration_classes_and_what_cannot_run(bench: Any, tmp_path: Path) -> None:
    pipe = dpcache.load_pipeline("tiny-dit")
    inputs = [{"class_labels": [3]}]
    dpcache.calibrate(pipe, inputs, num_inference_steps=10, guidance_scale=3.0, progress=False).save("c.safetensors")
    code, out, err = bench("tiny-dit", "7", "--calibration", "c.safetensors", "-k", "4", "--count", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert json.loads(Path("bench.json").read_text()) == found
    rows = {row["name"]: row for row in found["rows"]}
    assert found["num_inference_steps"] == 10 and "plan of c.safetensors" in rows
    assert rows["plan of c.safetensors"]["full_calls"] == 4
    assert "cache_context" in rows[TAYLORSEER]["cannot_run"] and rows[TAYLORSEER]["psnr_mean"] is None
    assert "TaylorSeer" in Path("bench.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-s", "s.json", "-k", "5"], 2, "the schedule has 4 key steps, not 5: leave out -k"),
        (["-s", "s.json", "--calibration", "c.safetensors"], 2, "not both"),
        (["-k", "13"], 2, "--key-steps 13 is more than --steps 12"),
        (["-o", "bench.txt"], 2, "call it bench.json"),
        (["--report", "r.pdf"], 2, "call it r.html"),
    ],
)
def test_wrong_usage(bench: Any, words: list[str], code: int, message: str) -> None:
    dpcache.Schedule.uniform(KEYS, STEPS).save("s.json")
    got, out, err = bench(*WORDS, *words)
    assert (got, out) == (code, "") and message in err


def test_after_ctrl_c_it_is_of_the_inputs_that_are_done(bench: Any, monkeypatch: Any, own_flux: Any) -> None:
    calls = Calls(monkeypatch, own_flux)
    one_input = 4 * STEPS + KEYS  # the denoiser is called at skipped steps, too
    search = 2 * (1 + len(taylorseers(KEYS, STEPS, torch.float32))) * STEPS
    calls.stop = 1 + STEPS + search + 2 * one_input + STEPS + 3
    try:
        code, out, err = bench("tiny-flux", PROMPT, "-t", str(STEPS), "-k", str(KEYS), "--count", "3", "--json")
    finally:
        calls.handle.remove()
    assert code == 130
    assert json.loads(out)["num_inputs"] == 2
    assert "interrupted: everything is of 2 of 3 inputs" in json.loads(err.splitlines()[-1])["error"]


def hooks(pipe: Any) -> dict[str, list[str]]:
    registries = {name: vars(module).get("_diffusers_hook") for name, module in pipe.transformer.named_modules()}
    return {name: list(registry.hooks) for name, registry in registries.items() if registry and registry.hooks}


def test_a_peer_takes_off_nothing_that_was_there_before(own_flux: Any) -> None:
    """Also not where it fails on the way."""
    flux, way = own_flux, taylorseers(KEYS, STEPS, torch.float32)[0]
    flux.transformer.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    before = hooks(flux)
    assert before
    with way.applied(flux), Held().watched(flux):
        assert hooks(flux) != before
        flux(PROMPT, num_inference_steps=2, max_sequence_length=24, output_type="latent")
    assert hooks(flux) == before
    with pytest.raises(RuntimeError, match="on the way"), way.applied(flux):
        raise RuntimeError("on the way")
    assert hooks(flux) == before


def test_inputs_of_its_own(flux: Any) -> None:
    assert len(set(inputs_for(flux, 20))) == 20
    numbers = [one["class_labels"][0] for one in inputs_for(dpcache.load_pipeline("tiny-dit"), 8)]
    assert numbers == list(np.arange(0, 32, 4))
