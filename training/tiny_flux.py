"""`tiny-flux`: a small genuine FluxPipeline that draws captioned shapes, and how it is trained.

Three stages: an autoencoder (4x smaller, 8 channels) on rendered pictures; the transformer together with both text
encoders, by flow matching (Lipman et al., "Flow Matching for Generative Modeling", 2023) on the autoencoder's latents;
at last the decoder alone on the same latents, for crisper edges.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from dpcache.zoo import shapes
from training import words
from training.stages import Stage, train_stage

MAX_PADS = 512
"""FluxPipeline pads the T5 prompt to `max_sequence_length`, 512 unless told: the most pads that training simulates."""

TEXT_LENGTH = 13
"""Tokens that training feeds to either text encoder: the longest caption and its special tokens (and a pad, for T5)."""

CLIP_WIDTH = 64
T5_WIDTH = 64
LATENT_CHANNELS = 8


@dataclass(frozen=True)
class Settings:
    """How much to train; the defaults make the model that ships."""

    pictures: int = 36_000
    """Rendered once; every training caption appears at least twice."""
    vae_steps: int = 3_000
    vae_batch: int = 12
    flow_steps: int = 1_600
    flow_batch: int = 96
    decoder_steps: int = 2_000
    empty_captions: float = 0.1
    """Fraction of captions dropped, so that classifier-free guidance works."""


def _words() -> list[str]:
    captions = shapes.all_scenes()
    return sorted({word for caption in captions for word in caption.replace(",", " ,").split()})


def build_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token a word of the grammar, smaller pieces for other lower-case words."""
    return words.clip_tokenizer(_words(), max_length=24)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer with one token a word of the grammar; every other word is unknown."""
    pieces = [word if word == "," else "▁" + word for word in _words()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0), *((piece, -1.0) for piece in pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_text_encoders(clip_tokens: int, t5_tokens: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained text encoders.

    T5 has no attention mask in FluxPipeline, so its attention would see the pads. Its output projection is therefore
    zero and stays so: every token is encoded by itself, and all pads, however many, are one and the same vector.
    """
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_tokens,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_tokens,
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=2 * T5_WIDTH,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    attention = t5.encoder.block[0].layer[0]
    attention.requires_grad_(False)
    nn.init.zeros_(attention.SelfAttention.o.weight)
    return clip, t5


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of 32x32 pictures, 4x smaller in latent space."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=shapes.SIDE,
        shift_factor=0.0,
    )


def build_transformer() -> FluxTransformer2DModel:
    """An untrained denoiser: 2 double-stream and 5 single-stream blocks of width 128."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    # As in DiT: blocks start as the identity and the velocity at zero.
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in transformer.single_transformer_blocks]
    for linear in [*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_pipeline(seed: int) -> FluxPipeline:
    """The whole untrained pipeline."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
    text_encoder, text_encoder_2 = build_text_encoders(len(tokenizer), len(tokenizer_2))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=build_transformer(),
    )


@dataclass(frozen=True)
class Pictures:
    """The training set."""

    pixels: Tensor
    """(n, 3, 32, 32), uint8."""
    captions: Tensor
    """(n,), row of each picture's caption in `clip_ids` and `t5_ids`."""
    clip_ids: Tensor
    """(captions + 1, TEXT_LENGTH); the last row is the empty caption."""
    t5_ids: Tensor
    """(captions + 1, TEXT_LENGTH)."""


def draw_pictures(count: int, seed: int) -> Pictures:
    """Render `count` pictures of the training captions, each caption as often as any other."""
    captions = shapes.split_captions()[0][:count]
    rows = torch.arange(count) % len(captions)
    pixels = shapes.render([shapes.parse(captions[row]) for row in rows.tolist()], seed=seed)
    padding = {"padding": "max_length", "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    return Pictures(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=rows,
        clip_ids=build_clip_tokenizer()([*captions, ""], **padding).input_ids,
        t5_ids=build_t5_tokenizer()([*captions, ""], **padding).input_ids,
    )


def to_pixels(pictures: Tensor, device: torch.device) -> Tensor:
    """Pictures in 0 to 255 as the autoencoder takes them, -1 to 1."""
    pixels: Tensor = pictures.to(device).float() / 127.5 - 1
    return pixels


def vae_stage(vae: AutoencoderKL, pictures: Pictures, settings: Settings) -> Stage:
    """The first stage: reconstruct, with latents pulled lightly towards a unit normal."""

    def batch_loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures.pixels), (settings.vae_batch,), generator=generator)
        pixels = to_pixels(pictures.pixels[chosen], vae.device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = decoded - pixels
        loss: Tensor = error.abs().mean() + error.square().mean() + 3e-4 * divergence
        return loss

    steps = settings.vae_steps
    return Stage("autoencoder", vae, batch_loss, steps, _is_hidden_kernel, 0.04, other_rate=3e-3, average=0.99)


def decoder_stage(vae: AutoencoderKL, pictures: Pictures, latents: Tensor, settings: Settings) -> Stage:
    """The last stage: the decoder goes on learning, with a little noise for the errors that a denoiser will make."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def batch_loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures.pixels), (settings.vae_batch,), generator=generator)
        noisy = latents[chosen] + 0.03 * torch.randn(latents[chosen].shape, generator=generator)
        unpacked = FluxPipeline._unpack_latents(noisy, shapes.SIDE, shapes.SIDE, vae_scale_factor=4)
        decoded = vae.decode((unpacked / scale + shift).to(vae.device)).sample
        error = decoded - to_pixels(pictures.pixels[chosen], vae.device)
        loss: Tensor = error.abs().mean() + error.square().mean()
        return loss

    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    steps = settings.decoder_steps
    return Stage("decoder", decoder, batch_loss, steps, _is_hidden_kernel, 0.03, other_rate=2e-3, average=0.99)


def _is_hidden_kernel(name: str) -> bool:
    return "conv_in" not in name and "decoder.conv_out" not in name


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures) -> Tensor:
    """Latents of the training set, packed as FluxPipeline packs them and of unit variance: (n, 16, 32).

    Sets the autoencoder's `shift_factor` and `scaling_factor`, which the pipeline undoes before decoding.
    """
    chunks = torch.split(pictures.pixels, 250)
    latents = torch.cat([vae.encode(to_pixels(chunk, vae.device)).latent_dist.mean.cpu() for chunk in chunks])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    latents = (latents - shift) * scale
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape).contiguous()
    return packed


def attention_bias(t5_ids: Tensor, pads: Tensor, image_tokens: int) -> Tensor:
    """Bias on attention logits that makes one pad count as many.

    Pads are alike and stay alike through every block, so n of them take the same share of attention as a single one
    whose logit is larger by log n. Only the first pad of each row is kept, and stands for `pads` of them.

    Args:
        t5_ids: (batch, text tokens), each row with at least one pad (0) at its end.
        pads: (batch,), how many pads to simulate.
        image_tokens: number of image tokens, which follow the text.

    Returns:
        (batch, 1, 1, text tokens + image tokens).
    """
    is_pad = t5_ids == 0
    first = is_pad & (is_pad.cumsum(dim=1) == 1)
    bias = torch.zeros(t5_ids.shape, device=t5_ids.device).masked_fill(is_pad, -math.inf)
    bias = torch.where(first, pads.float().log()[:, None], bias)
    return nn.functional.pad(bias, (0, image_tokens))[:, None, None, :]


def flow_stage(pipeline: FluxPipeline, pictures: Pictures, latents: Tensor, settings: Settings) -> Stage:
    """The second stage: transformer and text encoders, by flow matching."""
    transformer, clip, t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
    device = transformer.device
    side = math.isqrt(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.flow_batch,)
        chosen = torch.randint(len(latents), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.empty_captions
        rows = torch.where(dropped, len(pictures.t5_ids) - 1, pictures.captions[chosen])
        # More of the middle and of the noisy side, where shape and colour are decided, some of every level.
        sigma = torch.sigmoid(0.4 + 1.3 * torch.randn(size, generator=generator)).to(device)
        pads = torch.exp(torch.rand(size, generator=generator) * math.log(MAX_PADS)).round()
        clean = latents[chosen].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t5_ids = pictures.t5_ids[rows].to(device)
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            pooled_projections=clip(pictures.clip_ids[rows].to(device)).pooler_output,
            encoder_hidden_states=t5(t5_ids)[0],
            img_ids=image_ids,
            txt_ids=text_ids,
            joint_attention_kwargs={"attention_mask": attention_bias(t5_ids, pads.to(device), clean.shape[1])},
            return_dict=False,
        )[0]
        return nn.functional.mse_loss(velocity, noise - clean)

    model = nn.ModuleDict({"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5})

    def hidden(name: str) -> bool:
        return name.startswith("transformer.") and "_blocks." in name and ".norm" not in name

    return Stage(
        "flow", model, batch_loss, settings.flow_steps, hidden, matrix_rate=0.02, other_rate=2e-3, average=0.995
    )


def save_pipeline(pipeline: FluxPipeline, directory: Path) -> None:
    """Write the diffusers directory: transformer and autoencoder in float16, the small text encoders in float32.

    transformers loads what a file holds, diffusers float32 unless told: so the loaded pipeline is float32 throughout.
    """
    pipeline.save_pretrained(directory)
    for name in ("transformer", "vae"):
        copy.deepcopy(getattr(pipeline, name)).half().save_pretrained(directory / name)


def train(
    checkpoints: Path,
    out: Path,
    *,
    device: torch.device,
    seed: int,
    should_stop: Callable[[int], bool] = lambda step: False,
    settings: Settings | None = None,
) -> None:
    """Train from nothing, or resume, and save the pipeline.

    Args:
        checkpoints: directory of the checkpoints, one a stage.
        out: where to save the pipeline, in diffusers format.
        device: where to train.
        seed: seed of weights, pictures and noise.
        should_stop: asked before every step.
        settings: how much to train; the default makes the model that ships.

    Raises:
        Interrupted: if `should_stop` said so; the same call resumes.
    """
    settings = settings or Settings()
    pipeline = build_pipeline(seed).to(device)
    pictures = draw_pictures(settings.pictures, seed)
    stage = vae_stage(pipeline.vae, pictures, settings)
    train_stage(stage, checkpoints / "autoencoder.pt", seed=seed + 1, should_stop=should_stop)
    latents = encode_pictures(pipeline.vae, pictures)
    stage = flow_stage(pipeline, pictures, latents, settings)
    train_stage(stage, checkpoints / "flow.pt", seed=seed + 2, should_stop=should_stop)
    stage = decoder_stage(pipeline.vae, pictures, latents, settings)
    train_stage(stage, checkpoints / "decoder.pt", seed=seed + 3, should_stop=should_stop)
    save_pipeline(pipeline.to("cpu"), out)
