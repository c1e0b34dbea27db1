"""The bundled models: they load without us, draw what they are told, and can be trained again."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stages, tiny_flux, train
from training.judge import draw, fresh_pictures, judge, reconstruction_psnr
from training.muon import orthogonalise

from dpcache import zoo
from dpcache.errors import MissingExtraError
from dpcache.zoo import BUNDLED, UnknownModelError, load_pipeline, shapes

TINY_FLUX = BUNDLED["tiny-flux"]
CPU = torch.device("cpu")
LITTLE = tiny_flux.Settings(pictures=40, vae_steps=4, vae_batch=2, flow_steps=5, flow_batch=4, decoder_steps=3)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = load_pipeline("tiny-flux", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_python(code: str, *arguments: object) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_importing_the_zoo_imports_no_diffusers() -> None:
    code = "import sys, dpcache.zoo; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_plain_diffusers_loads_and_draws() -> None:
    code = """
import sys
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(sys.argv[1])
prompt = "a small red ring on a striped background, top left"
image = pipeline(prompt, height=32, width=32, num_inference_steps=4).images[0]
print(image.size, "dpcache" in sys.modules)
"""
    assert run_python(code, TINY_FLUX.directory).strip() == "(32, 32) False"


def test_bundled_models_are_small() -> None:
    size = sum(path.stat().st_size for path in TINY_FLUX.directory.rglob("*") if path.is_file())
    assert 1e6 < size < 12e6


def test_nine_of_ten_held_out_captions_come_out_right(pipeline: Any) -> None:
    captions = TINY_FLUX.held_out_inputs(200)
    pictures = draw(pipeline, captions, batch=50, num_inference_steps=50, max_sequence_length=16)
    scenes = [shapes.parse(caption) for caption in captions]
    right = [judge(picture, scene).shows(scene) for picture, scene in zip(pictures, scenes, strict=True)]
    assert np.mean(right) >= 0.9


def test_autoencoder_reconstructs(pipeline: Any) -> None:
    assert reconstruction_psnr(pipeline, fresh_pictures(50)) > 31


def test_padding_hardly_matters(pipeline: Any) -> None:
    captions = TINY_FLUX.held_out_inputs(4)
    pictures = {
        length: draw(pipeline, captions, num_inference_steps=15, max_sequence_length=length).astype(float) / 255
        for length in (16, 32, 64, 512)
    }
    for length in (16, 64, 512):
        assert np.abs(pictures[length] - pictures[32]).mean() < 0.01, length


def test_draws_at_the_trained_size_with_and_without_guidance(pipeline: Any) -> None:
    prompt = TINY_FLUX.held_out_inputs(1)[0]
    guided = {"true_cfg_scale": 2.0, "negative_prompt": ""}
    for extra in ({}, guided):
        assert pipeline(prompt, num_inference_steps=2, max_sequence_length=32, **extra).images[0].size == (32, 32)


def test_clip_pools_at_the_end_of_the_caption_whatever_the_padding(pipeline: Any) -> None:
    caption = TINY_FLUX.held_out_inputs(1)[0]
    pooled, alone = (
        pipeline.text_encoder(pipeline.tokenizer(caption, return_tensors="pt", **padding).input_ids)
        for padding in ({"padding": "max_length"}, {})
    )
    torch.testing.assert_close(pooled.pooler_output, alone.pooler_output)
    torch.testing.assert_close(alone.pooler_output, alone.last_hidden_state[:, -1])


def test_tokenizers_know_every_word_and_survive_any_other(pipeline: Any) -> None:
    for caption in TINY_FLUX.calibration_inputs(300):
        words = caption.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in pipeline.tokenizer.tokenize(caption)] == words
        assert [token.removeprefix("▁") for token in pipeline.tokenizer_2.tokenize(caption)] == words
    pipeline("Ein kleiner roter Ring?! 猫", num_inference_steps=1, max_sequence_length=32)


def test_one_biased_pad_equals_many() -> None:
    pipeline = tiny_flux.build_pipeline(seed=0)
    transformer = pipeline.transformer.double()
    for weight in transformer.parameters():  # blocks start as the identity, which would prove nothing
        torch.nn.init.normal_(weight, std=0.2)
    pads = 37
    text = torch.randn(1, 5, tiny_flux.T5_WIDTH, dtype=torch.float64)
    common = {
        "hidden_states": torch.randn(1, 16, 32, dtype=torch.float64),
        "pooled_projections": torch.randn(1, tiny_flux.CLIP_WIDTH, dtype=torch.float64),
        "timestep": torch.tensor([0.7], dtype=torch.float64),
        "img_ids": pipeline._prepare_latent_image_ids(1, 4, 4, CPU, torch.float64),
        "return_dict": False,
    }
    # Five tokens of which two are pads: training keeps the first, which stands for all 37, and masks the second.
    bias = tiny_flux.attention_bias(torch.tensor([[7, 8, 1, 0, 0]]), torch.tensor([pads]), 16).double()
    with torch.no_grad():
        one = transformer(
            encoder_hidden_states=text,
            txt_ids=torch.zeros(5, 3),
            joint_attention_kwargs={"attention_mask": bias},
            **common,
        )[0]
        many_tokens = torch.cat([text[:, :3], text[:, 3:4].repeat(1, pads, 1)], dim=1)
        many = transformer(encoder_hidden_states=many_tokens, txt_ids=torch.zeros(3 + pads, 3), **common)[0]
        fewer = transformer(encoder_hidden_states=many_tokens[:, :4], txt_ids=torch.zeros(4, 3), **common)[0]
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one, fewer, atol=1e-3)


def test_held_out_captions_are_never_trained_on() -> None:
    training_captions, held_out = shapes.split_captions()
    assert not set(training_captions) & set(held_out)
    assert len(held_out) >= 400
    assert len(training_captions) + len(held_out) == len(shapes.all_scenes())
    drawn = tiny_flux.draw_pictures(50, seed=0)
    read = tiny_flux.build_t5_tokenizer().batch_decode(drawn.t5_ids, skip_special_tokens=True)
    assert [text.replace(" ,", ",") for text in read] == [*training_captions[:50], ""]
    assert TINY_FLUX.calibration_inputs(5) == list(training_captions[:5])
    assert TINY_FLUX.held_out_inputs(5) == list(held_out[:5])
    with pytest.raises(ValueError, match="n must be from 0 to"):
        TINY_FLUX.held_out_inputs(100_000)


def test_rendering_is_deterministic() -> None:
    scenes = [shapes.parse(caption) for caption in TINY_FLUX.calibration_inputs(30)]
    pictures = shapes.render(scenes, seed=3)
    assert pictures.shape == (30, 32, 32, 3)
    np.testing.assert_array_equal(pictures, shapes.render(scenes, seed=3))
    np.testing.assert_array_equal(pictures[:7], shapes.render(scenes[:7], seed=3))
    assert (pictures != shapes.render(scenes, seed=4)).any(axis=(1, 2, 3)).all()
    with pytest.raises(ValueError, match="not a caption"):
        shapes.parse("a small red dog")


def test_the_judge_is_right_about_renderings() -> None:
    scenes = [shapes.parse(caption) for caption in TINY_FLUX.held_out_inputs(200)]
    pictures = shapes.render(scenes, seed=77)
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    pairs = list(zip(verdicts, scenes, strict=True))
    assert np.mean([verdict.shows(scene) for verdict, scene in pairs]) >= 0.99
    assert np.mean([verdict.background == scene.background for verdict, scene in pairs]) >= 0.99


def test_the_judge_sees_wrong_pictures() -> None:
    scenes = [shapes.parse(caption) for caption in TINY_FLUX.held_out_inputs(60)]
    names, colours = list(shapes.SHAPES), list(shapes.COLOURS)
    for scene in scenes:
        shape = names[(names.index(scene.shape) + 1) % len(names)]
        colour = colours[(colours.index(scene.colour) + 1) % len(colours)]
        wrong = [
            shapes.Scene(scene.size, scene.colour, shape, scene.background, scene.position),
            shapes.Scene(scene.size, colour, scene.shape, scene.background, scene.position),
        ]
        assert not any(judge(picture, scene).shows(scene) for picture in shapes.render(wrong, seed=5))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not any(judge(noise, scene).shows(scene) for scene in scenes)


def test_unknown_models_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for name in ("tiny-flx", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UnknownModelError, match="Bundled models: hard-flux") as refusal:
            load_pipeline(name)
        assert name in str(refusal.value)


def test_orthogonalise_brings_singular_values_to_one() -> None:
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    for x in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.min() > 0.5
        assert values.max() < 1.3


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.rglob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def test_interrupted_training_gives_the_same_weights(tmp_path: Path) -> None:
    common = {"device": CPU, "seed": 5, "settings": LITTLE}
    tiny_flux.train(tmp_path / "a", tmp_path / "whole", **common)
    for stop in (3, 2):  # first in the autoencoder, then in the flow stage
        with pytest.raises(stages.Interrupted):
            tiny_flux.train(tmp_path / "b", tmp_path / "parts", should_stop=lambda step, at=stop: step == at, **common)
    tiny_flux.train(tmp_path / "b", tmp_path / "parts", **common)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    untrained = tiny_flux.build_pipeline(5).transformer.proj_out.weight
    assert not torch.equal(whole["transformer/proj_out.weight"].float(), untrained)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    with pytest.raises(ValueError, match="--restart"):
        longer = tiny_flux.Settings(pictures=40, vae_steps=9, vae_batch=2, flow_steps=5, flow_batch=4, decoder_steps=3)
        tiny_flux.train(tmp_path / "b", tmp_path / "parts", **{**common, "settings": longer})


def test_control_c_leaves_a_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny_flux, "Settings", lambda: LITTLE)
    advance, handler = stages._Run.advance, signal.getsignal(signal.SIGINT)

    def interrupted(run: stages._Run) -> None:
        advance(run)
        if run.stage.name == "autoencoder" and run.step == 2:
            signal.raise_signal(signal.SIGINT)

    command = ["tiny-flux", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(stages._Run, "advance", interrupted)
    assert train.main(command) == train.INTERRUPTED
    assert "after step 2 of 4; give the same command again to resume" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoints" / "autoencoder.pt", weights_only=True)["step"] == 2

    monkeypatch.setattr(stages._Run, "advance", advance)
    assert train.main(command) == 0
    assert len(weights(tmp_path / "pipeline")) > 0

    assert train.main([*command, "--restart", "--seed", "1"]) == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_transformers_that_would_load_random_weights_are_refused(monkeypatch):
    """Before version 5 it names weights otherwise, and says so in a log alone."""
    versions = {"transformers": "4.57.3", "diffusers": "0.35.2"}
    monkeypatch.setattr(zoo, "version", versions.__getitem__)
    with pytest.raises(MissingExtraError, match=r"transformers 5, and 4\.57\.3 would load random weights"):
        load_pipeline("tiny-flux")
    assert zoo._dtype_argument() == "torch_dtype"  # what diffusers before 0.40 knows
    monkeypatch.undo()
    assert load_pipeline("tiny-dit", torch_dtype=torch.float16).transformer.dtype == torch.float16
