"""What is added to a denoiser: LoRA, ControlNet, IP-Adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict

import dpcache
from dpcache.run.loop import Loop
from tests.pipelines import test_table as table
from tests.pipelines.every import SMALL
from tests.pipelines.small import STEPS, make, noise, size
from tests.pipelines.test_table import Subject, check_invariants, same

FLUX = SMALL["FluxPipeline"]


def flux() -> Subject:
    return Subject(FLUX, "blocks", *FLUX.build())


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for the attention of every block, as a LoRA's file."""
    directory = tmp_path_factory.mktemp("lora")
    pipe, _ = FLUX.build()
    torch.manual_seed(2)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(directory, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return directory


def load(pipe: Any, lora: Path) -> None:
    pipe.load_lora_weights(lora, adapter_name="random")


def test_lora_loaded(lora: Path) -> None:
    pipe, arguments = FLUX.build()
    load(pipe, lora)
    check_invariants(Subject(FLUX, "blocks", pipe, arguments))


def test_lora_comes_and_goes_while_enabled(lora: Path) -> None:
    """With a schedule from a calibration without it: its file, and what is calibrated, are of the model alone."""
    subject, other = flux(), flux()
    calibration = dpcache.calibrate(
        subject.pipe, [subject.arguments], num_inference_steps=STEPS, boundary="blocks", progress=False
    )
    planned = calibration.plan(4)
    changes: list[Callable[[Any], object]] = [
        lambda pipe: load(pipe, lora),
        lambda pipe: pipe.set_adapters("random", 0.5),
        lambda pipe: pipe.fuse_lora(lora_scale=0.5),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    drawn = []
    with dpcache.enabled(subject.pipe, planned):
        drawn.append(subject.draw())
        for number, change in enumerate(changes, start=2):
            change(subject.pipe)
            change(other.pipe)
            drawn.append(subject.draw())
            with dpcache.enabled(other.pipe, planned):
                assert same(other.draw(), drawn[-1])
            stats = dpcache.stats(subject.pipe)
            assert stats.full_calls == planned.num_key_steps * FLUX.branches * number
    plain, loaded, scaled, fused, unfused, disabled, enabled, unloaded = drawn
    assert not same(loaded, plain) and not same(scaled, loaded) and not same(fused, scaled)
    assert same(disabled, plain) or torch.allclose(disabled[0], plain[0], atol=1e-5)
    assert same(enabled, unfused)
    assert torch.allclose(unloaded[0], plain[0], atol=1e-5)


@pytest.mark.parametrize("boundary", FLUX.boundaries)
def test_controlnet(boundary: str) -> None:
    """Nothing reads it at skipped steps of "output"; at "blocks" what it adds after the last block counts there."""
    pipe, arguments = FLUX.build()
    controlnet = make(
        "FluxControlNetModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    vae = make("AutoencoderKL", block_out_channels=(4,), norm_num_groups=2, latent_channels=4, shift_factor=0.0)
    controlled = FluxControlNetPipeline(**{**pipe.components, "vae": vae, "controlnet": controlnet})
    controlled.set_progress_bar_config(disable=True)
    call = {**arguments, **size(8), "control_image": noise(1, 3, 8, 8)}
    subject = Subject(FLUX, boundary, controlled, call)
    without = Subject(FLUX, boundary, controlled, {**call, "controlnet_conditioning_scale": 0.0})
    assert not same(subject.plain, without.plain)
    for invariant in (
        table.test_1_all_key_steps_give_the_same_bits,
        table.test_2_recording_changes_nothing,
        table.test_3_disable_leaves_no_trace,
        table.test_4_blocks_run_once_per_key_step_and_branch,
    ):
        invariant(subject)
    layer = controlnet.transformer_blocks[0].norm1
    with table.Spy() as spy, dpcache.enabled(controlled, subject.schedule()):
        runs = spy.count(layer)
        cached = subject.draw()
    assert runs == [STEPS if boundary == "blocks" else len(FLUX.keys)]  # for both branches of a step
    # Run at every step all the same, it gives the same bits.
    with pytest.MonkeyPatch.context() as patch, dpcache.enabled(controlled, subject.schedule()):
        patch.setattr(Loop, "skips", lambda self: False)
        assert same(subject.draw(), cached)


def image_projection(width: int) -> dict[str, torch.Tensor]:
    """Of an image embedding of 6 numbers to 4 tokens."""
    return {
        "proj.weight": noise(4 * width, 6),
        "proj.bias": noise(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def test_ip_adapter_of_a_transformer() -> None:
    pipe, arguments = FLUX.build()
    layers = {
        f"{block}.to_{name}_ip.{kind}": noise(*shape, seed=block)
        for block in range(2)
        for name in "kv"
        for kind, shape in (("weight", (32, 8)), ("bias", (32,)))
    }
    check_ip_adapter(
        Subject(FLUX, "blocks", pipe, arguments),
        {"image_proj": image_projection(8), "ip_adapter": layers},
        {"image_encoder_pretrained_model_name_or_path": None},
        ip_adapter_image_embeds=[noise(1, 1, 6)],
        negative_ip_adapter_image_embeds=[noise(1, 1, 6, seed=1)],
    )


def test_ip_adapter_of_a_unet() -> None:
    facts = SMALL["StableDiffusionPipeline"]
    layers = {f"{layer}.to_{name}_ip.weight": noise(8, 8, seed=layer) for layer in (1, 3, 5, 7) for name in "kv"}
    check_ip_adapter(
        Subject(facts, "output", *facts.build()),
        {"image_proj": image_projection(8), "ip_adapter": layers},
        {"image_encoder_folder": None, "subfolder": ""},
        ip_adapter_image_embeds=[noise(2, 1, 6)],
    )


def check_ip_adapter(subject: Subject, weights: dict[str, Any], loading: dict[str, Any], **images: Any) -> None:
    calibration = dpcache.calibrate(
        subject.pipe, [subject.arguments], num_inference_steps=STEPS, boundary=subject.boundary, progress=False
    )
    subject.pipe.load_ip_adapter(weights, weight_name="", **loading)
    adapted = Subject(subject.facts, subject.boundary, subject.pipe, {**subject.arguments, **images})
    assert not same(adapted.plain, subject.plain)
    check_invariants(adapted)
    with dpcache.enabled(subject.pipe, calibration.plan(4)):
        adapted.draw()
