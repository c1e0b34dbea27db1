"""Newer pipelines with denoisers of their own, from small random components."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance

from tests.pipelines.small import Absent, make, noise, ones, picture, pil, size, wide
from tests.pipelines.small_flux import packed_parts, qwen_vae
from tests.pipelines.small_pictures import given as for_pictures
from tests.pipelines.small_videos import given, wan_vae


def flow_parts(transformer: Any, **more: Any) -> dict[str, Any]:
    return {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(), **more}


def bool_masks() -> dict[str, Any]:
    return {f"{which}prompt_attention_mask": ones(1, 5).bool() for which in ("", "negative_")}


def easy_parts(**config: Any) -> dict[str, Any]:
    transformer = make(
        "EasyAnimateTransformer3DModel",
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 4,
            "sample_height": 4,
            "num_layers": 2,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            **config,
        },
    )
    autoencoder = make(
        "AutoencoderKLMagvit",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    return flow_parts(transformer, vae=autoencoder)


wide("EasyAnimatePipeline", parts=easy_parts, given=given)
wide(
    "EasyAnimateInpaintPipeline",
    ready=lambda pipe: pipe.vae.register_to_config(cache_mag_vae=False),
    parts=partial(easy_parts, in_channels=9),
    given=lambda: {
        **given(),
        "video": torch.stack([picture(32)] * 5, dim=2),
        "mask_video": torch.ones(1, 1, 5, 32, 32),
        "strength": 1.0,
    },
)


def helios_parts() -> dict[str, Any]:
    transformer = make(
        "HeliosTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
    )
    return {
        "transformer": transformer,
        "vae": wan_vae(),
        "scheduler": diffusers.HeliosScheduler(stages=1, stage_range=[0, 1]),
    }


wide(
    "HeliosPipeline",
    parts=helios_parts,
    given=lambda: {**given(), **size(32), "num_frames": 33, "image": None, "video": None},
)
wide(
    "HeliosPyramidPipeline",
    parts=lambda: {**helios_parts(), "scheduler": diffusers.HeliosScheduler(stages=3, gamma=0.3)},
    given=lambda: {
        **given(),
        **size(64),
        "num_frames": 33,
        "image": None,
        "video": None,
        "pyramid_num_inference_steps_list": [4, 4, 4],
    },
)
wide(
    "MotifVideoPipeline",
    "MotifVideoImage2VideoPipeline",
    parts=lambda: flow_parts(
        make(
            "MotifVideoTransformer3DModel",
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=8,
            rope_axes_dim=(2, 2, 4),
        ),
        vae=wan_vae(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    ),
    given=lambda: {**given(), **bool_masks(), "prompt": None},
)


def sana_video_parts(**config: Any) -> dict[str, Any]:
    transformer = make(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return flow_parts(transformer, vae=wan_vae())


wide(
    "SanaVideoPipeline",
    "SanaImageToVideoPipeline",
    parts=sana_video_parts,
    given=lambda: {**given(), "frames": 5, "use_resolution_binning": False},
)


def small_bucket(pipe: Any) -> None:
    """The size that pictures are brought to."""
    pipe.vae_image_processor.get_default_height_width = lambda *_: (32, 32)


wide(
    "JoyImageEditPipeline",
    parts=lambda: flow_parts(
        make(
            "JoyImageEditTransformer3DModel",
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=8,
            num_layers=2,
            rope_dim_list=[4, 4, 8],
        ),
        vae=wan_vae(),
        text_encoder=Absent(),
    ),
    given=lambda: {**for_pictures(), **size(32), "image": pil(32)},
    ready=small_bucket,
)
wide(
    "HunyuanImageRefinerPipeline",
    # Its autoencoder packs two frames into the channels of one.
    ready=lambda pipe: setattr(pipe, "latent_channels", 8),
    parts=lambda: flow_parts(
        make(
            "HunyuanImageTransformer2DModel",
            in_channels=16,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1, 1),
            text_embed_dim=8,
            rope_axes_dim=(2, 2, 4),
        ),
        vae=make(
            "AutoencoderKLHunyuanImageRefiner",
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32, 32),
            layers_per_block=1,
        ),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    ),
    given=lambda: {**for_pictures(), **size(64), "image": pil(64)},
)
wide(
    "NucleusMoEImagePipeline",
    parts=lambda: flow_parts(
        make(
            "NucleusMoEImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
            num_experts=2,
            moe_intermediate_dim=8,
            dense_moe_strategy="leave_first_three_and_last_block_dense",
            capacity_factors=[1.0] * 4,
        ),
        vae=qwen_vae(),
    ),
    given=for_pictures,
)
wide(
    "BriaFiboPipeline",
    parts=lambda: {
        **packed_parts("BriaFiboTransformer2DModel", in_channels=4, text_encoder_dim=4, joint_attention_dim=8),
        "vae": wan_vae(),
        "text_encoder": Absent(),
    },
    given=lambda: {**for_pictures(), **size(64), "prompt": ""},
    stubs={
        "encode_prompt": (
            noise(1, 5, 8),
            noise(1, 5, 8, seed=1),
            torch.zeros(5, 3),
            ones(1, 5),
            ones(1, 5),
            [noise(1, 5, 4)] * 4,
            [noise(1, 5, 4, seed=1)] * 4,
        )
    },
)


def k6_parts() -> dict[str, Any]:
    transformer = make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    return flow_parts(transformer)


wide("Kandinsky6TI2VAPipeline", parts=k6_parts, given=lambda: {**given(), "image": None, "sample_audio": False})
