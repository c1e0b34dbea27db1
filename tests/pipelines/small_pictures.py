"""More pipelines that make pictures with transformers, from small random components; see small_image.py."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.pipelines.small import make, mask, noise, ones, picture, size, texts, wide
from tests.pipelines.small_flux import flow, latents_vae, qwen_vae
from tests.pipelines.small_unet import PIXELS, pictures, vae

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def given(**more: Any) -> dict[str, Any]:
    return {**texts(), **pictures(), "use_resolution_binning": False, "negative_prompt": None, **more}


def sd3_parts(controlnet: bool = False, extra: int = 0, **config: Any) -> dict[str, Any]:
    joint = {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
        "out_channels": 4,
        **HEADS,
        **config,
    }
    control = {**joint, "num_layers": 1, "extra_conditioning_channels": extra}
    return flow(
        transformer=make("SD3Transformer2DModel", **joint),
        controlnet=make("SD3ControlNetModel", **control) if controlnet else None,
    )


sd3 = partial(wide, parts=sd3_parts, given=given)
sd3("StableDiffusion3Img2ImgPipeline")
wide(
    "StableDiffusion3InpaintPipeline",
    parts=lambda: {**sd3_parts(in_channels=16, out_channels=16), "vae": vae(latent_channels=16, shift_factor=0.1)},
    given=given,
)
sd3("StableDiffusion3ControlNetPipeline", config={"controlnet": True})
sd3(
    "StableDiffusion3ControlNetInpaintingPipeline",
    config={"controlnet": True, "extra": 1},
    control_mask=mask(PIXELS),
)


def pixart_parts() -> dict[str, Any]:
    transformer = make(
        "PixArtTransformer2DModel",
        num_layers=2,
        sample_size=8,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
        **HEADS,
    )
    return {"transformer": transformer, "vae": vae(), "scheduler": diffusers.DPMSolverMultistepScheduler()}


wide(
    "PixArtSigmaPAGPipeline",
    parts=pixart_parts,
    given=given,
    ready=lambda pipe: pipe.set_pag_applied_layers(["blocks.1"]),
)


def hunyuan_dit_parts(controlnet: bool = False) -> dict[str, Any]:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 16,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 8,
        "text_len": 5,
        "text_len_t5": 5,
        **HEADS,
    }
    return {
        "transformer": make("HunyuanDiT2DModel", num_layers=8 if controlnet else 4, **config),
        "controlnet": make("HunyuanDiT2DControlNetModel", transformer_num_layers=8, **config) if controlnet else None,
        "vae": vae(),
        "scheduler": diffusers.DDPMScheduler(),
        "requires_safety_checker": False,
    }


hunyuan_dit = partial(wide, parts=hunyuan_dit_parts, given=given)
hunyuan_dit("HunyuanDiTPipeline")
hunyuan_dit("HunyuanDiTPAGPipeline", ready=lambda pipe: pipe.set_pag_applied_layers(["blocks.1"]))
hunyuan_dit("HunyuanDiTControlNetPipeline", config={"controlnet": True})


def cogview_parts(kind: str, **config: Any) -> dict[str, Any]:
    transformer = make(
        kind,
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
            **HEADS,
            **config,
        },
    )
    scheduler = diffusers.CogVideoXDDIMScheduler() if "3" in kind else FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer, "vae": latents_vae(), "scheduler": scheduler}


wide(
    "CogView3PlusPipeline",
    parts=partial(cogview_parts, "CogView3PlusTransformer2DModel", pos_embed_max_size=8),
    given=given,
)
wide(
    "CogView4ControlPipeline",
    parts=partial(cogview_parts, "CogView4Transformer2DModel", in_channels=8, rope_axes_dim=(4, 4)),
    given=lambda: {**given(), **texts(16)},
)
wide(
    "LuminaPipeline",
    parts=lambda: {
        "transformer": make(
            "LuminaNextDiT2DModel",
            sample_size=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=8,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {**given(), **size(64)},
)

Z = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def z_parts(control: int = 0, **config: Any) -> dict[str, Any]:
    axes = {"axes_dims": [4, 4, 8], "axes_lens": [128, 32, 32]}
    transformer = make("ZImageTransformer2DModel", in_channels=4, n_layers=2, cap_feat_dim=8, **Z, **axes, **config)
    parts = flow(transformer=transformer)
    if control:
        parts["controlnet"] = make(
            "ZImageControlNetModel",
            control_layers_places=[0, 1],
            control_refiner_layers_places=[0],
            control_in_dim=control,
            **Z,
        )
    return parts


z_image = partial(
    wide,
    parts=z_parts,
    given=lambda: {**given(), "prompt_embeds": [noise(5, 8)], "negative_prompt_embeds": [noise(4, 8, seed=1)]},
)
z_image("ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
z_image("ZImageControlNetPipeline", config={"control": 4})
z_image("ZImageControlNetInpaintPipeline", config={"control": 9})


def sana_parts(kind: str = "SanaTransformer2DModel", controlnet: bool = False, **config: Any) -> dict[str, Any]:
    shape = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "sample_size": 8,
    }
    autoencoder = make(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return {
        "transformer": make(kind, **shape, **config),
        "controlnet": make("SanaControlNetModel", **{**shape, "num_layers": 1}) if controlnet else None,
        "vae": autoencoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


sana = partial(wide, parts=sana_parts, given=given)
sana = partial(sana, **size(32), image=picture(32), control_image=picture(32, 1))
sana("SanaPAGPipeline", ready=lambda pipe: pipe.set_pag_applied_layers(["blocks.1"]))
sana("SanaControlNetPipeline", config={"controlnet": True})
wide(
    "SanaSprintPipeline",
    "SanaSprintImg2ImgPipeline",
    parts=lambda: {**sana_parts(guidance_embeds=True), "scheduler": diffusers.SCMScheduler()},
    given=lambda: {**given(), **size(32), "image": picture(32), "intermediate_timesteps": None},
)
wide(
    "Krea2Pipeline",
    parts=lambda: {
        "transformer": make(
            "Krea2Transformer2DModel",
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            timestep_embed_dim=8,
            text_hidden_dim=8,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": qwen_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {
        **given(),
        "prompt_embeds": noise(1, 5, 2, 8),
        "negative_prompt_embeds": noise(1, 5, 2, 8, seed=1),
        "prompt_embeds_mask": ones(1, 5).bool(),
        "negative_prompt_embeds_mask": ones(1, 5).bool(),
    },
)
wide(
    "ErnieImagePipeline",
    parts=lambda: {
        "transformer": make(
            "ErnieImageTransformer2DModel",
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=8,
            rope_axes_dim=(4, 4, 8),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {
        **given(),
        "prompt_embeds": [noise(5, 8)],
        "negative_prompt_embeds": [noise(4, 8, seed=1)],
        "use_pe": False,
        **size(64),
    },
)


def ideogram_parts() -> dict[str, Any]:
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "adaln_dim": 8,
        "llm_features_dim": 8,
        "mrope_section": (4, 2, 2),
    }
    second = make("Ideogram4Transformer2DModel", **config)
    return {
        "transformer": make("Ideogram4Transformer2DModel", **config),
        "unconditional_transformer": second,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


wide(
    "Ideogram4Pipeline",
    parts=ideogram_parts,
    given=lambda: {
        **size(256),
        "guidance_scale": 3.0,
        "guidance_schedule": None,
        "prompt": "",
        "max_sequence_length": 5,
    },
    stubs={
        "encode_prompt": lambda grid_h, grid_w, **_: (
            noise(1, 5 + grid_h * grid_w, 8),
            torch.arange(5 + grid_h * grid_w)[None, :, None].expand(1, -1, 3).clone(),
            ones(1, 5 + grid_h * grid_w),
            torch.cat([torch.full((1, 5), 3), torch.full((1, grid_h * grid_w), 2)], dim=1),
        )
    },
)
wide(
    "NucleusMoEImagePipeline",
    parts=lambda: {
        "transformer": make(
            "NucleusMoEImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
            num_experts=2,
            moe_intermediate_dim=8,
            capacity_factors=[1.0, 1.0],
        ),
        "vae": qwen_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    },
    given=given,
)
PRX = {
    "context_in_dim": 8,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [4, 4],
}
wide(
    "PRXPipeline",
    parts=lambda: flow(transformer=make("PRXTransformer2DModel", in_channels=4, **PRX)),
    given=lambda: {**given(), **{f"{n}prompt_attention_mask": ones(1, 5).bool() for n in ("", "negative_")}},
)
wide(
    "PRXPixelPipeline",
    parts=lambda: {
        "transformer": make("PRXTransformer2DModel", in_channels=3, **PRX),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {
        **given(),
        **{f"{n}prompt_attention_mask": ones(1, 5).bool() for n in ("", "negative_")},
        "output_type": "pt",
    },
)
wide(
    "GlmImagePipeline",
    parts=lambda: flow(
        transformer=make(
            "GlmImageTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=8,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=16,
            **HEADS,
        ),
        vae=vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    ),
    given=lambda: {**given(), "image": None, "prior_token_ids": ones(1, 256), **size(64)},
)
