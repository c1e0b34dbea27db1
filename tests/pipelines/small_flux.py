"""Relatives of FLUX and of Qwen-Image from small random components: what denoises packed patches of latents."""

import sys
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.pipelines.small import Absent, make, noise, ones, picture, pil, texts, wide
from tests.pipelines.small_unet import PIXELS, pictures, vae

JOINT = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 4, 8),
}


def latents_vae() -> Any:
    return vae(scaling_factor=0.5, shift_factor=0.1)


def flow(**parts: Any) -> dict[str, Any]:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": latents_vae(), **parts}


def packed_parts(kind: str = "FluxTransformer2DModel", controlnet: str = "", **config: Any) -> dict[str, Any]:
    pooled = (
        {"pooled_projection_dim": 8} if kind in ("FluxTransformer2DModel", "LongCatImageTransformer2DModel") else {}
    )
    transformer = make(kind, **{"in_channels": 16, **JOINT, **pooled, **config})
    control = {"num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8, "in_channels": 16}
    return flow(transformer=transformer, controlnet=make(controlnet, **{**JOINT, **control}) if controlnet else None)


def given() -> dict[str, Any]:
    return {**texts(), **pictures(), "true_cfg_scale": 2.0, "max_area": PIXELS**2, "_auto_resize": False}


flux = partial(wide, parts=packed_parts, given=given)
flux("FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline", "FluxKontextInpaintPipeline")
#: The picture to be followed is a second set of channels beside the noise.
flux(
    "FluxControlPipeline",
    "FluxControlImg2ImgPipeline",
    config={"in_channels": 32, "out_channels": 16},
)
flux("FluxControlInpaintPipeline", config={"in_channels": 32, "out_channels": 16}, image=picture(PIXELS) * 2 - 1)
flux("FluxFillPipeline", config={"in_channels": 48, "out_channels": 16})
flux(
    "FluxControlNetPipeline",
    "FluxControlNetImg2ImgPipeline",
    "FluxControlNetInpaintPipeline",
    config={"controlnet": "FluxControlNetModel"},
)
wide(
    "ChromaImg2ImgPipeline",
    "ChromaInpaintPipeline",
    ready=lambda pipe: pipe.transformer.register_to_config(guidance_embeds=False),
    parts=partial(
        packed_parts,
        "ChromaTransformer2DModel",
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ),
    given=lambda: {
        **given(),
        "prompt_attention_mask": ones(1, 5).bool(),
        "negative_prompt_attention_mask": ones(1, 5).bool(),
    },
)
wide(
    "OvisImagePipeline",
    parts=partial(packed_parts, "OvisImageTransformer2DModel", out_channels=16),
    given=given,
    negative_prompt=None,
)
wide(
    "LongCatImagePipeline",
    "LongCatImageEditPipeline",
    parts=lambda: {
        **packed_parts("LongCatImageTransformer2DModel", in_channels=64),
        "vae": vae(latent_channels=16, shift_factor=0.1),
        "text_processor": Absent(),
    },
    given=lambda: {**given(), "image": pil(PIXELS), "enable_prompt_rewrite": False, "negative_prompt": None},
    ready=lambda pipe: small_areas(pipe),
    stubs={"encode_prompt": (noise(1, 5, 8), torch.zeros(5, 3))},
)
wide(
    "BriaPipeline",
    parts=partial(packed_parts, "BriaTransformer2DModel"),
    given=given,
)


def flux2_parts() -> dict[str, Any]:
    transformer = make(
        "Flux2Transformer2DModel",
        **{**JOINT, "in_channels": 16, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    )
    two = {"block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2}
    autoencoder = make(
        "AutoencoderKLFlux2",
        **two,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
    )
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": autoencoder, "transformer": transformer}


wide(
    "Flux2KleinPipeline",
    "Flux2KleinInpaintPipeline",
    "Flux2KleinKVPipeline",
    parts=flux2_parts,
    given=lambda: {**given(), "image": pil(64), "mask_image": pil(64, 1), "height": 32, "width": 32},
)

QWEN = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}


def qwen_vae(latents: int = 4, **config: Any) -> Any:
    statistics = {"latents_mean": [0.0] * latents, "latents_std": [1.0] * latents}
    return make(
        "AutoencoderKLQwenImage",
        base_dim=4,
        z_dim=latents,
        dim_mult=[1, 2],
        num_res_blocks=1,
        **{"temperal_downsample": [False], **statistics, **config},
    )


def qwen_parts(controlnet: bool = False, extra: int = 0, latents: int = 4, **config: Any) -> dict[str, Any]:
    axes = {"axes_dims_rope": (4, 4, 8)}
    parts = {
        "text_encoder": Absent(),
        "transformer": make(
            "QwenImageTransformer2DModel", in_channels=4 * latents, out_channels=latents, **QWEN, **axes, **config
        ),
        "vae": qwen_vae(latents, **({"input_channels": 4} if config.get("use_layer3d_rope") else {})),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    if controlnet:
        parts["controlnet"] = make(
            "QwenImageControlNetModel",
            in_channels=16,
            out_channels=4,
            extra_condition_channels=extra,
            **{**QWEN, "num_layers": 1},
            **axes,
        )
    return parts


def qwen_given() -> dict[str, Any]:
    return {**given(), "control_mask": picture(PIXELS)[:, :1], "prompt": None, "layers": 2}


qwen = partial(wide, parts=qwen_parts, given=qwen_given)
qwen("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
qwen("QwenImageControlNetPipeline", config={"controlnet": True})
qwen("QwenImageControlNetInpaintPipeline", config={"controlnet": True, "extra": 4})


def small_areas(pipe: Any) -> None:
    """The area that pictures are brought to is a constant in the pipeline's module."""
    module = sys.modules[type(pipe).__module__]
    whole = getattr(module, "calculate_dimensions", None)
    if whole is None:
        return
    if not hasattr(whole, "whole"):
        module.calculate_dimensions = lambda area, ratio: whole(min(area, 32 * 32), ratio)
        module.calculate_dimensions.whole = whole


qwen = partial(qwen, ready=small_areas)
qwen("QwenImageEditPipeline", "QwenImageEditInpaintPipeline", image=pil(32), mask_image=pil(32, 1))
qwen("QwenImageEditPlusPipeline", image=[pil(32), pil(32, 1)], config={"zero_cond_t": False})
qwen(
    "QwenImageLayeredPipeline",
    # Latents of four channels would be taken for a picture with transparency.
    config={"use_layer3d_rope": True, "use_additional_t_cond": True, "latents": 8},
    image=pil(32).convert("RGBA"),
    prompt="a picture",
    output_type="pt",
    stubs={"encode_prompt": (noise(1, 5, 8), ones(1, 5))},
)
