"""Image pipelines with transformers, from small random components; see small.py."""

import diffusers
from torch import nn

from tests.pipelines.small import Built, assemble, make, noise, ones, size, small


def tiny_vae() -> nn.Module:
    return make("AutoencoderKL", block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


@small()
def DiTPipeline() -> Built:
    transformer = make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        out_channels=8,
    )
    pipe = assemble("DiTPipeline", transformer, diffusers.DDIMScheduler(clip_sample=False), vae=tiny_vae())
    pipe.labels = {"thing": 1}
    return pipe, {"class_labels": [1], "output_type": "np"}


def pixart(kind: str) -> Built:
    transformer = make(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return assemble(kind, transformer, diffusers.DPMSolverMultistepScheduler()), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_attention_mask": ones(1, 5),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": ones(1, 5),
        "use_resolution_binning": False,
        **size(32),
    }


@small()
def PixArtAlphaPipeline() -> Built:
    return pixart("PixArtAlphaPipeline")


@small()
def PixArtSigmaPipeline() -> Built:
    return pixart("PixArtSigmaPipeline")


@small(branches=2)
def FluxPipeline() -> Built:
    transformer = make(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return assemble("FluxPipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "pooled_prompt_embeds": noise(1, 8),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=1),
        "true_cfg_scale": 2.0,
        **size(64),
    }


@small()
def Flux2Pipeline() -> Built:
    transformer = make(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return assemble("Flux2Pipeline", transformer), {"prompt_embeds": noise(1, 5, 8), **size(64)}


@small(branches=2)
def ChromaPipeline() -> Built:
    transformer = make(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return assemble("ChromaPipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_attention_mask": ones(1, 5).bool(),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": ones(1, 5).bool(),
        **size(64),
    }


@small()
def StableDiffusion3Pipeline() -> Built:
    transformer = make(
        "SD3Transformer2DModel",
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return assemble("StableDiffusion3Pipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "pooled_prompt_embeds": noise(1, 8),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=1),
        **size(32),
    }


@small(branches=2)
def QwenImagePipeline() -> Built:
    transformer = make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return assemble("QwenImagePipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_embeds_mask": ones(1, 5),
        "negative_prompt_embeds": noise(1, 4, 8, seed=1),
        "negative_prompt_embeds_mask": ones(1, 4),
        "true_cfg_scale": 2.0,
        **size(64),
    }


@small(heads=("all_final_layer.2-1",), note="The denoiser takes and returns lists of images.")
def ZImagePipeline() -> Built:
    transformer = make(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )
    return assemble("ZImagePipeline", transformer), {
        "prompt_embeds": [noise(5, 8)],
        "negative_prompt_embeds": [noise(4, 8, seed=1)],
        **size(64),
    }


@small(branches=2)
def Lumina2Pipeline() -> Built:
    transformer = make(
        "Lumina2Transformer2DModel",
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(16, 16, 16),
        cap_feat_dim=8,
    )
    return assemble("Lumina2Pipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_attention_mask": ones(1, 5),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": ones(1, 5),
        **size(64),
    }


@small()
def SanaPipeline() -> Built:
    transformer = make(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=4,
    )
    return assemble("SanaPipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_attention_mask": ones(1, 5),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": ones(1, 5),
        "negative_prompt": None,
        "use_resolution_binning": False,
        **size(128),
    }


@small(heads=("final_layer",))
def HiDreamImagePipeline() -> Built:
    transformer = make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(4, 4),
        llama_layers=[0, 1, 0, 1],
    )
    pipe = assemble("HiDreamImagePipeline", transformer)
    pipe.default_sample_size = 8  # whatever size is asked for is brought to the area of this
    return pipe, {
        "prompt_embeds_t5": noise(1, 5, 8),
        "prompt_embeds_llama3": noise(2, 1, 5, 8),
        "pooled_prompt_embeds": noise(1, 8),
        "negative_prompt_embeds_t5": noise(1, 5, 8, seed=1),
        "negative_prompt_embeds_llama3": noise(2, 1, 5, 8, seed=1),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=1),
        **size(64),
    }


@small()
def AuraFlowPipeline() -> Built:
    transformer = make(
        "AuraFlowTransformer2DModel",
        sample_size=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return assemble("AuraFlowPipeline", transformer), {
        "prompt_embeds": noise(1, 5, 8),
        "prompt_attention_mask": ones(1, 5),
        "negative_prompt_embeds": noise(1, 5, 8, seed=1),
        "negative_prompt_attention_mask": ones(1, 5),
        **size(32),
    }


@small(branches=2)
def CogView4Pipeline() -> Built:
    transformer = make(
        "CogView4Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=4,
        rope_axes_dim=(4, 4),
    )
    return assemble("CogView4Pipeline", transformer), {
        "prompt_embeds": noise(1, 16, 8),
        "negative_prompt_embeds": noise(1, 16, 8, seed=1),
        **size(32),
    }
