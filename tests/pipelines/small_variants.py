"""Pipelines built on Stable Diffusion that take parts of their own, from small random components."""

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from transformers import BatchEncoding

from tests.pipelines.small import Absent, make, noise, wide
from tests.pipelines.small_others import prior_parts
from tests.pipelines.small_unet import (
    ddim,
    pictures,
    sd_given,
    sd_parts,
    unet,
    vae,
    xl_given,
    xl_parts,
)


class Tokenizer:
    """Makes one token of every text."""

    model_max_length = 5

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def __call__(self, texts: Any, **_: Any) -> BatchEncoding:
        number = 1 if isinstance(texts, str) else len(texts)
        ids = torch.ones(number, self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, ids: Any) -> list[str]:
        return [""] * len(ids)


class TextEncoder(Absent):
    """Finds the same random values in every text."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, use_attention_mask=False, projection_dim=width)
        self.width = width

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        states = noise(1, input_ids.shape[1], self.width, seed=9).expand(len(input_ids), -1, -1)
        return _Result(states, states[:, 0])


class _Result(tuple[Any, ...]):
    """By place and by name."""

    __slots__ = ()

    def __new__(cls, states: torch.Tensor, pooled: torch.Tensor) -> "_Result":
        return super().__new__(cls, (states, pooled))

    last_hidden_state = property(lambda self: self[0])
    pooler_output = text_embeds = property(lambda self: self[1])
    hidden_states = property(lambda self: (self[0], self[0], self[0]))


def with_texts(**parts: Any) -> dict[str, Any]:
    return {**parts, "tokenizer": Tokenizer(), "text_encoder": TextEncoder()}


wide(
    "StableDiffusionGLIGENPipeline",
    parts=lambda: with_texts(**sd_parts(attention_type="gated")),
    given=lambda: {**sd_given(), "gligen_phrases": ["a"], "gligen_boxes": [[0.0, 0.0, 0.5, 0.5]]},
)
wide(
    "StableDiffusionPipelineSafe", parts=lambda: with_texts(**sd_parts(), safety_concept=""), given=sd_given, prompt=""
)
wide("SemanticStableDiffusionPipeline", parts=lambda: with_texts(**sd_parts()), given=sd_given, prompt="")
wide(
    "StableDiffusionParadigmsPipeline",
    parts=lambda: sd_parts(scheduler=diffusers.DDIMParallelScheduler),
    given=lambda: {**sd_given(), "parallel": 2},
)
wide("StableDiffusionModelEditingPipeline", parts=lambda: with_texts(**sd_parts()), given=sd_given)
wide(
    "StableDiffusionAttendAndExcitePipeline",
    parts=lambda: with_texts(**sd_parts()),
    given=lambda: {**sd_given(), "prompt": None, "token_indices": [1], "attn_res": (4, 4)},
)
wide(
    "TextToVideoZeroPipeline",
    parts=lambda: with_texts(**sd_parts()),
    given=lambda: {**sd_given(), "prompt": "", "video_length": 2, "t0": 2, "t1": 4},
)
wide(
    "TextToVideoZeroSDXLPipeline",
    parts=lambda: with_texts(**{**xl_parts(), "scheduler": ddim()}),
    given=lambda: {**xl_given(), "prompt": None, "video_length": 2, "t0": 2, "t1": 4},
)
wide(
    "LDMTextToImagePipeline",
    parts=lambda: {
        "bert": TextEncoder(),
        "tokenizer": Tokenizer(),
        "unet": unet(),
        "vqvae": vae(),
        "scheduler": ddim(),
    },
    given=lambda: {**sd_given(), "prompt": "", "output_type": "np"},
)


def unclip_parts() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normalizer = StableUnCLIPImageNormalizer(embedding_dim=8)
    network = unet(class_embed_type="projection", projection_class_embeddings_input_dim=16)
    prior = prior_parts()
    return {
        **sd_parts(),
        "unet": network,
        "prior": prior["prior"],
        "prior_scheduler": prior["scheduler"],
        "prior_tokenizer": Tokenizer(),
        "prior_text_encoder": TextEncoder(),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(),
    }


wide(
    "StableUnCLIPPipeline",
    parts=unclip_parts,
    given=lambda: {**sd_given(), "prompt": None, "prior_num_inference_steps": 3},
    stubs={"_encode_prior_prompt": (noise(2, 8), noise(2, 5, 8), torch.ones(2, 5).bool())},
)


def marigold_parts(targets: int = 1) -> dict[str, Any]:
    return with_texts(
        unet=unet(in_channels=4 + 4 * targets, out_channels=4 * targets),
        vae=vae(),
        scheduler=ddim(),
        prediction_type="intrinsics" if targets > 1 else None,
        default_denoising_steps=6,
        default_processing_resolution=16,
    )


marigold = {
    "given": lambda: {**pictures(), "output_type": "np", "processing_resolution": 16, "match_input_resolution": False}
}
wide("MarigoldDepthPipeline", parts=lambda: {**marigold_parts(), "prediction_type": "depth"}, **marigold)
wide("MarigoldNormalsPipeline", parts=lambda: {**marigold_parts(), "prediction_type": "normals"}, **marigold)
wide(
    "MarigoldIntrinsicsPipeline",
    parts=lambda: {
        **marigold_parts(2),
        "target_properties": {
            "target_names": ["a", "b"],
            "a": {"prediction_space": "linear"},
            "b": {"prediction_space": "linear"},
        },
    },
    **marigold,
)


def amused_parts() -> dict[str, Any]:
    transformer = make(
        "UVit2DModel",
        hidden_size=16,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=33,
        codebook_size=32,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        sample_size=8,
    )
    vqvae = make(
        "VQModel",
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=8,
        num_vq_embeddings=32,
        lookup_from_codebook=True,
    )
    return {"transformer": transformer, "vqvae": vqvae, "scheduler": diffusers.AmusedScheduler(mask_token_id=32)}


wide(
    "AmusedPipeline",
    "AmusedImg2ImgPipeline",
    "AmusedInpaintPipeline",
    parts=amused_parts,
    given=lambda: {
        **sd_given(),
        "prompt_embeds": noise(1, 8),
        "negative_prompt_embeds": noise(1, 8, seed=1),
        "encoder_hidden_states": noise(1, 5, 8),
        "negative_encoder_hidden_states": noise(1, 5, 8, seed=1),
        "output_type": "np",
    },
)
