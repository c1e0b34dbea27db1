"""Pipelines that make sound, from small random components."""

from typing import Any

import diffusers
import torch

from tests.pipelines.small import Absent, make, noise, ones, texts, wide
from tests.pipelines.small_unet import sd_given, unet, unet_config, vae


class Vocoder(torch.nn.Module):
    """Stands for the one that makes a wave of a spectrogram."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(upsample_rates=[2, 2], sampling_rate=64, model_in_dim=8)

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return spectrogram.flatten(1)


def audio_parts(kind: str = "UNet2DConditionModel", **config: Any) -> dict[str, Any]:
    network = (
        unet(
            in_channels=4,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=8,
            class_embeddings_concat=True,
            cross_attention_dim=(4, 8),
        )
        if kind == "UNet2DConditionModel"
        else make(
            kind,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **{**unet_config(), "cross_attention_dim": (8, 8), **config},
        )
    )
    return {
        "unet": network,
        "vae": vae(in_channels=1, out_channels=1),
        "vocoder": Vocoder(),
        "text_encoder": Absent(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
    }


def sound_given() -> dict[str, Any]:
    return {
        **sd_given(),
        "prompt_embeds": noise(1, 8),
        "negative_prompt_embeds": noise(1, 8, seed=1),
        "audio_length_in_s": 0.5,
        "output_type": "np",
    }


wide("AudioLDMPipeline", "MusicLDMPipeline", parts=audio_parts, given=sound_given)


class Projection(torch.nn.Module):
    """Stands for the projection of a prompt and of seconds."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(min_value=0, max_value=512)

    def forward(self, text_hidden_states: Any = None, start_seconds: Any = None, end_seconds: Any = None) -> Any:
        from types import SimpleNamespace

        second = noise(1, 1, 8, seed=7)
        return SimpleNamespace(
            text_hidden_states=text_hidden_states,
            seconds_start_hidden_states=None if start_seconds is None else second.expand(len(start_seconds), -1, -1),
            seconds_end_hidden_states=None if end_seconds is None else second.expand(len(end_seconds), -1, -1),
        )


wide(
    "StableAudioPipeline",
    parts=lambda: {
        "transformer": make(
            "StableAudioDiTModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        "vae": make(
            "AutoencoderOobleck",
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=8,
        ),
        "projection_model": Projection(),
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(),
    },
    given=lambda: {
        **texts(),
        "negative_attention_mask": ones(1, 5),
        "audio_end_in_s": 1.0,
        "num_waveforms_per_prompt": 1,
    },
)
