"""Real pipelines around denoisers with random weights, at published and at small sizes. Nothing is downloaded."""

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A denoiser's configuration, what it is called for, and how to say so.

    Attributes:
        told: for people.
        config: of the denoiser's class; what is left out is as published.
        text: length of the text, and width of its embedding and of the pooled one.
        shape: height and width in pixels, and frames for video.
    """

    told: str
    config: dict[str, Any] = field(default_factory=dict)
    text: tuple[int, int, int] = (0, 0, 0)
    shape: tuple[int, ...] = ()


FLUX = {
    "published": Size("FLUX.1-dev, 1024 x 1024", {"guidance_embeds": True}, (512, 4096, 768), (1024, 1024)),
    "cpu": Size(
        "FluxTransformer2DModel with the 19 + 38 blocks of FLUX.1-dev, 256 wide (4 heads of 64) instead of 3072, "
        "256 x 256 pixels, 64 text tokens",
        {"guidance_embeds": True, "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
        | {"joint_attention_dim": 1024},
        (64, 1024, 768),
        (256, 256),
    ),
    "toy": Size(
        "FluxTransformer2DModel, 2 + 2 blocks, 32 wide",
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        (5, 8, 8),
        (64, 64),
    ),
}
HUNYUAN_SHAPES = ((720, 1280, 129), (544, 960, 129), (544, 960, 65), (320, 512, 61), (256, 256, 33))
"""Height, width and frames to try, the largest first."""
HUNYUAN = {
    "published": Size("HunyuanVideo", {}, (256, 4096, 768), HUNYUAN_SHAPES[0]),
    "toy": Size(
        "HunyuanVideoTransformer3DModel, 2 + 2 blocks, 16 wide",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2}
        | {"num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4)},
        (5, 8, 8),
        (64, 64, 5),
    ),
}
DIT = {
    "published": Size(
        "DiT-XL/2, 256 x 256, guided",
        {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32, "out_channels": 8},
    ),
    "toy": Size(
        "DiTTransformer2DModel, 2 blocks, 16 wide",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "out_channels": 8},
    ),
}


def denoiser(kind: str, config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """With weights drawn where they will be: billions of them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = getattr(diffusers, kind)(**config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def assembled(kind: str, scheduler: Any, transformer: Any, **components: Any) -> Any:
    pipe_class = getattr(diffusers, kind)
    expected, _ = pipe_class._get_signature_keys(pipe_class)
    given = {"scheduler": scheduler, "transformer": transformer, **components}
    pipe = pipe_class(**{**dict.fromkeys(expected), **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, Arguments]:
    model = denoiser("FluxTransformer2DModel", size.config, device, dtype)
    pipe = assembled("FluxPipeline", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), model)
    length, width, pooled = size.text
    return pipe, {
        "prompt_embeds": torch.randn(1, length, width, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, pooled, device=device, dtype=dtype),
        "height": size.shape[0],
        "width": size.shape[1],
        "output_type": "latent",
    }


def hunyuan_video(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, Arguments]:
    model = denoiser("HunyuanVideoTransformer3DModel", size.config, device, dtype)
    pipe = assembled("HunyuanVideoPipeline", diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), model)
    length, width, pooled = size.text
    return pipe, {
        "prompt_embeds": torch.randn(1, length, width, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, pooled, device=device, dtype=dtype),
        "prompt_attention_mask": torch.ones(1, length, device=device, dtype=torch.long),
        "height": size.shape[0],
        "width": size.shape[1],
        "num_frames": size.shape[2],
        "output_type": "latent",
    }


def dit(size: Size, device: str, dtype: torch.dtype) -> tuple[Any, Arguments]:
    """Its pipeline always decodes: a decoder of next to nothing."""
    model = denoiser("DiTTransformer2DModel", size.config, device, dtype)
    with torch.device(device):
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).to(dtype)
    pipe = assembled("DiTPipeline", diffusers.DDIMScheduler(clip_sample=False), model, vae=vae)
    return pipe, {"class_labels": [1], "guidance_scale": 4.0}
