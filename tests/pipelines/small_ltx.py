"""Pipelines of LTX, LTX-2, HunyuanVideo and Kandinsky 5 beside text to video, from small random components."""

from functools import partial
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tests.pipelines.small import SMALL, Absent, make, noise, ones, picture, pil, wide
from tests.pipelines.small_unet import vae
from tests.pipelines.small_videos import given


def parts_of(name: str, **more: Any) -> dict[str, Any]:
    """The components of a pipeline that is built elsewhere."""
    pipe, _ = SMALL[name].build()
    return {**pipe.components, **more}


def call_of(name: str) -> dict[str, Any]:
    return SMALL[name].build()[1]


def ltx_vae() -> Any:
    return make(
        "AutoencoderKLLTXVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


ltx = partial(
    wide,
    parts=lambda: parts_of("LTXPipeline", vae=ltx_vae()),
    given=lambda: {**given(), **call_of("LTXPipeline"), "image": pil(64), "video": None},
)
ltx("LTXImageToVideoPipeline")
ltx("LTXConditionPipeline")
ltx(
    "LTXI2VLongMultiPromptPipeline",
    num_frames=17,
    temporal_tile_size=16,
    temporal_overlap=8,
    guidance_scale=3.0,
    prompt="",
    stubs={"encode_prompt": (noise(1, 5, 8), ones(1, 5), noise(1, 5, 8, seed=1), ones(1, 5))},
)
ltx2 = partial(
    wide,
    parts=lambda: parts_of("LTX2Pipeline"),
    given=lambda: {**given(), **call_of("LTX2Pipeline"), "image": picture(32), "video": None, "negative_prompt": None},
)
ltx2("LTX2ImageToVideoPipeline", image=pil(32), image_crf=0)
ltx2("LTX2ConditionPipeline", "LTX2InContextPipeline")
ltx2("LTX2HDRPipeline", spatio_temporal_guidance_blocks=None, guidance_scale=1.0)


def seeing() -> Any:
    """A denoiser that gets a picture and which frames it is of beside the noise."""
    config = SMALL["Kandinsky5T2IPipeline"].build()[0].transformer.config
    return make("Kandinsky5Transformer3DModel", **{**config, "visual_cond": True})


def eightfold_vae() -> Any:
    downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return vae(block_out_channels=(4,) * 4, down_block_types=downs, up_block_types=ups)


def hunyuan_vae() -> Any:
    return make(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}


def hunyuan_parts(kind: str = "HunyuanVideoTransformer3DModel", **config: Any) -> dict[str, Any]:
    return {
        "transformer": make(kind, **{**HUNYUAN, **config}),
        "vae": hunyuan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": Absent(),
    }


wide(
    "HunyuanVideoImageToVideoPipeline",
    parts=partial(hunyuan_parts, image_condition_type="latent_concat", in_channels=9),
    given=lambda: {**given(), "true_cfg_scale": 2.0, "image": picture(32)},
)
wide(
    "HunyuanSkyreelsImageToVideoPipeline",
    parts=partial(hunyuan_parts, in_channels=8),
    given=lambda: {**given(), "true_cfg_scale": 2.0, "image": picture(32)},
)
wide(
    "HunyuanVideoFramepackPipeline",
    parts=partial(
        hunyuan_parts,
        "HunyuanVideoFramepackTransformer3DModel",
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
        guidance_embeds=True,
    ),
    given=lambda: {
        **given(),
        "true_cfg_scale": 1.0,
        "image": picture(32),
        "image_embeds": noise(1, 3, 8),
        "latent_window_size": 3,
        "num_frames": 9,
    },
    stubs={"encode_image": noise(1, 3, 8)},
)


def small_target(pipe: Any) -> None:
    """The area that pictures are brought to."""
    pipe.target_size = 64
    pipe.vision_num_semantic_tokens = 3


wide(
    "HunyuanVideo15ImageToVideoPipeline",
    parts=lambda: parts_of("HunyuanVideo15Pipeline"),
    given=lambda: {**given(), **call_of("HunyuanVideo15Pipeline"), "image": pil(64)},
    ready=small_target,
    stubs={"encode_image": noise(1, 3, 8)},
)
wide(
    "Kandinsky5I2IPipeline",
    parts=lambda: parts_of("Kandinsky5T2IPipeline", vae=eightfold_vae(), transformer=seeing()),
    given=lambda: {**given(), **call_of("Kandinsky5T2IPipeline"), "image": pil(32)},
    ready=lambda pipe: setattr(pipe, "resolutions", [(32, 32)]),
)
