"""Every supported pipeline class, built from small random components: the image ones here, the others beside.

Text encoders are left out and their results passed in: a pipeline's own `__call__` runs from there, to its latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

STEPS = 8


@dataclass(frozen=True)
class Small:
    """How to build and call one pipeline.

    Attributes:
        name: shown in tests and in docs/models.md.
        build: makes the pipeline and the arguments of its call.
        branches: denoiser calls in a step.
        heads: layers of the denoiser whose inputs are the streams predicted at the boundary "blocks"; none, where only
            the boundary "output" is supported.
        keys: key steps for which every other step is predicted.
        order: of the prediction.
        switch: the step from which the second denoiser is called.
        bfloat16: whether the pipeline runs in it on a CPU.
        note: for docs/models.md.
    """

    name: str
    build: Callable[[], tuple[Any, dict[str, Any]]]
    branches: int = 1
    heads: tuple[str, ...] = ("norm_out",)
    keys: tuple[int, ...] = (0, 1, 2, 5)
    order: int = 2
    switch: int = STEPS
    bfloat16: bool = True
    note: str = ""

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Where it can be cached."""
        return ("blocks", "output") if self.heads else ("output",)


#: By name.
SMALL: dict[str, Small] = {}


def small(name: str = "", **facts: Any) -> Callable[[Any], Any]:
    """Enters a function that builds a pipeline in the list; it has the pipeline's class name unless given another."""

    def enter(build: Callable[[], tuple[Any, dict[str, Any]]]) -> Any:
        entry = Small(name or build.__name__, build, **facts)
        SMALL[entry.name] = entry
        return build

    return enter


def make(kind: str, **config: Any) -> Any:
    """A diffusers model whose random weights make it answer clearly to the step.

    Models start with some layers zero and others tiny, so that a new one hardly depends on its inputs.
    """
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return model.eval()


def assemble(kind: str, denoiser: Any, scheduler: Any = None, **components: Any) -> Any:
    """The pipeline with these components, and None for those not given."""
    pipe_class = getattr(diffusers, kind)
    expected, _ = pipe_class._get_signature_keys(pipe_class)
    denoisers = {"transformer" if "transformer" in expected else "unet": denoiser}
    schedulers = {"scheduler": scheduler or FlowMatchEulerDiscreteScheduler()}
    pipe = pipe_class(**{**dict.fromkeys(expected), **denoisers, **schedulers, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another dtype, also in lists; other arguments of a pipeline's call as they are."""
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def tiny_vae() -> nn.Module:
    return make("AutoencoderKL", block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


def size(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


@small()
def DiTPipeline() -> tuple[Any, dict[str, Any]]:
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


def pixart(kind: str) -> tuple[Any, dict[str, Any]]:
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
def PixArtAlphaPipeline() -> tuple[Any, dict[str, Any]]:
    return pixart("PixArtAlphaPipeline")


@small()
def PixArtSigmaPipeline() -> tuple[Any, dict[str, Any]]:
    return pixart("PixArtSigmaPipeline")


@small(branches=2)
def FluxPipeline() -> tuple[Any, dict[str, Any]]:
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
def Flux2Pipeline() -> tuple[Any, dict[str, Any]]:
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
def ChromaPipeline() -> tuple[Any, dict[str, Any]]:
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
def StableDiffusion3Pipeline() -> tuple[Any, dict[str, Any]]:
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
def QwenImagePipeline() -> tuple[Any, dict[str, Any]]:
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
def ZImagePipeline() -> tuple[Any, dict[str, Any]]:
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
def Lumina2Pipeline() -> tuple[Any, dict[str, Any]]:
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
def SanaPipeline() -> tuple[Any, dict[str, Any]]:
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
def HiDreamImagePipeline() -> tuple[Any, dict[str, Any]]:
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
def AuraFlowPipeline() -> tuple[Any, dict[str, Any]]:
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
def CogView4Pipeline() -> tuple[Any, dict[str, Any]]:
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
