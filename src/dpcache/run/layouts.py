"""The one table that knows model classes: where their blocks are, and in which order a block returns its streams."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where a denoiser's transformer blocks are and what they return.

    Attributes:
        stacks: attribute of the denoiser that holds blocks (dots lead into submodules) -> names of the block's
            arguments that its results replace, in the order it returns them; one name means a bare result. Stacks in
            the order they run. A stack may be missing or empty in a model.
        head: the streams that what follows the last block reads: the value at the boundary "blocks".
        feeders: attributes of the denoiser that hold what feeds the blocks alone, like the patch embedding and the
            rotary tables: where no block runs, nothing reads what they return. May be missing in a model.
        fits: whether a model with this configuration is as described; not so where something that comes from skipped
            parts is added after the last block.
    """

    stacks: Mapping[str, tuple[str, ...]]
    head: tuple[str, ...] = ("hidden_states",)
    feeders: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda config: True


_HIDDEN = ("hidden_states",)
_HIDDEN_ENCODER = ("hidden_states", "encoder_hidden_states")
_ENCODER_HIDDEN = ("encoder_hidden_states", "hidden_states")

#: Denoiser class name -> its layout. Blocks that only refine the text or the noise for the main ones run before them
#: and are skipped with them: at a skipped step nothing reads what they would return.
BLOCK_STACKS: dict[str, Layout] = {
    "AllegroTransformer3DModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("pos_embed", "caption_projection")),
    "AnyFlowTransformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
    "AuraFlowTransformer2DModel": Layout(
        {"joint_transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=("pos_embed", "context_embedder"),
    ),
    "BriaTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _ENCODER_HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "BriaFiboTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "ChromaTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "ChronoEditTransformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
    "CogVideoXTransformer3DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("patch_embed",)),
    "CogView3PlusTransformer2DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("patch_embed",)),
    "CogView4Transformer2DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("rope", "patch_embed")),
    "CosmosTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("rope", "learnable_pos_embed", "patch_embed", "crossattn_proj")
    ),
    "DiTTransformer2DModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("pos_embed",)),
    "EasyAnimateTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN_ENCODER}, feeders=("proj", "text_proj", "text_proj_t5")
    ),
    "ErnieImageTransformer2DModel": Layout(
        {"layers": ("x",)}, head=("x",), feeders=("x_embedder", "text_proj", "pos_embed")
    ),
    "Flux2Transformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=(
            "x_embedder",
            "context_embedder",
            "pos_embed",
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        ),
    ),
    "FluxTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _ENCODER_HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "GlmImageTransformer2DModel": Layout(
        {"transformer_blocks": _HIDDEN_ENCODER},
        feeders=("rope", "image_projector", "glyph_projector", "prior_projector"),
    ),
    "HeliosTransformer3DModel": Layout(
        {"blocks": _HIDDEN}, feeders=("patch_embedding", "patch_short", "patch_mid", "patch_long", "rope")
    ),
    "HiDreamImageTransformer2DModel": Layout(
        {"double_stream_blocks": _HIDDEN_ENCODER, "single_stream_blocks": _HIDDEN},
        feeders=("x_embedder", "pe_embedder"),
    ),
    "HunyuanDiT2DModel": Layout({"blocks": _HIDDEN}, feeders=("pos_embed", "text_embedder")),
    "HunyuanImageTransformer2DModel": Layout(
        {
            "context_embedder.token_refiner.refiner_blocks": _HIDDEN,
            "transformer_blocks": _HIDDEN_ENCODER,
            "single_transformer_blocks": _HIDDEN_ENCODER,
        },
        feeders=("x_embedder", "context_embedder", "context_embedder_2", "rope"),
    ),
    "HunyuanVideo15Transformer3DModel": Layout(
        {"context_embedder.token_refiner.refiner_blocks": _HIDDEN, "transformer_blocks": _HIDDEN_ENCODER},
        feeders=("x_embedder", "image_embedder", "context_embedder", "context_embedder_2", "cond_type_embed", "rope"),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Layout(
        {
            "context_embedder.token_refiner.refiner_blocks": _HIDDEN,
            "transformer_blocks": _HIDDEN_ENCODER,
            "single_transformer_blocks": _HIDDEN_ENCODER,
        },
        feeders=("x_embedder", "clean_x_embedder", "context_embedder", "image_projection", "rope"),
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        {
            "context_embedder.token_refiner.refiner_blocks": _HIDDEN,
            "transformer_blocks": _HIDDEN_ENCODER,
            "single_transformer_blocks": _HIDDEN_ENCODER,
        },
        feeders=("x_embedder", "context_embedder", "rope"),
    ),
    "Ideogram4Transformer2DModel": Layout(
        {"layers": _HIDDEN}, feeders=("input_proj", "llm_cond_norm", "llm_cond_proj", "rotary_emb")
    ),
    "JoyImageEditTransformer3DModel": Layout({"double_blocks": _HIDDEN_ENCODER}, feeders=("img_in",)),
    "Kandinsky5Transformer3DModel": Layout(
        {"text_transformer_blocks": ("x",), "visual_transformer_blocks": ("visual_embed",)},
        head=("visual_embed",),
        feeders=("text_embeddings", "visual_embeddings", "text_rope_embeddings", "visual_rope_embeddings"),
    ),
    "Krea2Transformer2DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("img_in", "text_fusion", "txt_in", "rotary_emb", "time_mod_proj")
    ),
    "LTX2VideoTransformer3DModel": Layout(
        {"transformer_blocks": ("hidden_states", "audio_hidden_states")},
        head=("hidden_states", "audio_hidden_states"),
        feeders=(
            "proj_in",
            "audio_proj_in",
            "caption_projection",
            "audio_caption_projection",
            "av_cross_attn_video_scale_shift",
            "av_cross_attn_audio_scale_shift",
            "av_cross_attn_video_a2v_gate",
            "av_cross_attn_audio_v2a_gate",
            "rope",
            "audio_rope",
            "cross_attn_rope",
            "cross_attn_audio_rope",
        ),
    ),
    "LTXVideoTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("proj_in", "caption_projection", "rope")
    ),
    "LatteTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN, "temporal_transformer_blocks": _HIDDEN},
        feeders=("pos_embed", "caption_projection"),
    ),
    "LongCatImageTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _ENCODER_HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "Lumina2Transformer2DModel": Layout(
        {"context_refiner": _HIDDEN, "noise_refiner": _HIDDEN, "layers": _HIDDEN},
        feeders=("rope_embedder", "x_embedder"),
    ),
    "LuminaNextDiT2DModel": Layout({"layers": _HIDDEN}),
    "MochiTransformer3DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("patch_embed", "rope")),
    "MotifVideoTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN_ENCODER, "single_transformer_blocks": _HIDDEN_ENCODER},
        feeders=("x_embedder", "context_embedder", "image_embedder", "rope"),
    ),
    "NucleusMoEImageTransformer2DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("img_in", "txt_norm", "txt_in", "pos_embed")
    ),
    "OvisImageTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _ENCODER_HIDDEN},
        feeders=("x_embedder", "context_embedder_norm", "context_embedder", "pos_embed"),
    ),
    "PRXTransformer2DModel": Layout({"blocks": _HIDDEN}, feeders=("img_in", "txt_in", "pe_embedder")),
    "PixArtTransformer2DModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("pos_embed", "caption_projection")),
    "PriorTransformer": Layout({"transformer_blocks": _HIDDEN}),
    "QwenImageTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN}, feeders=("img_in", "txt_norm", "txt_in", "pos_embed")
    ),
    "SD3Transformer2DModel": Layout({"transformer_blocks": _ENCODER_HIDDEN}, feeders=("pos_embed", "context_embedder")),
    "SanaTransformer2DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("patch_embed", "caption_projection", "caption_norm")
    ),
    "SanaVideoTransformer3DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("patch_embedding", "rope", "caption_projection", "caption_norm")
    ),
    "SkyReelsV2Transformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
    "StableAudioDiTModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("cross_attention_proj", "proj_in")),
    "WanAnimateTransformer3DModel": Layout(
        {"face_adapter": _HIDDEN, "blocks": _HIDDEN},
        feeders=("rope", "patch_embedding", "pose_patch_embedding", "motion_encoder", "face_encoder"),
        fits=lambda config: (config.num_layers - 1) % config.inject_face_latents_blocks != 0,
    ),
    "WanTransformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
    # A hint is added after a block; the block that makes it returns the hint first, which is no argument of its own.
    "WanVACETransformer3DModel": Layout(
        {"vace_blocks": ("control_hidden_states", "control_hidden_states"), "blocks": _HIDDEN},
        feeders=("rope", "patch_embedding", "vace_patch_embedding"),
        fits=lambda config: config.num_layers - 1 not in config.vace_layers,
    ),
    "ZImageTransformer2DModel": Layout(
        {"noise_refiner": ("x",), "context_refiner": ("x",), "siglip_refiner": ("x",), "layers": ("x",)}, head=("x",)
    ),
}


def register_denoiser(
    denoiser: type[nn.Module] | str,
    stacks: Mapping[str, str | Sequence[str]],
    *,
    head: str | Sequence[str] = "hidden_states",
) -> None:
    """Describes the transformer blocks of a class, so that boundary="blocks" can be used with it.

    Classes known already are described anew. Subclasses are classes of their own: their `forward` may differ.

    Args:
        denoiser: the class, or its name.
        stacks: attribute of the denoiser that holds blocks -> name of the block's argument that its result replaces,
            or names in the order it returns them. Stacks in the order they run. A block that does not run returns
            these arguments as it got them.
        head: name or names of the streams that the denoiser reads from the last block's results.

    Raises:
        ValueError: no stacks, or the last one does not return the head's streams.

    Example:
        Blocks which take `hidden_states` and `context` by these names and return the pair `(context, hidden_states)`,
        then blocks which take and return `hidden_states` alone:

        ```python
        class MyTransformer(ModelMixin, ConfigMixin):
            def forward(self, hidden_states, context, timestep):
                for block in self.double_blocks:
                    context, hidden_states = block(hidden_states, context, temb=emb)
                hidden_states = torch.cat([context, hidden_states], dim=1)
                for block in self.single_blocks:
                    hidden_states = block(hidden_states, temb=emb)
                ...


        dpcache.register_denoiser(
            MyTransformer,
            {"double_blocks": ("context", "hidden_states"), "single_blocks": "hidden_states"},
        )
        calibration = dpcache.calibrate(pipe, prompts, boundary="blocks")
        ```
    """
    layout = Layout({name: _names(returns) for name, returns in stacks.items()}, _names(head))
    *_, last = layout.stacks.values() or [()]
    if not layout.head or not set(layout.head) <= set(last):
        raise ValueError(
            f"the head reads {layout.head}, but the last blocks return {last}: name the streams in `head` as the last "
            "stack in `stacks` names them."
        )
    BLOCK_STACKS[denoiser if isinstance(denoiser, str) else denoiser.__name__] = layout


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
