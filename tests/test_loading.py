"""Models loaded as people load them: precision, place, adapters, scheduler, a picture to begin with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import dpcache
from dpcache.apps import cli
from dpcache.apps.commands.loading import Loading
from tests.conftest import type_in

peft = pytest.importorskip("peft")
RING = "a small red ring on a black background, top"
LOADING = ("generate", "calibrate", "optimize", "compare", "bench", "ui")
OPTIONS = ("--dtype", "--device", "--offload", "--lora", "--scheduler", "--image", "--strength")


@pytest.fixture
def draw(monkeypatch: Any, capsys: Any, tmp_path: Path) -> Any:
    """Types `dpcache generate` in a fresh folder; returns exit code, the picture if there is one, and what was said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def generate(*words: str, model: str = "tiny-flux", prompt: str = RING) -> tuple[int, Any, str]:
        given = ("generate", model, prompt, "-o", "a.png", "-t", "8", *words)
        code, _, err = type_in(monkeypatch, capsys, *given)
        return code, np.asarray(Image.open("a.png")) if code == 0 else None, err

    return generate


def pixels(pipe: Any, **arguments: Any) -> np.ndarray:
    """What the pipeline itself draws, called as the command calls it."""
    call = {"num_inference_steps": 8, "max_sequence_length": 32, "output_type": "np", **arguments}
    drawn = pipe(RING, generator=torch.Generator().manual_seed(0), **call)[0][0]
    return (drawn * 255).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: Any) -> Path:
    """A LoRA of tiny-flux that changes much, and one of another model."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = dpcache.load_pipeline("tiny-flux")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(folder / "good"), transformer_lora_layers=weights)
    renamed = {name.replace("to_q", "q_projection").replace("to_v", "q_projection"): w for name, w in weights.items()}
    type(pipe).save_lora_weights(str(folder / "other"), transformer_lora_layers=renamed)
    (folder / "empty").mkdir()
    return folder


def test_every_command_that_loads_a_model_takes_them() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        options = {flag for parameter in command.params for flag in parameter.opts}
        assert set(OPTIONS) <= options if name in LOADING else not set(OPTIONS) & options, name
        assert name in LOADING or "model" not in {p.name for p in command.params if p.param_type_name == "argument"}


def test_lora(draw: Any, loras: Path) -> None:
    _, plain, _ = draw()
    pipe = dpcache.load_pipeline("tiny-flux")
    pipe.load_lora_weights(str(loras / "good"), weight_name="pytorch_lora_weights.safetensors")
    wanted = pixels(pipe)
    for place in (loras / "good", loras / "good" / "pytorch_lora_weights.safetensors"):
        code, drawn, err = draw("--lora", str(place))
        assert code == 0, err
        np.testing.assert_array_equal(drawn, wanted)
    assert not np.array_equal(drawn, plain), "the picture drawn before was kept"
    code, twice, err = draw("--lora", str(loras / "good"), "--lora", str(loras / "good"))
    assert code == 0 and not np.array_equal(twice, wanted), err
    for name, message in (
        ("other", "does not fit FluxPipeline"),
        ("empty", "the directory holds no .safetensors file"),
        ("nowhere.safetensors", "there is no such file or directory"),
    ):
        code, _, err = draw("--lora", str(loras / name))
        assert code and message in err and "Traceback" not in err
    assert "takes no LoRA" in draw("--lora", str(loras / "good"), model="tiny-dit", prompt="3")[2]


def test_scheduler(draw: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    pipe = dpcache.load_pipeline("tiny-flux")
    shift = pipe.scheduler.config.shift
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    code, drawn, err = draw("--scheduler", "UniPCMultistepScheduler")
    assert code == 0, err
    np.testing.assert_array_equal(drawn, pixels(pipe))
    own = pixels(dpcache.load_pipeline("tiny-flux"), num_inference_steps=50).astype(float)
    assert np.abs(drawn - own).mean() < 8, "it has not sampled what the model flows to"
    code, _, err = draw("--scheduler", DPMSolverMultistepScheduler.__name__, "-k", "4", model="tiny-dit", prompt="3")
    assert code == 0, err
    for model, name, message in (
        ("tiny-flux", "UniPCScheduler", "did you mean UniPCMultistepScheduler"),
        ("tiny-flux", "DDIMScheduler", "predicts a flow"),
        ("tiny-flux", "FlowMatchHeunDiscreteScheduler", "These can: FlowMatchEulerDiscreteScheduler"),
        ("tiny-dit", "FlowMatchEulerDiscreteScheduler", "predicts noise"),
    ):
        code, _, err = draw("--scheduler", name, model=model, prompt="3")
        assert code == 2 and message in err, err


def test_a_picture_to_begin_with(draw: Any) -> None:
    from diffusers import FluxImg2ImgPipeline

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save("photo.png")
    pipe = FluxImg2ImgPipeline.from_pipe(dpcache.load_pipeline("tiny-flux"))
    pipe.default_sample_size = 8
    picture = Image.open("photo.png").convert("RGB")
    for strength in ("0.3", "0.9"):
        code, drawn, err = draw("--image", "photo.png", "--strength", strength)
        assert code == 0, err
        np.testing.assert_array_equal(drawn, pixels(pipe, image=picture, strength=float(strength)))
    assert draw("--image", "photo.png", "--strength", "0.9", "-k", "4")[0] == 0
    Path("text.png").write_text("no picture")
    for words, message in (
        (("--strength", "0.5"), "give one with --image"),
        (("--image", "text.png"), "is not a picture"),
        (("--image", "nowhere.png"), "nowhere.png: No such file"),
        (("--set", "strength=0.5"), "use --strength"),
    ):
        code, _, err = draw(*words)
        assert code and message in err, err
    assert "no image-to-image pipeline for DiTPipeline" in draw("--image", "photo.png", model="tiny-dit", prompt="3")[2]


def test_precision_and_place(draw: Any, monkeypatch: Any) -> None:
    _, plain, _ = draw()
    code, narrow, err = draw("--dtype", "bf16")
    assert code == 0, err
    np.testing.assert_array_equal(narrow, pixels(dpcache.load_pipeline("tiny-flux", torch_dtype=torch.bfloat16)))
    assert not np.array_equal(narrow, plain)
    for how in ("model", "group"):
        Path("a.png").unlink()
        code, drawn, err = draw("--offload", how, "--device", "cpu")
        assert code == 0, err
        np.testing.assert_array_equal(drawn, plain)
    pipe = Loading(offload="model", device="cpu").pipeline("tiny-flux")
    assert pipe.transformer._hf_hook is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in (
        (("--dtype", "int8"), "give bf16, fp16 or fp32"),
        (("--device", "cuda"), "give --device cpu"),
        (("--device", "quantum"), "is no device"),
        (("--offload", "model"), "there is none here"),
        (("--offload", "sequential", "--device", "cpu"), "there is none here"),
    ):
        code, _, err = draw(*words)
        assert code == 2 and message in err, err


def test_calibrating_with_a_picture_goes_on(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    """What was measured with one picture is not taken for what another gives."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 40), ("two", 200)):
        Image.new("RGB", (32, 32), (value, value, value)).save(f"{name}.png")

    def calibrate(picture: str) -> tuple[int, str]:
        words = ["calibrate", "tiny-flux", RING, "-t", "8", "--image", picture, "--checkpoint", "kept", "--json"]
        code, out, err = type_in(monkeypatch, capsys, *words)
        return code, out or err

    first, again = calibrate("one.png"), calibrate("one.png")
    assert first[0] == again[0] == 0, again[1]
    assert json.loads(first[1])["num_inputs"] == 1
    code, said = calibrate("two.png")
    assert code == 1 and "other --set" in said
