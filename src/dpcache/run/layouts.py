"""The one table that knows model classes: where their blocks are, and in which order a block returns its streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """

    stacks: Mapping[str, tuple[str, ...]]
    head: tuple[str, ...] = ("hidden_states",)
    feeders: tuple[str, ...] = ()


_HIDDEN = ("hidden_states",)
_HIDDEN_ENCODER = ("hidden_states", "encoder_hidden_states")
_ENCODER_HIDDEN = ("encoder_hidden_states", "hidden_states")

#: Denoiser class name -> its layout. Blocks that only refine the text or the noise for the main ones run before them
#: and are skipped with them: at a skipped step nothing reads what they would return.
BLOCK_STACKS: dict[str, Layout] = {
    "AuraFlowTransformer2DModel": Layout(
        {"joint_transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=("pos_embed", "context_embedder"),
    ),
    "ChromaTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN, "single_transformer_blocks": _HIDDEN},
        feeders=("x_embedder", "context_embedder", "pos_embed"),
    ),
    "CogVideoXTransformer3DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("patch_embed",)),
    "CogView4Transformer2DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("rope", "patch_embed")),
    "DiTTransformer2DModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("pos_embed",)),
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
    "HiDreamImageTransformer2DModel": Layout(
        {"double_stream_blocks": _HIDDEN_ENCODER, "single_stream_blocks": _HIDDEN},
        feeders=("x_embedder", "pe_embedder"),
    ),
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
    "HunyuanVideoTransformer3DModel": Layout(
        {
            "context_embedder.token_refiner.refiner_blocks": _HIDDEN,
            "transformer_blocks": _HIDDEN_ENCODER,
            "single_transformer_blocks": _HIDDEN_ENCODER,
        },
        feeders=("x_embedder", "context_embedder", "rope"),
    ),
    "Kandinsky5Transformer3DModel": Layout(
        {"text_transformer_blocks": ("x",), "visual_transformer_blocks": ("visual_embed",)},
        head=("visual_embed",),
        feeders=("text_embeddings", "visual_embeddings", "text_rope_embeddings", "visual_rope_embeddings"),
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
    "Lumina2Transformer2DModel": Layout(
        {"context_refiner": _HIDDEN, "noise_refiner": _HIDDEN, "layers": _HIDDEN},
        feeders=("rope_embedder", "x_embedder"),
    ),
    "MochiTransformer3DModel": Layout({"transformer_blocks": _HIDDEN_ENCODER}, feeders=("patch_embed", "rope")),
    "PixArtTransformer2DModel": Layout({"transformer_blocks": _HIDDEN}, feeders=("pos_embed", "caption_projection")),
    "QwenImageTransformer2DModel": Layout(
        {"transformer_blocks": _ENCODER_HIDDEN}, feeders=("img_in", "txt_norm", "txt_in", "pos_embed")
    ),
    "SD3Transformer2DModel": Layout({"transformer_blocks": _ENCODER_HIDDEN}, feeders=("pos_embed", "context_embedder")),
    "SanaTransformer2DModel": Layout(
        {"transformer_blocks": _HIDDEN}, feeders=("patch_embed", "caption_projection", "caption_norm")
    ),
    "SkyReelsV2Transformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
    "WanTransformer3DModel": Layout({"blocks": _HIDDEN}, feeders=("rope", "patch_embedding")),
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
