"""The bundled video model: it loads without us, draws what captions say, can be cached and trained again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stages, tiny_hunyuan_video
from training.judge import draw, fresh_clips, judge_clip, reconstruction_psnr

import dpcache
from dpcache.zoo import BUNDLED, clips, load_pipeline

TINY_VIDEO = BUNDLED["tiny-hunyuan-video"]
CPU = torch.device("cpu")
LITTLE = tiny_hunyuan_video.Settings(
    clips=8, frame_steps=2, frame_batch=2, vae_steps=3, vae_batch=1, flow_steps=4, flow_batch=2, decoder_steps=2
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = load_pipeline("tiny-hunyuan-video", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_plain_diffusers_loads_and_draws() -> None:
    code = """
import sys
from diffusers import HunyuanVideoPipeline
pipeline = HunyuanVideoPipeline.from_pretrained(sys.argv[1])
template = {"template": "{}", "crop_start": 0}
prompt = "a red ring moving left on a black background"
frames = pipeline(
    prompt,
    height=32,
    width=32,
    num_frames=9,
    num_inference_steps=4,
    prompt_template=template,
    max_sequence_length=16,
).frames[0]
print(len(frames), frames[0].size, "dpcache" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(TINY_VIDEO.directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.strip() == "9 (32, 32) False"


def test_it_is_small() -> None:
    size = sum(path.stat().st_size for path in TINY_VIDEO.directory.rglob("*") if path.is_file())
    assert 1e6 < size < 10e6


def test_most_held_out_captions_come_out_right(pipeline: Any) -> None:
    captions = TINY_VIDEO.held_out_inputs(40)
    drawn = draw(pipeline, captions, batch=40, num_inference_steps=15, **TINY_VIDEO.call_defaults)
    right = [judge_clip(frames).shows(clips.parse(caption)) for frames, caption in zip(drawn, captions, strict=True)]
    assert np.mean(right) >= 0.85


def test_autoencoder_reconstructs(pipeline: Any) -> None:
    assert reconstruction_psnr(pipeline, fresh_clips(20)) > 25


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_it_can_be_planned_and_cached(pipeline: Any, boundary: Any, tmp_path: Path) -> None:
    inputs, call = TINY_VIDEO.calibration_inputs(2), TINY_VIDEO.call_defaults
    calibration = dpcache.calibrate(pipeline, inputs, num_inference_steps=12, boundary=boundary, progress=False, **call)
    calibration.save(tmp_path / "calibration.safetensors")
    schedule = dpcache.Calibration.load(tmp_path / "calibration.safetensors").plan(8)
    held_out = TINY_VIDEO.held_out_inputs(2)
    comparison = dpcache.compare(pipeline, schedule, held_out, seeds=1000, progress=False, **call)
    assert comparison.cached_block_runs == comparison.full_block_runs * 8 / 12
    assert all(sample.full.shape == (9, 32, 32, 3) for sample in comparison.samples)
    assert min(sample.psnr for sample in comparison.samples) > 15
    assert [sample.label for sample in comparison.samples] == held_out


def test_padding_and_guidance_change_nothing_and_negative_prompts_work(pipeline: Any) -> None:
    captions = TINY_VIDEO.held_out_inputs(2)
    plain = draw(pipeline, captions, num_inference_steps=3, **TINY_VIDEO.call_defaults).astype(int)
    for changed in ({"max_sequence_length": 64}, {"guidance_scale": 1.0}):
        call = {**TINY_VIDEO.call_defaults, **changed}
        assert np.abs(draw(pipeline, captions, num_inference_steps=3, **call) - plain).max() <= 1
    guided = {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    other = draw(pipeline, captions, num_inference_steps=3, **guided, **TINY_VIDEO.call_defaults)
    assert np.abs(other - plain).max() > 1


def test_the_judge_is_right_about_renderings_and_sees_wrong_ones() -> None:
    wanted = [clips.parse(caption) for caption in TINY_VIDEO.held_out_inputs(30)]
    verdicts = [judge_clip(frames) for frames in clips.render(wanted, seed=77)]
    for verdict, clip in zip(verdicts, wanted, strict=True):
        assert verdict.shows(clip)
        assert verdict.background == clip.background
        others = [
            other for other in clips.all_clips().values() if other.background == clip.background and other != clip
        ]
        assert not any(verdict.shows(other) for other in others)
    first = clips.render(wanted[:1], seed=77)[0, :1]
    assert judge_clip(first.repeat(clips.FRAMES, axis=0)).direction is None
    noise = np.random.default_rng(0).integers(0, 256, (clips.FRAMES, 32, 32, 3), dtype=np.uint8)
    assert not any(judge_clip(noise).shows(clip) for clip in wanted)


def test_rendering_is_deterministic_and_moves_as_told() -> None:
    wanted = [clips.Clip("red", "circle", direction, "black") for direction in clips.DIRECTIONS]
    drawn = clips.render(wanted, seed=3)
    assert drawn.shape == (4, clips.FRAMES, 32, 32, 3)
    np.testing.assert_array_equal(drawn[:2], clips.render(wanted[:2], seed=3))
    assert (drawn != clips.render(wanted, seed=4)).any(axis=(1, 2, 3, 4)).all()
    row, column = np.mgrid[0:32, 0:32]
    for frames, (x, y) in zip(drawn, clips.DIRECTIONS.values(), strict=True):
        weight = frames[..., 0].astype(float) - frames[..., 1]
        centres = [np.array([(w * column).sum(), (w * row).sum()]) / w.sum() for w in weight]
        np.testing.assert_allclose(centres[-1] - centres[0], clips.TRAVEL * np.array([x, y]), atol=0.1)
    with pytest.raises(ValueError, match="not a caption"):
        clips.parse("a red dog moving left")


def test_held_out_captions_are_never_trained_on() -> None:
    training_captions, held_out = clips.split_captions()
    assert not set(training_captions) & set(held_out)
    assert len(held_out) >= 96
    assert len(training_captions) + len(held_out) == len(clips.all_clips())
    llama, clip = tiny_hunyuan_video.build_tokenizers()
    drawn = tiny_hunyuan_video.draw_clips(20, seed=0)
    assert llama.batch_decode(drawn.llama_ids, skip_special_tokens=True) == [*training_captions[:20], ""]
    assert [text.strip() for text in clip.batch_decode(drawn.clip_ids, skip_special_tokens=True)] == [
        *training_captions[:20],
        "",
    ]
    assert drawn.llama_mask.sum(dim=1).tolist() == [10] * 20 + [1]


def test_single_frames_do_not_care_which_frames_kernels_see() -> None:
    vae = tiny_hunyuan_video.build_vae()
    frame = torch.rand(2, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.decode(vae.encode(frame).latent_dist.mean).sample
        tiny_hunyuan_video.look_at_one_frame(vae)
        after = vae.decode(vae.encode(frame).latent_dist.mean).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert not vae.encoder.conv_in.conv.weight[:, :, :-1].any()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.rglob("*.safetensors"))
    assert len(files) == 4
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def test_interrupted_training_gives_the_same_weights(tmp_path: Path) -> None:
    common: dict[str, Any] = {"device": CPU, "seed": 5, "settings": LITTLE}
    tiny_hunyuan_video.train(tmp_path / "a", tmp_path / "whole", **common)
    for stop in (2, 3):  # first in the autoencoder, then in the flow stage
        with pytest.raises(stages.Interrupted):
            tiny_hunyuan_video.train(
                tmp_path / "b", tmp_path / "parts", should_stop=lambda step, at=stop: step == at, **common
            )
    tiny_hunyuan_video.train(tmp_path / "b", tmp_path / "parts", **common)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole["transformer/proj_out.weight"].any()
    assert not whole["transformer/time_text_embed.guidance_embedder.linear_2.weight"].any()
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
