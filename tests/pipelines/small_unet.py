"""Pipelines with UNets from small random components: Stable Diffusion, SDXL and what was built on them."""

from functools import partial
from typing import Any

import diffusers

from tests.pipelines.small import make, mask, noise, picture, size, texts, wide

#: Pixels of a picture; with the small autoencoder below its latents have half as many.
PIXELS = 16
CHANNELS = (4, 8)


def vae(**config: Any) -> Any:
    """It halves the size of a picture."""
    two = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return make("AutoencoderKL", **{**two, "norm_num_groups": 2, "latent_channels": 4, **config})


def unet_config(**config: Any) -> dict[str, Any]:
    return {
        "block_out_channels": CHANNELS,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        **config,
    }


XL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 56,
}


def unet(**config: Any) -> Any:
    ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8}
    return make("UNet2DConditionModel", **{**ups, **unet_config(**config)})


def controlnet(kind: str = "ControlNetModel", **config: Any) -> Any:
    return make(kind, conditioning_embedding_out_channels=(4, 4), **unet_config(**config))


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)


def sd_parts(control: str = "", scheduler: Any = None, **config: Any) -> dict[str, Any]:
    return {
        "unet": unet(**config),
        "vae": vae(),
        "scheduler": (scheduler or ddim)(),
        "requires_safety_checker": False,
        "controlnet": controlnet(control) if control else None,
    }


def pictures() -> dict[str, Any]:
    """What variants take beside a text, by the names that pipelines have for it."""
    return {
        "image": picture(PIXELS),
        "mask_image": mask(PIXELS),
        "control_image": picture(PIXELS, 1),
        "strength": 0.8,
        "guidance_scale": 3.0,
        **size(PIXELS),
    }


def sd_given() -> dict[str, Any]:
    return {**texts(), **pictures(), "negative_prompt": None}


sd = partial(wide, parts=sd_parts, given=sd_given)

sd(
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionSAGPipeline",
    "StableDiffusionPanoramaPipeline",
    "AltDiffusionPipeline",
    "AltDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)
sd("StableDiffusionLDM3DPipeline", output_type="np")
sd(
    "CycleDiffusionPipeline",
    prompt="",
    source_prompt="",
    prompt_embeds=None,
    stubs={"encode_prompt": (noise(1, 5, 8), noise(1, 5, 8, seed=1))},
)
sd("StableDiffusionInstructPix2PixPipeline", config={"in_channels": 8}, image_guidance_scale=1.5)
sd("StableDiffusionControlNetPipeline", "StableDiffusionControlNetPAGPipeline", config={"control": "ControlNetModel"})
sd(
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    config={"control": "ControlNetModel"},
)
#: What an adapter finds is added before a block with attention makes the latents smaller, and after one without.
ADAPTED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def adapter() -> Any:
    return make("T2IAdapter", channels=CHANNELS, num_res_blocks=1, downscale_factor=2)


wide(
    "StableDiffusionAdapterPipeline",
    parts=lambda: {**sd_parts(**ADAPTED), "adapter": adapter()},
    given=sd_given,
)
wide(
    "StableDiffusionDepth2ImgPipeline",
    parts=lambda: sd_parts(in_channels=5),
    given=lambda: {**sd_given(), "depth_map": picture(PIXELS, 2)[:, 0]},
)
wide(
    "StableDiffusionImageVariationPipeline",
    parts=sd_parts,
    given=pictures,
    stubs={"_encode_image": noise(2, 1, 8)},
)
wide(
    "PaintByExamplePipeline",
    parts=lambda: sd_parts(in_channels=9),
    given=lambda: {**pictures(), "example_image": picture(PIXELS, 3), "image": 2 * picture(PIXELS) - 1},
    stubs={"_encode_image": noise(2, 1, 8)},
)
wide(
    "StableDiffusionUpscalePipeline",
    parts=lambda: {**sd_parts(in_channels=7, num_class_embeds=1000), "low_res_scheduler": diffusers.DDPMScheduler()},
    given=lambda: {**sd_given(), "image": picture(8), "noise_level": 20},
)
wide(
    "StableDiffusionLatentUpscalePipeline",
    parts=lambda: {
        **sd_parts(in_channels=8, out_channels=5, timestep_post_act=None, time_cond_proj_dim=160),
        "vae": vae(
            block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    },
    given=lambda: {
        **sd_given(),
        "image": noise(1, 4, 4, 4),
        "pooled_prompt_embeds": noise(1, 32),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=1),
    },
)
wide(
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    parts=lambda: sd_parts(time_cond_proj_dim=8, scheduler=diffusers.LCMScheduler),
    given=sd_given,
)
wide(
    "StableDiffusionDiffEditPipeline",
    parts=lambda: {**sd_parts(), "inverse_scheduler": diffusers.DDIMInverseScheduler()},
    given=lambda: {**sd_given(), "mask_image": mask(8)[0], "image_latents": noise(1, 4, 4, 8, 8)},
)


def xl_parts(control: str = "", **config: Any) -> dict[str, Any]:
    settings = {**XL, **config}
    parts = {"unet": unet(**settings), "vae": vae(), "scheduler": diffusers.EulerDiscreteScheduler()}
    if control:
        union = {"num_trans_channel": 4, "num_trans_head": 2, "num_proj_channel": 4} if "Union" in control else {}
        parts["controlnet"] = controlnet(control, **XL, **union)
    return parts


def xl_given() -> dict[str, Any]:
    return {**sd_given(), "control_mode": [0]}


xl = partial(wide, parts=xl_parts, given=xl_given)
xl("StableDiffusionXLPipeline", "StableDiffusionXLPAGPipeline", original_size=(16, 16), target_size=(16, 16))
xl(
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
)
xl("StableDiffusionXLInstructPix2PixPipeline", config={"in_channels": 8})
xl(
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    config={"control": "ControlNetModel"},
)
xl(
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    config={"control": "ControlNetUnionModel"},
)
wide(
    "StableDiffusionXLAdapterPipeline",
    parts=lambda: {**xl_parts(**ADAPTED), "adapter": adapter()},
    given=xl_given,
)
