"""Pipelines that make videos with UNets, from small random components."""

from functools import partial
from typing import Any, ClassVar

import diffusers

from tests.pipelines.small import make, noise, picture, wide
from tests.pipelines.small_unet import CHANNELS, PIXELS, XL, controlnet, ddim, unet_config, vae
from tests.pipelines.small_videos import frames, given


class _Cropping:
    """Stands for the feature extractor of an image encoder, of which only the size is asked."""

    crop_size: ClassVar = {"height": PIXELS, "width": PIXELS}


def motion_parts(control: str = "", xl: bool = False, **config: Any) -> dict[str, Any]:
    more = XL if xl else {}
    network = unet_config(**{**more, **config})
    network["num_attention_heads"] = network.pop("attention_head_dim")
    unet = make(
        "UNetMotionModel",
        **{
            **network,
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
            "sample_size": 8,
            "motion_num_attention_heads": 2,
        },
    )
    adapter = make(
        "MotionAdapter",
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    parts = {"unet": unet, "motion_adapter": adapter, "vae": vae(), "scheduler": ddim()}
    if control == "SparseControlNetModel":
        shape = unet_config(down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"))
        parts["controlnet"] = make(
            control,
            conditioning_channels=3,
            motion_num_attention_heads=2,
            use_simplified_condition_embedding=False,
            conditioning_embedding_out_channels=(4, 4),
            **shape,
        )
    elif control:
        parts["controlnet"] = controlnet(control)
    return parts


def motion_given() -> dict[str, Any]:
    return {**given(PIXELS), "image": picture(PIXELS)}


motion = partial(wide, parts=motion_parts, given=motion_given)
motion("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "AnimateDiffPAGPipeline", "PIAPipeline")
motion("PIAPipeline", config={"in_channels": 9})
motion("AnimateDiffSDXLPipeline", config={"xl": True})
motion(
    "AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoControlNetPipeline", config={"control": "ControlNetModel"}
)
motion(
    "AnimateDiffSparseControlNetPipeline",
    config={"control": "SparseControlNetModel"},
    conditioning_frames=frames(PIXELS, 1),
)


def frames_unet(kind: str = "UNet3DConditionModel", **config: Any) -> dict[str, Any]:
    network = make(
        kind,
        **{
            **unet_config(),
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "sample_size": 8,
            "attention_head_dim": 4,
            **config,
        },
    )
    return {"unet": network, "vae": vae(), "scheduler": ddim()}


wide("TextToVideoSDPipeline", "VideoToVideoSDPipeline", parts=frames_unet, given=motion_given)
wide(
    "I2VGenXLPipeline",
    parts=lambda: {**frames_unet("I2VGenXLUNet"), "feature_extractor": _Cropping()},
    given=lambda: {**given(PIXELS), "target_fps": 4},
    stubs={"_encode_image": noise(2, 1, 8)},
)
wide(
    "StableVideoDiffusionPipeline",
    parts=lambda: {
        "unet": make(
            "UNetSpatioTemporalConditionModel",
            sample_size=8,
            in_channels=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            num_attention_heads=(2, 2),
            cross_attention_dim=8,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        "vae": make(
            "AutoencoderKLTemporalDecoder",
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    },
    given=lambda: {**given(PIXELS), "image": picture(PIXELS)},
    stubs={"_encode_image": noise(2, 1, 8)},
)
