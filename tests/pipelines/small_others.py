"""Unconditional pipelines, and those whose denoiser is a UNet of another kind; from small random components."""

from functools import partial
from typing import Any

import diffusers
import torch

from tests.pipelines.small import Absent, make, mask, noise, picture, size, texts, wide
from tests.pipelines.small_unet import CHANNELS, ddim, pictures, sd_given

PLAIN = {
    "block_out_channels": CHANNELS,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


def plain_unet(**config: Any) -> Any:
    return make("UNet2DModel", **{**PLAIN, "sample_size": 8, "in_channels": 3, "out_channels": 3, **config})


def plain(scheduler: Any, **config: Any) -> dict[str, Any]:
    return {"unet": plain_unet(**config), "scheduler": scheduler}


def unconditional() -> dict[str, Any]:
    return {"output_type": "np", "batch_size": 1}


wide("DDIMPipeline", parts=lambda: plain(diffusers.DDIMScheduler(clip_sample=False)), given=unconditional)
wide("DDPMPipeline", parts=lambda: plain(diffusers.DDPMScheduler()), given=unconditional)
wide("PNDMPipeline", parts=lambda: plain(diffusers.PNDMScheduler()), given=unconditional)
wide("KarrasVePipeline", parts=lambda: plain(diffusers.KarrasVeScheduler()), given=unconditional)
wide(
    "ScoreSdeVePipeline",
    parts=lambda: plain(diffusers.ScoreSdeVeScheduler(), time_embedding_type="fourier"),
    given=unconditional,
)
wide("ConsistencyModelPipeline", parts=lambda: plain(diffusers.CMStochasticIterativeScheduler()), given=unconditional)
wide(
    "RePaintPipeline",
    parts=lambda: plain(diffusers.RePaintScheduler()),
    given=lambda: {**unconditional(), "image": picture(8), "mask_image": mask(8), "jump_length": 2, "jump_n_sample": 2},
)
wide(
    "LDMPipeline",
    parts=lambda: {**plain(ddim()), "vqvae": make("VQModel", block_out_channels=(4,), norm_num_groups=2)},
    given=unconditional,
)
wide(
    "LDMSuperResolutionPipeline",
    parts=lambda: {
        **plain(ddim(), in_channels=6),
        "vqvae": make("VQModel", block_out_channels=(4,), norm_num_groups=2),
    },
    given=lambda: {**unconditional(), "image": picture(8)},
)
wide(
    "DanceDiffusionPipeline",
    parts=lambda: {
        "unet": make(
            "UNet1DModel",
            sample_size=64,
            sample_rate=16,
            extra_in_channels=16,
            block_out_channels=(8, 32, 32),
        ),
        "scheduler": diffusers.IPNDMScheduler(),
    },
    given=lambda: {"batch_size": 1},
)

IF = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 8),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "only_cross_attention": True,
    "cross_attention_dim": 8,
    "encoder_hid_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}


def if_parts(larger: bool = False) -> dict[str, Any]:
    more = {"class_embed_type": "timestep", "in_channels": 6} if larger else {}
    return {
        "unet": make("UNet2DConditionModel", **{**IF, **more}),
        "scheduler": diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        "image_noising_scheduler": diffusers.DDPMScheduler(),
        "requires_safety_checker": False,
    }


deepfloyd = partial(
    wide, parts=if_parts, given=lambda: {**sd_given(), **size(8), "output_type": "pt", "image": picture(8) * 2 - 1}
)
deepfloyd("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline", mask_image=mask(8))
deepfloyd(
    "IFSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingSuperResolutionPipeline",
    config={"larger": True},
    image=picture(4) * 2 - 1,
    original_image=picture(8) * 2 - 1,
    mask_image=mask(8),
)


def movq() -> Any:
    return make(
        "VQModel",
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("AttnUpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        norm_type="spatial",
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=8,
    )


def kandinsky_unet(**config: Any) -> Any:
    return make(
        "UNet2DConditionModel",
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "block_out_channels": (8, 8),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "addition_embed_type": "image",
            "encoder_hid_dim": 8,
            "encoder_hid_dim_type": "image_proj",
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "resnet_time_scale_shift": "scale_shift",
            **config,
        },
    )


def kandinsky2_parts(first: bool = False, **config: Any) -> dict[str, Any]:
    text = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"} if first else {}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="epsilon")
    return {"unet": kandinsky_unet(**text, **config), "movq": movq(), "scheduler": scheduler}


def kandinsky2_given() -> dict[str, Any]:
    embeds = {"image_embeds": noise(1, 8), "negative_image_embeds": noise(1, 8, seed=1)}
    return {**pictures(), **embeds, **size(64), "image": picture(64), "mask_image": mask(64)[0, 0], "prompt": ""}


kandinsky2 = partial(wide, parts=kandinsky2_parts, given=kandinsky2_given)
kandinsky2("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline")
kandinsky2("KandinskyV22InpaintPipeline", config={"in_channels": 9})
kandinsky2(
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    config={"in_channels": 8, "addition_embed_type": "image_hint"},
    output_type="pt",
    hint=picture(64),
)
kandinsky1 = partial(
    kandinsky2, output_type="pt", stubs={"_encode_prompt": (noise(2, 8), noise(2, 5, 8), torch.ones(2, 5).bool())}
)
kandinsky1("KandinskyPipeline", "KandinskyImg2ImgPipeline", config={"first": True})
kandinsky1("KandinskyInpaintPipeline", config={"first": True, "in_channels": 9})


def prior_parts() -> dict[str, Any]:
    config = {"num_attention_heads": 2, "attention_head_dim": 4, "embedding_dim": 8, "num_embeddings": 5}
    prior = make("PriorTransformer", num_layers=2, **config)
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000
    )
    return {"prior": prior, "scheduler": scheduler}


wide(
    "KandinskyPriorPipeline",
    "KandinskyV22PriorPipeline",
    "KandinskyV22PriorEmb2EmbPipeline",
    parts=prior_parts,
    given=lambda: {"prompt": "", "output_type": "pt", "image": noise(1, 8), "guidance_scale": 3.0, "strength": 0.8},
    stubs={
        "_encode_prompt": (noise(2, 8), noise(2, 5, 8), torch.ones(2, 5).bool()),
        "get_zero_embed": noise(1, 8),
    },
)


def combined_parts(first: bool = False, **config: Any) -> dict[str, Any]:
    parts = kandinsky2_parts(first, **config)
    prior = prior_parts()
    return {**parts, "prior_prior": prior["prior"], "prior_scheduler": prior["scheduler"]}


def combined_ready(pipe: Any) -> None:
    prior = pipe.prior_pipe
    prior._encode_prompt = lambda *_, **__: (noise(2, 8), noise(2, 5, 8), torch.ones(2, 5).bool())
    prior.get_zero_embed = lambda *_, **__: noise(1, 8)
    pipe.decoder_pipe._encode_prompt = prior._encode_prompt


combined = partial(
    wide,
    parts=combined_parts,
    given=lambda: {**kandinsky2_given(), "prior_num_inference_steps": 4, "output_type": "pt"},
    ready=combined_ready,
)
combined("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline")
combined("KandinskyV22InpaintCombinedPipeline", config={"in_channels": 9})
combined("KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline", config={"first": True})
combined("KandinskyInpaintCombinedPipeline", config={"first": True, "in_channels": 9})


def kandinsky3_parts() -> dict[str, Any]:
    network = make(
        "Kandinsky3UNet",
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8, 8, 8),
        cross_attention_dim=8,
        encoder_hid_dim=8,
    )
    return {"unet": network, "movq": movq(), "scheduler": diffusers.DDPMScheduler()}


wide(
    "Kandinsky3Pipeline",
    "Kandinsky3Img2ImgPipeline",
    parts=kandinsky3_parts,
    given=lambda: {**sd_given(), **size(64), "image": picture(64)},
)

CASCADE = {
    "block_out_channels": (8, 8),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "timestep_ratio_embedding_dim": 8,
    "conditioning_dim": 8,
    "clip_text_pooled_in_channels": 8,
    "clip_seq": 1,
}


def cascade_prior() -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "clip_text_in_channels": 8, "clip_image_in_channels": 8}
    prior = make("StableCascadeUNet", **CASCADE, **config, switch_level=(False,))
    scheduler = diffusers.DDPMWuerstchenScheduler()
    return {"prior": prior, "scheduler": scheduler, "resolution_multiple": 42.67, "text_encoder": Absent()}


def cascade_decoder() -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "patch_size": 2, "effnet_in_channels": 4}
    decoder = make("StableCascadeUNet", **CASCADE, **config)
    vqgan = make("PaellaVQModel" if hasattr(diffusers, "PaellaVQModel") else "VQModel")
    return {"decoder": decoder, "scheduler": diffusers.DDPMWuerstchenScheduler(), "vqgan": vqgan}


def pooled() -> dict[str, Any]:
    found = {"prompt_embeds_pooled": noise(1, 1, 8), "negative_prompt_embeds_pooled": noise(1, 1, 8, seed=1)}
    return {**texts(), **found, "guidance_scale": 3.0}


wide(
    "StableCascadePriorPipeline",
    parts=cascade_prior,
    given=lambda: {**pooled(), **size(128), "output_type": "pt"},
)
wide(
    "StableCascadeDecoderPipeline",
    parts=lambda: {**cascade_decoder(), "vqgan": None, "latent_dim_scale": 10.67},
    given=lambda: {**pooled(), "image_embeddings": noise(1, 4, 3, 3)},
)
