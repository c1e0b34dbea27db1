"""`hard-flux`: a small genuine FluxPipeline whose captions leave most of the picture open, and how it is trained.

As with `tiny-flux`: an autoencoder (4x smaller) on rendered pictures; then the transformer together with both text
encoders, by flow matching on the autoencoder's latents; at last the decoder alone, for crisper edges. The pictures are
dead leaves (`training.leaves`): what the caption leaves open is decided in the first steps of sampling, where small
errors change the whole picture, as with large models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from dpcache.zoo import leaves as heaps
from training import leaves, words
from training.stages import Stage, train_stage
from training.tiny_flux import (
    CLIP_WIDTH,
    MAX_PADS,
    T5_WIDTH,
    attention_bias,
    build_text_encoders,
    save_pipeline,
    to_pixels,
)

TEXT_LENGTH = 10
"""Tokens that training feeds to either text encoder: the longest caption and its special tokens (and a pad, for T5)."""

LATENT_CHANNELS = 12

SHIFT = 0.6
"""Of the sampling times. FLUX samples with 3 or so: of thousands of tokens the composition shows through nearly pure
noise. Of 64 tokens it shows much later, so a smaller shift puts the same share of steps before it is decided."""


@dataclass(frozen=True)
class Settings:
    """How much to train; the defaults make the model that ships."""

    pictures: int = 48_000
    """Rendered once."""
    vae_steps: int = 1_500
    vae_batch: int = 8
    flow_steps: int = 3_600
    flow_batch: int = 48
    decoder_steps: int = 500
    empty_captions: float = 0.1
    """Fraction of captions dropped, so that classifier-free guidance works."""


def _words() -> list[str]:
    return sorted({word for caption in heaps.all_heaps() for word in caption.split()})


def build_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token a word of the grammar, smaller pieces for other lower-case words."""
    return words.clip_tokenizer(_words(), max_length=24)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer with one token a word of the grammar; every other word is unknown."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    vocabulary += [("▁" + word, -1.0) for word in _words()]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of 64x64 pictures, 4x smaller in latent space."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=leaves.SIDE,
        shift_factor=0.0,
    )


def build_transformer() -> FluxTransformer2DModel:
    """An untrained denoiser: 2 double-stream and 6 single-stream blocks of width 128 on 64 tokens."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
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
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
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
    """(n, 3, 64, 64), uint8."""
    captions: Tensor
    """(n,), row of each picture's caption in `clip_ids` and `t5_ids`."""
    clip_ids: Tensor
    """(captions + 1, TEXT_LENGTH); the last row is the empty caption."""
    t5_ids: Tensor
    """(captions + 1, TEXT_LENGTH)."""


def draw_pictures(count: int, seed: int, heaping: leaves.Heaping = leaves.USUAL) -> Pictures:
    """Render `count` pictures of the training captions, each caption as often as any other."""
    captions = heaps.split_captions()[0][:count]
    rows = torch.arange(count) % len(captions)
    pixels = leaves.render([heaps.parse(captions[row]) for row in rows.tolist()], seed=seed, heaping=heaping)
    padding = {"padding": "max_length", "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    return Pictures(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=rows,
        clip_ids=build_clip_tokenizer()([*captions, ""], **padding).input_ids,
        t5_ids=build_t5_tokenizer()([*captions, ""], **padding).input_ids,
    )


def vae_stage(vae: AutoencoderKL, draw: Callable[[], Pictures], settings: Settings) -> Stage:
    """The first stage: reconstruct, with latents pulled lightly towards a unit normal."""

    def batch_loss(generator: torch.Generator) -> Tensor:
        pictures = draw()
        chosen = torch.randint(len(pictures.pixels), (settings.vae_batch,), generator=generator)
        pixels = to_pixels(pictures.pixels[chosen], vae.device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = decoded - pixels
        loss: Tensor = error.abs().mean() + error.square().mean() + 1e-3 * divergence
        return loss

    steps = settings.vae_steps
    return Stage("autoencoder", vae, batch_loss, steps, _is_hidden_kernel, 0.04, other_rate=3e-3, average=0.99)


def decoder_stage(vae: AutoencoderKL, pictures: Pictures, latents: Tensor, settings: Settings) -> Stage:
    """The last stage: the decoder goes on learning, with a little noise for the errors that a denoiser will make."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def batch_loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures.pixels), (settings.vae_batch,), generator=generator)
        noisy = latents[chosen] + 0.06 * torch.randn(latents[chosen].shape, generator=generator)
        unpacked = FluxPipeline._unpack_latents(noisy, leaves.SIDE, leaves.SIDE, vae_scale_factor=4)
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
def scale_latents(vae: AutoencoderKL, pictures: Tensor, power: float = 0.75) -> None:
    """Turn and scale the latents so that what changes pixels most is largest; what the autoencoder decodes stays.

    The autoencoder makes all its channels about equally large, whatever they do. A denoiser would then spend as much on
    the least detail as on the colours. The turn goes into the two 1x1 convolutions around the latents.

    Args:
        vae: the trained autoencoder.
        pictures: (n, 3, 64, 64), 0 to 255, to measure on.
        power: 0 makes all channels equally large, 1 as large as their share in the pixels.
    """
    pixels = to_pixels(pictures, vae.device)
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in torch.split(pixels, 50)])
    q = latents.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
    p = nn.functional.pixel_unshuffle(pixels, 4).permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
    mean = q.mean(dim=0)
    q, p = q - mean, p - p.mean(dim=0)
    covariance = q.T @ q / len(q) + 1e-4 * torch.eye(q.shape[1], dtype=q.dtype)
    to_pixel = torch.linalg.solve(covariance, q.T @ p / len(q))
    root = torch.linalg.cholesky(covariance)
    turn, sizes, _ = torch.linalg.svd(root.T @ to_pixel, full_matrices=False)
    matrix = (sizes**power)[:, None] * torch.linalg.solve_triangular(root, turn.T, upper=False, left=False)
    inverse = torch.linalg.inv(matrix)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    half = len(mean)
    weight, bias = into.weight.double().cpu(), into.bias.double().cpu()
    weight[:half] = torch.einsum("ij,jkhw->ikhw", matrix, weight[:half])
    bias[:half] = matrix @ (bias[:half] - mean)
    into.weight.copy_(weight)
    into.bias.copy_(bias)
    weight, bias = out_of.weight.double().cpu(), out_of.bias.double().cpu()
    out_of.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    out_of.weight.copy_(torch.einsum("ijhw,jk->ikhw", weight, inverse))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures) -> Tensor:
    """Latents of the training set, packed as FluxPipeline packs them and of unit variance: (n, 64, 48).

    Sets the autoencoder's `shift_factor` and `scaling_factor`, which the pipeline undoes before decoding.
    """
    chunks = torch.split(pictures.pixels, 50)
    latents = torch.cat([vae.encode(to_pixels(chunk, vae.device)).latent_dist.mean.cpu() for chunk in chunks])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    packed: Tensor = FluxPipeline._pack_latents((latents - shift) * scale, *latents.shape).contiguous()
    return packed


def flow_stage(pipeline: FluxPipeline, pictures: Pictures, latents: Tensor, settings: Settings) -> Stage:
    """The second stage: transformer and text encoders, by flow matching."""
    transformer, clip, t5 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
    device = transformer.device
    side = leaves.SIDE // 8
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.flow_batch,)
        chosen = torch.randint(len(latents), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.empty_captions
        rows = torch.where(dropped, len(pictures.t5_ids) - 1, pictures.captions[chosen])
        sigma = torch.sigmoid(1.5 * torch.randn(size, generator=generator) - 0.4).to(device)
        # The call pads the caption: to 512 tokens unless told, to 16 if told as the model's defaults are.
        pads = torch.exp(torch.rand(size, generator=generator) * torch.tensor(float(MAX_PADS)).log()).round()
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
    # Drawn when first needed: a finished autoencoder needs them no more.
    crowded = cache(lambda: draw_pictures(settings.pictures, seed, leaves.CROWDED))
    stage = vae_stage(pipeline.vae, crowded, settings)
    train_stage(stage, checkpoints / "autoencoder.pt", seed=seed + 1, should_stop=should_stop)
    crowded.cache_clear()
    pictures = draw_pictures(settings.pictures, seed)
    scale_latents(pipeline.vae, pictures.pixels[:400])
    latents = encode_pictures(pipeline.vae, pictures)
    stage = flow_stage(pipeline, pictures, latents, settings)
    train_stage(stage, checkpoints / "flow.pt", seed=seed + 2, should_stop=should_stop)
    stage = decoder_stage(pipeline.vae, pictures, latents, settings)
    train_stage(stage, checkpoints / "decoder.pt", seed=seed + 3, should_stop=should_stop)
    save_pipeline(pipeline.to("cpu"), out)
