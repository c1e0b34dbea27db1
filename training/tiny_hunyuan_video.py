"""`tiny-hunyuan-video`: a small genuine HunyuanVideoPipeline that draws captioned clips, and how it is trained.

Four stages: a causal video autoencoder (4x smaller in space and time, 8 channels) on single frames of rendered clips,
which teach it shapes and colours far faster, then on whole clips; the transformer together with both text encoders, by
flow matching on the autoencoder's latents; at last the decoder alone on the same latents, for crisper edges.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizer

from dpcache.zoo import clips
from training import words
from training.stages import Stage, train_stage

TEXT_LENGTH = 11
"""Tokens that training feeds to either text encoder: the longest caption and its special tokens (and a pad, for Llama).

Further pads change nothing: the Llama ones are masked, and CLIP pools at the end of the caption.
"""

CLIP_LENGTH = 77
"""Tokens to which HunyuanVideoPipeline pads every prompt for CLIP."""

LLAMA_LAYER = -3
"""Which of Llama's hidden states HunyuanVideoPipeline takes; the layers after it never matter."""

CLIP_WIDTH = 64
LLAMA_WIDTH = 64
LATENT_CHANNELS = 8
GUIDANCE = 6_000.0
"""What the transformer is told of guidance by default; it makes no difference (see `build_transformer`)."""


@dataclass(frozen=True)
class Settings:
    """How much to train; the defaults make the model that ships."""

    clips: int = 6_560
    """Rendered once; every training caption appears twenty times."""
    frame_steps: int = 250
    frame_batch: int = 24
    vae_steps: int = 850
    vae_batch: int = 4
    flow_steps: int = 2_000
    flow_batch: int = 32
    decoder_steps: int = 300
    empty_captions: float = 0.1
    """Fraction of captions dropped, so that classifier-free guidance works."""


def _words() -> list[str]:
    return sorted({word for caption in clips.all_clips() for word in caption.split()})


def build_tokenizers() -> tuple[LlamaTokenizer, CLIPTokenizer]:
    """Tokenizers with one token a word of the grammar."""
    return words.llama_tokenizer(_words(), max_length=256), words.clip_tokenizer(_words(), CLIP_LENGTH)


def build_text_encoders(llama_tokens: int, clip_tokens: int) -> tuple[LlamaModel, CLIPTextModel]:
    """Untrained text encoders.

    Llama has two layers more than the pipeline uses. They are zero and stay so, and take no room in an archive.
    """
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=llama_tokens,
            hidden_size=LLAMA_WIDTH,
            intermediate_size=2 * LLAMA_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    )
    for unused in (*llama.layers[LLAMA_LAYER + 1 :], llama.norm):
        unused.requires_grad_(False)
    for weight in llama.layers[LLAMA_LAYER + 1 :].parameters():
        nn.init.zeros_(weight)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_tokens,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return llama, clip


def build_vae() -> AutoencoderKLHunyuanVideo:
    """An untrained autoencoder: 9 frames of 32x32 become 3 latent ones of 8x8."""
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    start_as_mosaic(vae)
    return vae


@torch.no_grad()
def start_as_mosaic(vae: AutoencoderKLHunyuanVideo) -> None:
    """Let the autoencoder start by handing colours on, blurred, so that what it has to learn is edges and motion.

    Everywhere between its first and last layers, channels 0 to 5 are red, green and blue, each with its negative, since
    silu(x) - silu(-x) = x. Channels 6 and 7 are constant, lest normalisation take brightness away. Residual branches
    start at zero. Other channels start at random.
    """
    spread, keep = torch.zeros(8, 3), torch.eye(8)
    for colour in range(3):
        spread[2 * colour, colour], spread[2 * colour + 1, colour] = 1, -1
    constant = torch.tensor([0.0] * 6 + [2.0, -2.0])
    for name, layer in vae.named_modules():
        if not isinstance(layer, nn.Conv3d):
            continue
        if name.endswith("conv2.conv"):
            for weight in layer.parameters():
                nn.init.zeros_(weight)
        elif name.endswith("conv_in.conv"):
            _hand_on(layer, spread, constant)
        elif name.endswith("conv_out.conv"):
            _hand_on(layer, spread.T)
        elif name.endswith("quant_conv"):
            _hand_on(layer, torch.eye(3))
        elif not name.endswith("conv1.conv"):
            _hand_on(layer, keep, blur="samplers" in name)
    # Little noise in the latents: their logarithmic variance.
    nn.init.zeros_(vae.quant_conv.weight[LATENT_CHANNELS:])
    nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -4)


def _hand_on(layer: nn.Conv3d, matrix: Tensor, bias: Tensor | None = None, *, blur: bool = False) -> None:
    """Let the first channels become `matrix` times those before, of the latest frame the layer sees."""
    rows, columns = matrix.shape
    side = layer.kernel_size[-1]
    kernel = torch.tensor([0.25, 0.5, 0.25]) if blur else torch.eye(side)[side // 2]
    layer.weight[:rows] = 0
    layer.weight[:rows, :columns, -1] = matrix[:, :, None, None] * torch.outer(kernel, kernel)
    assert layer.bias is not None
    layer.bias[:rows] = 0 if bias is None else bias


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """An untrained denoiser: 2 double-stream and 4 single-stream blocks of width 128."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        text_embed_dim=LLAMA_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        rope_axes_dim=(8, 12, 12),
    )
    # As in DiT: blocks start as the identity and the velocity at zero.
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in transformer.single_transformer_blocks]
    norms += [block.norm_out for block in transformer.context_embedder.token_refiner.refiner_blocks]
    for linear in [*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    # No guidance is distilled into this model, so what it is told of guidance adds nothing, and never learns to.
    embedder = transformer.time_text_embed.guidance_embedder.requires_grad_(False)
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    return transformer


def build_pipeline(seed: int) -> HunyuanVideoPipeline:
    """The whole untrained pipeline."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = build_tokenizers()
    text_encoder, text_encoder_2 = build_text_encoders(len(tokenizer), len(tokenizer_2))
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=build_transformer(),
    )


@dataclass(frozen=True)
class Clips:
    """The training set."""

    pixels: Tensor
    """(n, 3, 9, 32, 32), uint8."""
    captions: Tensor
    """(n,), row of each clip's caption in the ids."""
    llama_ids: Tensor
    """(captions + 1, TEXT_LENGTH); the last row is the empty caption."""
    llama_mask: Tensor
    """(captions + 1, TEXT_LENGTH), 1 for tokens and 0 for pads."""
    clip_ids: Tensor
    """(captions + 1, TEXT_LENGTH)."""


def draw_clips(count: int, seed: int) -> Clips:
    """Render `count` clips of the training captions, each caption as often as any other."""
    captions = clips.split_captions()[0][:count]
    rows = torch.arange(count) % len(captions)
    pixels = clips.render([clips.parse(captions[row]) for row in rows.tolist()], seed=seed)
    llama, clip = (
        tokenizer([*captions, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        for tokenizer in build_tokenizers()
    )
    return Clips(
        pixels=torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).contiguous(),
        captions=rows,
        llama_ids=llama.input_ids,
        llama_mask=llama.attention_mask,
        clip_ids=clip.input_ids,
    )


def to_pixels(pixels: Tensor, device: torch.device) -> Tensor:
    """Clips in 0 to 255 as the autoencoder takes them, -1 to 1."""
    scaled: Tensor = pixels.to(device).float() / 127.5 - 1
    return scaled


def frame_stage(vae: AutoencoderKLHunyuanVideo, drawn: Clips, settings: Settings) -> Stage:
    """The first stage: reconstruct single frames."""

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.frame_batch,)
        chosen = torch.randint(len(drawn.pixels), size, generator=generator)
        frames = torch.randint(clips.FRAMES, size, generator=generator)
        return reconstruction_loss(vae, drawn.pixels[chosen, :, frames].unsqueeze(2), generator)

    steps = settings.frame_steps
    return Stage("frames", vae, batch_loss, steps, _is_hidden_kernel, 0.012, other_rate=1.5e-3, average=0.99)


@torch.no_grad()
def look_at_one_frame(vae: AutoencoderKLHunyuanVideo) -> None:
    """Let every causal kernel see the latest of its frames alone, as which a single frame is seen repeated.

    So nothing changes for single frames, and clips start from what was learned of them: kernels that average over past
    frames, as training on single frames leaves them, would show every clip standing still.
    """
    for kernel in vae.parameters():
        if kernel.ndim == 5:
            total = kernel.sum(dim=2)
            kernel.zero_()[:, :, -1] = total


def vae_stage(vae: AutoencoderKLHunyuanVideo, drawn: Clips, settings: Settings) -> Stage:
    """The second stage: reconstruct clips."""

    def batch_loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn.pixels), (settings.vae_batch,), generator=generator)
        return reconstruction_loss(vae, drawn.pixels[chosen], generator)

    steps = settings.vae_steps
    return Stage("autoencoder", vae, batch_loss, steps, _is_hidden_kernel, 0.004, other_rate=7e-4, average=0.99)


def reconstruction_loss(vae: AutoencoderKLHunyuanVideo, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """How badly clips, (n, 3, frames, 32, 32), are reconstructed, with latents pulled lightly towards a unit normal."""
    pixels = to_pixels(drawn, vae.device)
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    error = decoded - pixels
    loss: Tensor = error.abs().mean() + error.square().mean() + 2e-4 * divergence
    return loss


def decoder_stage(vae: AutoencoderKLHunyuanVideo, drawn: Clips, latents: Tensor, settings: Settings) -> Stage:
    """The last stage: the decoder goes on learning, with a little noise for the errors that a denoiser will make."""

    def batch_loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(drawn.pixels), (settings.vae_batch,), generator=generator)
        noisy = latents[chosen] + 0.03 * torch.randn(latents[chosen].shape, generator=generator)
        decoded = vae.decode((noisy / vae.config.scaling_factor).to(vae.device)).sample
        error = decoded - to_pixels(drawn.pixels[chosen], vae.device)
        loss: Tensor = error.abs().mean() + error.square().mean()
        return loss

    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    steps = settings.decoder_steps
    return Stage("decoder", decoder, batch_loss, steps, _is_hidden_kernel, 0.004, other_rate=7e-4, average=0.99)


def _is_hidden_kernel(name: str) -> bool:
    return "conv_in" not in name and "decoder.conv_out" not in name


@torch.no_grad()
def encode_clips(vae: AutoencoderKLHunyuanVideo, drawn: Clips) -> Tensor:
    """Latents of the training set, about of unit variance: (n, 8, 3, 8, 8).

    Sets the autoencoder's `scaling_factor`, which the pipeline undoes before decoding. It knows no shift: what keeps
    the mean near zero is the pull of the first stages.
    """
    chunks = torch.split(drawn.pixels, 100)
    latents = torch.cat([vae.encode(to_pixels(chunk, vae.device)).latent_dist.mean.cpu() for chunk in chunks])
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    return latents * scale


def flow_stage(pipeline: HunyuanVideoPipeline, drawn: Clips, latents: Tensor, settings: Settings) -> Stage:
    """The third stage: transformer and text encoders, by flow matching."""
    transformer, llama, clip = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
    device = transformer.device

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.flow_batch,)
        chosen = torch.randint(len(latents), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.empty_captions
        rows = torch.where(dropped, len(drawn.llama_ids) - 1, drawn.captions[chosen])
        # More of the middle and of the noisy side, where shape and motion are decided, some of every level.
        sigma = torch.sigmoid(0.4 + 1.3 * torch.randn(size, generator=generator)).to(device)
        clean = latents[chosen].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        mask = drawn.llama_mask[rows].to(device)
        hidden_states = llama(drawn.llama_ids[rows].to(device), mask, output_hidden_states=True).hidden_states
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None, None, None]),
            timestep=1000 * sigma,
            encoder_hidden_states=hidden_states[LLAMA_LAYER],
            encoder_attention_mask=mask,
            pooled_projections=clip(drawn.clip_ids[rows].to(device)).pooler_output,
            guidance=torch.full(size, GUIDANCE, device=device),
            return_dict=False,
        )[0]
        return nn.functional.mse_loss(velocity, noise - clean)

    model = nn.ModuleDict({"transformer": transformer, "text_encoder": llama, "text_encoder_2": clip})

    def hidden(name: str) -> bool:
        return name.startswith("transformer.") and "_blocks." in name and ".norm" not in name

    return Stage(
        "flow", model, batch_loss, settings.flow_steps, hidden, matrix_rate=0.02, other_rate=2e-3, average=0.995
    )


def save_pipeline(pipeline: HunyuanVideoPipeline, directory: Path) -> None:
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
        seed: seed of weights, clips and noise.
        should_stop: asked before every step.
        settings: how much to train; the default makes the model that ships.

    Raises:
        Interrupted: if `should_stop` said so; the same call resumes.
    """
    settings = settings or Settings()
    pipeline = build_pipeline(seed).to(device)
    drawn = draw_clips(settings.clips, seed)
    stage = frame_stage(pipeline.vae, drawn, settings)
    train_stage(stage, checkpoints / "frames.pt", seed=seed + 4, should_stop=should_stop)
    look_at_one_frame(pipeline.vae)
    stage = vae_stage(pipeline.vae, drawn, settings)
    train_stage(stage, checkpoints / "autoencoder.pt", seed=seed + 1, should_stop=should_stop)
    latents = encode_clips(pipeline.vae, drawn)
    stage = flow_stage(pipeline, drawn, latents, settings)
    train_stage(stage, checkpoints / "flow.pt", seed=seed + 2, should_stop=should_stop)
    stage = decoder_stage(pipeline.vae, drawn, latents, settings)
    train_stage(stage, checkpoints / "decoder.pt", seed=seed + 3, should_stop=should_stop)
    save_pipeline(pipeline.to("cpu"), out)
