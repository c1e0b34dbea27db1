"""Pipelines whose denoiser is a prior or a decoder, and those that run one after the other; small random components."""

from typing import Any

import diffusers
import pytest
import torch

from tests.pipelines.small import Absent, make, noise, size, texts, wide
from tests.pipelines.small_others import cascade_decoder, cascade_prior, pooled
from tests.pipelines.small_variants import TextEncoder, Tokenizer


def rescaled(model: Any) -> Any:
    """Random weights of the size that those of small.make have."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * values
    return model.eval()


def wuerstchen(part: str) -> Any:
    """A module of diffusers' that has been elsewhere before."""
    return pytest.importorskip(f"diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_{part}")


def wuerstchen_prior() -> dict[str, Any]:
    prior = rescaled(wuerstchen("prior").WuerstchenPrior(c_in=4, c=16, c_cond=8, c_r=8, depth=2, nhead=2, dropout=0.0))
    parts = {"prior": prior, "scheduler": diffusers.DDPMWuerstchenScheduler()}
    return {**parts, "text_encoder": TextEncoder(), "tokenizer": Tokenizer()}


def wuerstchen_decoder() -> dict[str, Any]:
    decoder = rescaled(
        wuerstchen("diffnext").WuerstchenDiffNeXt(
            c_in=4,
            c_out=4,
            c_r=8,
            c_cond=8,
            c_hidden=[8, 8],
            nhead=[-1, 2],
            blocks=[1, 1],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            effnet_embd=4,
            clip_embd=8,
            dropout=0.0,
        )
    )
    parts = {"decoder": decoder, "scheduler": diffusers.DDPMWuerstchenScheduler(), "vqgan": None}
    return {**parts, "text_encoder": TextEncoder(), "tokenizer": Tokenizer(), "latent_dim_scale": 10.67}


def given() -> dict[str, Any]:
    return {**texts(), "guidance_scale": 3.0, **size(128), "image_embeddings": noise(1, 4, 3, 3)}


wide("WuerstchenPriorPipeline", parts=wuerstchen_prior, given=given, output_type="pt")
wide("WuerstchenDecoderPipeline", parts=wuerstchen_decoder, given=given, prompt="")
wide(
    "WuerstchenCombinedPipeline",
    parts=lambda: {
        **wuerstchen_decoder(),
        **{f"prior_{name}": part for name, part in wuerstchen_prior().items()},
    },
    given=lambda: {**given(), "prompt": None, "prior_num_inference_steps": 4, "prior_guidance_scale": 3.0},
)
wide(
    "StableCascadeCombinedPipeline",
    parts=lambda: {
        **cascade_decoder(),
        "vqgan": None,
        "text_encoder": Absent(),
        **{f"prior_{name}": part for name, part in cascade_prior().items()},
    },
    given=lambda: {**pooled(), **size(128), "prior_num_inference_steps": 4},
)


class Renderer(Absent):
    """Stands for what draws the thing that was found."""


wide(
    "ShapEPipeline",
    parts=lambda: {
        "prior": make(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            embedding_dim=8,
            num_embeddings=4,
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            encoder_hid_proj_type=None,
            added_emb_type=None,
            embedding_proj_dim=8,
            time_embed_dim=16,
            clip_embed_dim=16,
        ),
        "scheduler": diffusers.HeunDiscreteScheduler(
            prediction_type="sample", use_karras_sigmas=True, clip_sample=True
        ),
        "shap_e_renderer": Renderer(),
    },
    given=lambda: {"prompt": "", "guidance_scale": 3.0, "num_inference_steps": 6},
    stubs={"_encode_prompt": noise(2, 8)},
)
