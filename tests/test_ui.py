"""The page in a browser: the real server, asked as a browser asks it."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import dpcache
from dpcache.apps import cli
from dpcache.apps.studio import Asked, Studio
from dpcache.apps.ui import _Artist, build
from dpcache.judge.differences import amplification, heat
from dpcache.judge.metrics import psnr
from dpcache.zoo import BUNDLED

STEPS = 8
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "a large blue star on a grey background, right"


@contextmanager
def served(model: str, calibration: dpcache.Calibration | None, pipe: Any) -> Iterator[Client]:
    """A client of the page for a bundled model."""
    bundled = BUNDLED[model]
    studio = Studio(pipe, calibration, bundled.call_defaults, STEPS)
    page, look = build(studio, bundled.held_out_inputs(2), title=model, num_key_steps=3)
    _, url, _ = page.launch(server_name="127.0.0.1", inbrowser=False, prevent_thread_lock=True, quiet=True, **look)
    try:
        yield Client(url, verbose=False)
    finally:
        page.close(verbose=False)


def calibrated(model: str, pipe: Any) -> dpcache.Calibration:
    bundled = BUNDLED[model]
    inputs = bundled.calibration_inputs(1)
    return dpcache.calibrate(pipe, inputs, num_inference_steps=STEPS, progress=False, **bundled.call_defaults)


def figures(answer: tuple[Any, ...]) -> dict[str, str]:
    """What the page shows beside the pictures: full seconds, cached seconds, speedup, PSNR, SSIM, steps computed."""
    _, _, full, cached, summary, *_ = answer
    seconds = [re.findall(r"<b>([\d.]+) s</b>", caption)[0] for caption in (full, cached)]
    values = re.findall(r"<dd>(.*?)</dd>", summary)
    cells = re.findall(r"<i class='(on)?' title='step \d+'>", summary)
    steps = [t for t, on in enumerate(cells) if on]
    return {**dict(zip(("full", "cached", "speedup", "psnr", "ssim"), seconds + values, strict=True)), "steps": steps}


@pytest.fixture(scope="module")
def flux() -> tuple[Any, dpcache.Calibration]:
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe, calibrated("tiny-flux", pipe)


def test_draws_side_by_side(flux):
    pipe, calibration = flux
    with served("tiny-flux", calibration, pipe) as client:
        answer = client.predict(PROMPT, 5, 3, STEPS, api_name="/draw")
        shown = figures(answer)
        again = figures(client.predict(PROMPT, 5, 4, STEPS, api_name="/draw"))
        equal = figures(client.predict(PROMPT, 5, STEPS, STEPS, api_name="/draw"))
        shorter = figures(client.predict(PROMPT, 5, 3, STEPS - 2, api_name="/draw"))
    # What the page shows is what the pipeline gives by itself.
    call = {"num_inference_steps": STEPS, "output_type": "np", **BUNDLED["tiny-flux"].call_defaults}
    full = pipe(PROMPT, generator=torch.Generator().manual_seed(5), **call).images[0]
    with dpcache.enabled(pipe, calibration, num_key_steps=3):
        cached = pipe(PROMPT, generator=torch.Generator().manual_seed(5), **call).images[0]
        computed = dpcache.stats(pipe).computed_steps
    left, right = answer[5]
    for path, picture in zip((*answer[:2], left, right), 2 * (full, cached), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), (picture * 255).round())
    assert shown["psnr"] == f"{psnr(full, cached):.1f} dB"
    assert shown["steps"] == list(computed)
    amplified = amplification(full, [cached])
    np.testing.assert_array_equal(np.asarray(Image.open(answer[6])), heat(full, cached, amplified))
    assert f"times {amplified:,.0f}; black is none" in answer[7]
    saved = dpcache.Schedule.load(answer[9]["value"])
    assert (Path(answer[9]["value"]).name, saved.key_steps) == ("tiny-flux-3-of-8.json", computed)
    assert saved == calibration.plan(3)
    assert float(shown["speedup"].rstrip("×")) > 0
    assert again["full"] == shown["full"]  # remembered, not drawn again
    assert len(again["steps"]) == 4
    assert (equal["psnr"], equal["steps"]) == ("equal", list(range(STEPS)))
    assert len(shorter["steps"]) == 3 and shorter["psnr"].endswith("dB")


def test_an_error_is_told_and_the_page_goes_on(flux):
    pipe, calibration = flux
    dpcache.enable(pipe, calibration, num_key_steps=3)
    with served("tiny-flux", calibration, pipe) as client:
        with pytest.raises(AppError, match="dpcache is enabled on this pipeline already"):
            client.predict(PROMPT, 0, 3, STEPS, api_name="/draw")
        dpcache.disable(pipe)
        for seed, k, words in ((-3, 3, "Seed must be 0 or more, got -3"), (0, 99, "greater than maximum value 8")):
            with pytest.raises(AppError, match=words):
                client.predict(PROMPT, seed, k, STEPS, api_name="/draw")
        assert len(figures(client.predict(PROMPT, 0, 3, STEPS, api_name="/draw"))["steps"]) == 3


def test_classes_by_name():
    pipe = dpcache.load_pipeline("tiny-dit", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with served("tiny-dit", calibrated("tiny-dit", pipe), pipe) as client:
        offered = client.view_api(return_format="dict")["named_endpoints"]["/draw"]["parameters"][0]
        assert offered["label"] == "Class"
        answer = client.predict(7, 0, 3, STEPS, api_name="/draw")
    call = {"num_inference_steps": STEPS, "output_type": "np", **BUNDLED["tiny-dit"].call_defaults}
    full = pipe([7], generator=torch.Generator().manual_seed(0), **call).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(answer[0])), (full * 255).round())
    assert len(figures(answer)["steps"]) == 3


def test_clips_move():
    pipe = dpcache.load_pipeline("tiny-hunyuan-video", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompt = BUNDLED["tiny-hunyuan-video"].held_out_inputs(1)[0]
    with served("tiny-hunyuan-video", calibrated("tiny-hunyuan-video", pipe), pipe) as client:
        answer = client.predict(prompt, 0, 3, STEPS, api_name="/draw")
    for path in answer[:2]:
        with Image.open(path) as clip:
            assert (clip.format, clip.n_frames, clip.size) == ("WEBP", 9, (32, 32))


def test_a_curve_of_what_was_drawn(flux):
    pipe, _ = flux
    studio = Studio(pipe, None, BUNDLED["tiny-flux"].call_defaults, STEPS)
    asked = Asked(PROMPT, 0, STEPS)
    assert studio.curve(asked) == {}
    full = studio.full(asked)
    drawn = {k: studio.cached(asked, k) for k in (*studio.ladder(STEPS), STEPS)}
    assert list(drawn) == [1, 2, 3, 4, STEPS]
    found = studio.curve(asked)
    assert found == {k: psnr(full.picture, one.picture) for k, one in drawn.items()}
    assert studio.curve(Asked(PROMPT, 1, STEPS)) == {}
    # What is offered for saving is what `enable` follows.
    schedule = drawn[3].schedule
    assert schedule is not None and schedule.key_steps == drawn[3].key_steps
    call = {"num_inference_steps": STEPS, "output_type": "np", **BUNDLED["tiny-flux"].call_defaults}
    with dpcache.enabled(pipe, schedule):
        again = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images[0]
    np.testing.assert_array_equal(again, drawn[3].picture)


def test_a_page_stops_no_curve_but_its_own(flux):
    pipe, _ = flux
    artist = _Artist(Studio(pipe, None, BUNDLED["tiny-flux"].call_defaults, STEPS), "tiny-flux")
    pages = {name: gr.Request(None, session_hash=name) for name in ("one", "other", "closed")}
    curves = {}
    for name, page in pages.items():
        assert list(artist.draw(PROMPT, 0, 3, STEPS, page))
        curves[name] = artist.measure(PROMPT, 0, 3, STEPS, page)
        assert "data-k='1'" in next(curves[name])
    assert list(artist.redraw(PROMPT, 0, 2, STEPS, pages["one"]))
    artist.leave(pages["closed"])
    assert list(curves["one"]) == list(curves["closed"]) == []
    assert "data-k='4'" in list(curves["other"])[-1]


@contextmanager
def started(*words: str) -> Iterator[tuple[str, str]]:
    """The command as typed: the page's address, and what was said before."""
    code = f"import sys; sys.argv = ['dpcache', 'ui', *{words!r}]; from dpcache.apps.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"open (http://\S+) in a browser", line):
                break
        assert found, lines
        threading.Thread(target=process.stdout.read, daemon=True).start()  # or it would wait for somebody to read
        yield found[1], "".join(lines)
    finally:
        process.terminate()
        process.wait(30)


def test_the_command(tmp_path):
    """As typed: it calibrates, says where the page is, and draws."""
    with started("tiny-flux", "-t", "6", "-k", "2", "--sensitivity", "sampler", "--no-browser") as (url, said):
        assert "calibrating tiny-flux on 2 inputs, 6 steps each" in said
        answer = Client(url, verbose=False, download_files=str(tmp_path)).predict(PROMPT, 0, 2, 6, api_name="/draw")
        assert len(figures(answer)["steps"]) == 2
        assert Path(answer[0]).exists()


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on the PATH: apt-get install chromium")
def test_in_a_browser(tmp_path):
    """It opens with an example and its curve, and everything on it is used as a visitor would; nothing calibrated."""
    playwright = pytest.importorskip("playwright.sync_api")
    with started("-t", "8", "-k", "3", "--no-browser") as (url, said), playwright.sync_playwright() as running:
        assert "loading hard-flux" in said and "calibrating" not in said
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        asked: list[str] = []
        page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        point = page.locator(".dp-curve button")
        page.locator(".dp-curve [data-k='4']").wait_for()
        assert [one.get_attribute("data-k") for one in point.all()] == ["1", "2", "3", "4"]
        assert page.locator("#pictures img").count() == 2
        k = page.get_by_label("number input for Key steps, K")
        for typed, drawn in (("2", 2), ("99", 8)):  # brought within its limits
            k.fill(typed)
            k.press("Enter")
            page.get_by_text(f"{drawn} of 8 steps computed, from").wait_for()
        page.locator(".dp-curve [data-k='3']").click()
        page.get_by_text("3 of 8 steps computed, from").wait_for()
        assert k.input_value() == "3"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save this schedule").click()
        assert download.value.suggested_filename == "hard-flux-3-of-8.json"
        download.value.save_as(tmp_path / "s.json")
        assert dpcache.Schedule.load(tmp_path / "s.json").num_key_steps == 3
        for tab, shown in (("Slider", "#wipe img"), ("Difference", "[data-testid='image'] img, .dp-picture img")):
            page.get_by_role("tab", name=tab).click()
            page.locator(f"{shown} >> visible=true").first.wait_for()
        page.get_by_label("Seed").fill("-3")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("Seed must be 0 or more, got -3.").wait_for()
        assert {one for one in asked if not one.startswith((url, "data:", "blob:"))} == set()
        page.close()
        phone = browser.new_page(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
        phone.goto(url)
        phone.locator(".dp-curve [data-k='8']").wait_for()
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        loaded = "images => images.length == 2 && images.every(one => one.complete && one.naturalWidth)"
        phone.wait_for_function(f"({loaded})([...document.querySelectorAll('#pictures img')])")
        left, right = [one.bounding_box() for one in phone.locator("#pictures img").all()]
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]  # together, in the first screen
        assert left["y"] + left["height"] < 844 and left["width"] > 120
        browser.close()


def test_missing_gradio_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dpcache.apps.ui")
    monkeypatch.setattr(sys, "argv", ["dpcache", "ui", "tiny-flux"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert 'gradio, which is not installed: pip install "dpcache[ui]"' in capsys.readouterr().err
