"""The page in a browser: the real server, asked as a browser asks it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import dpcache
from dpcache.apps import cli
from dpcache.apps.ui import Studio, build
from dpcache.judge.metrics import psnr
from dpcache.zoo import BUNDLED

STEPS = 8
PROMPT = "a large blue star on a grey background, right"


@contextmanager
def served(model: str, calibration: dpcache.Calibration, pipe: Any) -> Iterator[Client]:
    """A client of the page for a bundled model."""
    bundled = BUNDLED[model]
    studio = Studio(pipe, calibration, bundled.call_defaults)
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
    _, _, full, cached, summary = answer
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
    for path, picture in zip(answer[:2], (full, cached), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), (picture * 255).round())
    assert shown["psnr"] == f"{psnr(full, cached):.1f} dB"
    assert shown["steps"] == list(computed)
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


def test_the_command(tmp_path):
    """As typed: it calibrates, says where the page is, and draws."""
    words = ["tiny-flux", "-t", "6", "-k", "2", "--no-browser"]
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
        assert "calibrating tiny-flux on 2 inputs, 6 steps each" in "".join(lines)
        answer = Client(found[1], verbose=False, download_files=str(tmp_path)).predict(
            PROMPT, 0, 2, 6, api_name="/draw"
        )
        assert len(figures(answer)["steps"]) == 2
        assert Path(answer[0]).exists()
    finally:
        process.terminate()
        process.wait(30)


def test_missing_gradio_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dpcache.apps.ui")
    monkeypatch.setattr(sys, "argv", ["dpcache", "ui", "tiny-flux"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert 'gradio, which is not installed: pip install "dpcache[ui]"' in capsys.readouterr().err
