"""The hard models: their captions and pictures, how they are trained, and what is called hard."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import hard_dit, hard_flux, hardness, leaves, stages
from training.tiny_flux import save_pipeline

import dpcache
from dpcache.zoo import BUNDLED, load_pipeline
from dpcache.zoo import leaves as heaps

CPU = torch.device("cpu")
LITTLE_FLUX = hard_flux.Settings(pictures=24, vae_steps=2, vae_batch=2, flow_steps=4, flow_batch=2, decoder_steps=2)
LITTLE_DIT = hard_dit.Settings(pictures=24, steps=4, batch=2)


def test_held_out_captions_are_never_trained_on() -> None:
    trained, held_out = heaps.split_captions()
    assert len(trained) + len(held_out) == len(heaps.all_heaps()) == 160
    assert not set(trained) & set(held_out)
    assert len(held_out) >= 24
    assert heaps.parse("a heap of striped circles in ocean colours") == heaps.Heap("striped", "circles", "ocean")
    assert heaps.parse("a heap of sticks in coal colours") == heaps.Heap("", "sticks", "coal")
    with pytest.raises(ValueError, match="not a caption"):
        heaps.parse("a striped leaf")


def test_classes_come_in_every_order_once_a_round() -> None:
    first, other = heaps.shuffled_classes("calibration"), heaps.shuffled_classes("held-out")
    assert first != other
    assert sorted(first[:40]) == sorted(other[40:80]) == list(range(40))
    assert heaps.CLASSES[heaps.class_of(heaps.Heap("plain", "sticks", "berry"))] == ("sticks", "berry")


def test_every_token_of_a_caption_fits() -> None:
    captions = list(heaps.all_heaps())
    for tokenizer in (hard_flux.build_clip_tokenizer(), hard_flux.build_t5_tokenizer()):
        tokens = tokenizer(captions).input_ids
        assert max(map(len, tokens)) <= hard_flux.TEXT_LENGTH
        assert not any(tokenizer.unk_token_id in row for row in tokens)
    assert max(map(len, tokens)) < hard_flux.TEXT_LENGTH  # training needs a pad of T5


def test_pictures_are_the_same_however_many_are_drawn_at_once() -> None:
    asked = [heaps.parse(caption) for caption in heaps.split_captions()[0][:40]]
    pictures = leaves.render(asked, seed=3)
    assert pictures.shape == (40, 64, 64, 3)
    assert np.array_equal(pictures, leaves.render(asked, seed=3, chunk=3))
    assert not np.array_equal(pictures, leaves.render(asked, seed=4))


def test_pictures_keep_to_their_palette() -> None:
    for palette in heaps.PALETTES:
        picture = leaves.render([heaps.Heap("plain", "squares", palette)], seed=0)[0].astype(float)
        mean = np.array(leaves.PALETTES[palette], float).mean(axis=0)
        assert np.abs(picture.mean(axis=(0, 1)) - mean).max() < 75


def test_curves_increase_and_begin_at_the_first_step() -> None:
    assert hardness.curve(1, 49) == (0, 6, 12, 18, 24, 31, 37, 43, 49)
    assert hardness.curve(3, 49) == (0, 1, 2, 3, 6, 12, 21, 33, 49)
    assert hardness.is_front_loaded(hardness.curve(3, 49))
    assert not hardness.is_front_loaded(hardness.curve(1, 49))


def test_noise_of_the_times_is_that_of_a_shifted_flow() -> None:
    kept = hard_dit.build_scheduler().alphas_cumprod.double()
    ratio = (1 / kept - 1).sqrt()
    assert ratio[499].item() == pytest.approx(hard_dit.SHIFT, rel=0.01)
    assert (ratio.diff() > 0).all()


def test_scaled_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = hard_flux.build_vae()
    pictures = hard_flux.draw_pictures(30, seed=0).pixels
    pixels = hard_flux.to_pixels(pictures, CPU)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        hard_flux.scale_latents(vae, pictures)
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, rtol=0, atol=1e-3)
    deviations = latents.std(dim=(0, 2, 3))
    assert (deviations.diff() < 1e-3).all()  # the largest comes first
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-2


def test_interrupted_flux_training_gives_the_same_weights(tmp_path: Path) -> None:
    hard_flux.train(tmp_path / "a", tmp_path / "whole", device=CPU, seed=0, settings=LITTLE_FLUX)
    with pytest.raises(stages.Interrupted):
        hard_flux.train(
            tmp_path / "b", tmp_path / "parts", device=CPU, seed=0, settings=LITTLE_FLUX, should_stop=lambda n: n == 3
        )
    hard_flux.train(tmp_path / "b", tmp_path / "parts", device=CPU, seed=0, settings=LITTLE_FLUX)
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_dit_training_saves_a_small_pipeline(tmp_path: Path) -> None:
    pipeline = hard_flux.build_pipeline(seed=0)
    save_pipeline(pipeline, tmp_path / "flux")
    hard_dit.train(
        tmp_path / "checkpoints", tmp_path / "dit", device=CPU, seed=0, settings=LITTLE_DIT, vae=tmp_path / "flux/vae"
    )
    size = sum(path.stat().st_size for path in (tmp_path / "dit").rglob("*") if path.is_file())
    assert size < 12e6


@pytest.mark.parametrize(("model", "lead"), [("hard-flux", 8.0), ("hard-dit", 8.0)])
def test_without_a_calibration_hard_models_are_far_above_even_spacing(model: str, lead: float) -> None:
    bundled, pipeline = BUNDLED[model], load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    (call,) = hardness.together(bundled.held_out_inputs(8), 1000, bundled.call_defaults)
    even = [dpcache.Schedule.uniform(9, 50, order=order) for order in (0, 1)]
    smooth = dpcache.Schedule.smooth(9, 50, boundary="output")
    full = dpcache.compare_all(pipeline, [smooth, *even], [call], num_inference_steps=50, progress=False)
    ours, *others = (np.mean([sample.psnr for sample in one.samples]) for one in full)
    assert ours > max(others) + lead
