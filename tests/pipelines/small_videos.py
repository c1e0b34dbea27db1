"""More pipelines that make videos, from small random components; see small_video.py."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.pipelines.small import make, noise, picture, pil, size, texts, wide
from tests.pipelines.small_unet import PIXELS, ddim, pictures, vae
from tests.pipelines.small_video import flow_unipc

FRAMES = 5


def frames(pixels: int, number: int = FRAMES) -> list[Any]:
    return [pil(pixels, seed) for seed in range(number)]


def clip(pixels: int, number: int = FRAMES) -> torch.Tensor:
    """[1, frames, 3, height, width], values from 0 to 1."""
    return torch.stack([picture(pixels, seed) for seed in range(number)], dim=1)


def given(pixels: int = 32, number: int = FRAMES) -> dict[str, Any]:
    return {
        **texts(),
        **pictures(),
        **size(pixels),
        "image": pil(pixels),
        "video": frames(pixels, number),
        "control_video": frames(pixels, number),
        "conditioning_frames": frames(pixels, number),
        "num_frames": number,
        "negative_prompt": None,
        "guidance_scale": 3.0,
    }


def wan_vae(**config: Any) -> Any:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return make(
        "AutoencoderKLWan",
        **{"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **statistics, **config},
    )


def wan_parts(kind: str = "WanTransformer3DModel", in_channels: int = 4, **config: Any) -> dict[str, Any]:
    base = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": in_channels,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return {"transformer": make(kind, **{**base, **config}), "vae": wan_vae(), "scheduler": flow_unipc()}


#: For denoisers that see a picture as well. Of their context they take all but the last 512 tokens to be of it.
SEEING = {"image_dim": 8, "added_kv_proj_dim": 24}
SEEN = {"encode_image": noise(1, 4, 8)}


def seeing() -> dict[str, Any]:
    return {**given(), **texts(512)}


wide("WanVideoToVideoPipeline", parts=wan_parts, given=given)
wide(
    "WanVACEPipeline",
    parts=partial(wan_parts, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=8 + 64),
    given=lambda: {**given(), "mask": [pil(32, 1).convert("L")] * FRAMES},
)
wide(
    "WanAnimatePipeline",
    parts=lambda: {
        **wan_parts(
            "WanAnimateTransformer3DModel",
            12,
            latent_channels=4,
            **SEEING,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )
    },
    stubs=SEEN,
    given=lambda: {
        **seeing(),
        "pose_video": frames(32, 9),
        "face_video": frames(32, 9),
        "segment_frame_length": 5,
        "prev_segment_conditioning_frames": 1,
    },
)
wide(
    "SkyReelsV2ImageToVideoPipeline",
    parts=partial(wan_parts, "SkyReelsV2Transformer3DModel", 12, **SEEING),
    given=seeing,
    stubs=SEEN,
)
wide(
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    parts=lambda: {
        **wan_parts("SkyReelsV2Transformer3DModel"),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    },
    given=lambda: {**given(), "prompt": None, "base_num_frames": 5, "overlap_history": 1},
)
wide(
    "ChronoEditPipeline",
    parts=partial(wan_parts, "ChronoEditTransformer3DModel", 12, **SEEING),
    given=seeing,
    stubs=SEEN,
)
wide("LucyEditPipeline", parts=partial(wan_parts, in_channels=8), given=given)
wide(
    "AnyFlowPipeline",
    parts=lambda: {
        **wan_parts("AnyFlowTransformer3DModel"),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler()
        if hasattr(diffusers, "FlowMapEulerDiscreteScheduler")
        else FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {**given(), "video": None},
)
wide(
    "AnyFlowFARPipeline",
    parts=lambda: {
        **wan_parts("AnyFlowFARTransformer3DModel", chunk_partition=(1, 1), full_chunk_limit=2),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler()
        if hasattr(diffusers, "FlowMapEulerDiscreteScheduler")
        else FlowMatchEulerDiscreteScheduler(),
    },
    given=lambda: {**given(), "video": None, "chunk_partition": [1, 1]},
)


def cosmos_parts(**config: Any) -> dict[str, Any]:
    transformer = make(
        "CosmosTransformer3DModel",
        **{
            "in_channels": 5,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
            "encoder_hidden_states_channels": 8,
            "crossattn_proj_in_channels": 8,
            **config,
        },
    )
    parts = {
        "transformer": transformer,
        "vae": wan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    }
    return {**parts, "safety_checker": _Harmless()}


class _Harmless(torch.nn.Module):
    """A safety checker that finds nothing."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, *_: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


wide("Cosmos2TextToImagePipeline", parts=partial(cosmos_parts, in_channels=4), given=given)
wide("Cosmos2VideoToWorldPipeline", parts=cosmos_parts, given=lambda: {**given(), "video": None})
wide(
    "Cosmos2_5_PredictBasePipeline",
    parts=lambda: {**cosmos_parts(), "scheduler": flow_unipc()},
    given=lambda: {**given(), "video": None, "image": None},
)


def cosmos1_parts(**config: Any) -> dict[str, Any]:
    autoencoder = make(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
    )
    return {**cosmos_parts(**config), "vae": autoencoder, "scheduler": diffusers.EDMEulerScheduler()}


wide("CosmosTextToWorldPipeline", parts=partial(cosmos1_parts, in_channels=4), given=given)
wide(
    "CosmosVideoToWorldPipeline",
    parts=cosmos1_parts,
    given=lambda: {**given(), "video": None},
)


def cog_parts(**config: Any) -> dict[str, Any]:
    transformer = make(
        "CogVideoXTransformer3DModel",
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 5,
            **config,
        },
    )
    autoencoder = make(
        "AutoencoderKLCogVideoX",
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return {"transformer": transformer, "vae": autoencoder, "scheduler": diffusers.CogVideoXDDIMScheduler()}


def cog_given() -> dict[str, Any]:
    return {**given(), "max_sequence_length": 5}


wide("CogVideoXVideoToVideoPipeline", parts=cog_parts, given=cog_given)
wide(
    "CogVideoXFunControlPipeline",
    "CogVideoXImageToVideoPipeline",
    parts=partial(cog_parts, in_channels=8),
    given=cog_given,
)


wide(
    "AllegroPipeline",
    parts=lambda: {
        "transformer": make(
            "AllegroTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=24,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
            caption_channels=8,
        ),
        "scheduler": ddim(),
    },
    given=lambda: {**given(), "num_frames": 8},
)
wide(
    "LattePipeline",
    parts=lambda: {
        "transformer": make(
            "LatteTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=8,
            video_length=2,
            norm_type="ada_norm_single",
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_elementwise_affine=False,
        ),
        "vae": vae(),
        "scheduler": ddim(),
    },
    given=lambda: {**given(PIXELS), "video_length": 2},
)
