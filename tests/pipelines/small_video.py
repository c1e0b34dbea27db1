"""Video pipelines (and what shares their denoisers) and UNets from small random components; see small.py."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance

from tests.pipelines.small import Built, assemble, make, noise, ones, size, small


def guided(**more: Any) -> dict[str, Any]:
    """Results of a text encoder for a prompt and for a negative one."""
    return {"prompt_embeds": noise(1, 5, 8), "negative_prompt_embeds": noise(1, 5, 8, seed=1), **more}


def masks(kind: str = "prompt_attention_mask") -> dict[str, Any]:
    return {kind: ones(1, 5), f"negative_{kind}": ones(1, 5)}


def flow_unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def kandinsky(kind: str, **sizes: Any) -> Built:
    transformer = make(
        "Kandinsky5Transformer3DModel",
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
    )
    pipe = assemble(kind, transformer)
    pipe.resolutions = [(32, 32)]
    return pipe, {
        "prompt_embeds_qwen": noise(1, 5, 8),
        "prompt_embeds_clip": noise(1, 8),
        "prompt_cu_seqlens": torch.tensor([0, 5]),
        "negative_prompt_embeds_qwen": noise(1, 4, 8, seed=1),
        "negative_prompt_embeds_clip": noise(1, 8, seed=1),
        "negative_prompt_cu_seqlens": torch.tensor([0, 4]),
        **size(32),
        **sizes,
    }


@small(branches=2, heads=("out_layer",), bfloat16=False)
def Kandinsky5T2IPipeline() -> Built:
    return kandinsky("Kandinsky5T2IPipeline")


@small(branches=2, heads=("out_layer",), bfloat16=False)
def Kandinsky5T2VPipeline() -> Built:
    return kandinsky("Kandinsky5T2VPipeline", num_frames=5)


@small(branches=2)
def HunyuanVideoPipeline() -> Built:
    transformer = make(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    pooled = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8, seed=1)}
    return assemble("HunyuanVideoPipeline", transformer), guided(
        **masks(), **pooled, true_cfg_scale=2.0, num_frames=5, **size(32)
    )


@small(branches=2)
def HunyuanVideo15Pipeline() -> Built:
    transformer = make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        task_type="t2v",
    )
    vae = make(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
    )
    pipe = assemble("HunyuanVideo15Pipeline", transformer, vae=vae, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    pipe.vision_num_semantic_tokens = 3
    second = {"prompt_embeds_2": noise(1, 5, 8, seed=2), "negative_prompt_embeds_2": noise(1, 5, 8, seed=3)}
    return pipe, guided(
        **masks("prompt_embeds_mask"), **masks("prompt_embeds_mask_2"), **second, num_frames=5, **size(64)
    )


@small(branches=2)
def HunyuanImagePipeline() -> Built:
    transformer = make(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    pipe = assemble("HunyuanImagePipeline", transformer, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    second = {"prompt_embeds_2": noise(1, 5, 8, seed=2), "negative_prompt_embeds_2": noise(1, 5, 8, seed=3)}
    return pipe, guided(**masks("prompt_embeds_mask"), **masks("prompt_embeds_mask_2"), **second, **size(128))


def wan(kind: str = "WanTransformer3DModel", in_channels: int = 4) -> Any:
    return make(
        kind,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


@small("WanPipeline (2.1)", branches=2)
def wan_2_1() -> Built:
    return assemble("WanPipeline", wan(), flow_unipc()), guided(num_frames=5, **size(32))


@small(
    "WanPipeline (2.2, two transformers)",
    branches=2,
    keys=(0, 1, 4, 5),
    order=1,
    switch=4,
    note="After the switch to `transformer_2` the schedule starts over, key steps in a row first.",
)
def wan_2_2() -> Built:
    second = wan()
    for parameter in second.parameters():
        parameter.data = parameter.data.flip(0)
    pipe = assemble("WanPipeline", wan(), flow_unipc(), transformer_2=second, boundary_ratio=0.76)
    return pipe, guided(num_frames=5, guidance_scale_2=3.0, **size(32))


@small(branches=2, note="Image to video.")
def WanImageToVideoPipeline() -> Built:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = make("AutoencoderKLWan", base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)
    # The noise, and beside it the picture and which frames it is of.
    pipe = assemble("WanImageToVideoPipeline", wan(in_channels=12), flow_unipc(), vae=vae)
    return pipe, guided(image=noise(1, 3, 32, 32).sigmoid(), num_frames=5, **size(32))


@small(branches=2)
def SkyReelsV2Pipeline() -> Built:
    return assemble("SkyReelsV2Pipeline", wan("SkyReelsV2Transformer3DModel"), flow_unipc()), guided(
        num_frames=5, **size(32)
    )


@small()
def LTXPipeline() -> Built:
    transformer = make(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )
    return assemble("LTXPipeline", transformer), guided(**masks(), num_frames=9, **size(64))


@small(
    branches=3,
    heads=("norm_out", "audio_norm_out"),
    note="Video and sound are predicted together, with the same coefficients.",
)
def LTX2Pipeline() -> Built:
    transformer = make(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
        perturbed_attn=True,
    )
    connectors = pytest.importorskip("diffusers.pipelines.ltx2").LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    vae = make(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(1,),
    )
    audio_vae = make(
        "AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=1, mel_bins=16
    )
    pipe = assemble("LTX2Pipeline", transformer, vae=vae, audio_vae=audio_vae, connectors=connectors.eval())
    return pipe, guided(
        **masks(), num_frames=5, frame_rate=25.0, spatio_temporal_guidance_blocks=[1], guidance_rescale=0.0, **size(32)
    )


@small(heads=("norm_final",))
def CogVideoXPipeline() -> Built:
    transformer = make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=5,
    )
    return assemble("CogVideoXPipeline", transformer, diffusers.CogVideoXDDIMScheduler()), guided(
        num_frames=5, max_sequence_length=5, **size(32)
    )


@small()
def MochiPipeline() -> Built:
    transformer = make(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        max_sequence_length=5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return assemble("MochiPipeline", transformer, scheduler), guided(
        **{name: mask.bool() for name, mask in masks().items()}, num_frames=7, **size(32)
    )


def unet(**config: Any) -> Any:
    return make(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        **config,
    )


@small(heads=())
def StableDiffusionPipeline() -> Built:
    pipe = assemble(
        "StableDiffusionPipeline",
        unet(attention_head_dim=2),
        diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )
    return pipe, guided(**size(64))


@small(heads=())
def StableDiffusionXLPipeline() -> Built:
    network = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=56,
    )
    pipe = assemble("StableDiffusionXLPipeline", network, diffusers.EulerDiscreteScheduler())
    return pipe, guided(pooled_prompt_embeds=noise(1, 8), negative_pooled_prompt_embeds=noise(1, 8, seed=1), **size(64))
