"""`hard-dit`: a small genuine DiTPipeline whose classes leave most of the picture open, and how it is trained.

One stage: the transformer, by noise prediction (Ho et al., "Denoising Diffusion Probabilistic Models", 2020) on the
latents of the autoencoder of `hard-flux`, which serves here as it is. A class is a kind of thing in the colours of a
palette; textures, places and sizes are left to chance.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from dpcache import zoo
from dpcache.zoo import BUNDLED
from dpcache.zoo.leaves import CLASSES, class_of
from training import hard_flux, leaves
from training.stages import Stage, train_stage
from training.tiny_dit import NO_CLASS, save_pipeline, share_embedding
from training.tiny_flux import to_pixels

SHIFT = 0.3
"""The noise at the time t of 1000 is `SHIFT * t / (1000 - t)` of the picture, as with FLUX and this shift."""


@dataclass(frozen=True)
class Settings:
    """How much to train."""

    pictures: int = 48_000
    """Rendered once."""
    steps: int = 3_600
    batch: int = 48
    no_class: float = 0.1
    """Fraction of classes dropped, so that classifier-free guidance works."""
    largest_weight: float = 100.0
    """Of the weight that makes errors of the noise count like errors of a flow's velocity."""


def load_vae(directory: Path) -> AutoencoderKL:
    """The trained autoencoder of `hard-flux`; its shift goes, for DiTPipeline knows only the scale."""
    vae = AutoencoderKL.from_pretrained(directory, dtype=torch.float32)
    vae.register_to_config(shift_factor=None)
    return vae


def build_scheduler() -> DDIMScheduler:
    """Most times have little noise: of few tokens the composition shows only then."""
    # Half a time early, so that the last one still has some picture in it.
    time = torch.arange(1000, dtype=torch.float64) + 0.5
    noise = SHIFT * time / (1000 - time)
    # A little noise is left: in float32 DDIM would divide by nothing.
    kept = 1 / (1 + noise**2 + 1e-5)
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return DDIMScheduler(trained_betas=betas.tolist(), clip_sample=False)


def build_transformer() -> DiTTransformer2DModel:
    """An untrained denoiser: 7 blocks of width 128 on 64 patches of 2x2 latent pixels."""
    channels = hard_flux.LATENT_CHANNELS
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,  # DiTPipeline divides what stands here, even where None would mean the same
        num_layers=7,
        sample_size=leaves.SIDE // 4,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    # As in DiT: blocks start as the identity and the noise at zero.
    norms = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in [*norms, transformer.proj_out_1, transformer.proj_out_2]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    # The rows of classes that do not exist get no gradient; as zeros they take no room in an archive.
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    with torch.no_grad():
        table.normal_(std=0.02)
        table[len(CLASSES) : NO_CLASS] = 0
    share_embedding(transformer)
    # Only this keeps the embedding from dropping classes by itself, with randomness that no checkpoint holds.
    return transformer.eval()


def build_pipeline(vae: Path, seed: int) -> DiTPipeline:
    """The pipeline with an untrained transformer."""
    torch.manual_seed(seed)
    labels = {str(number): f"{kind} in {palette} colours" for number, (kind, palette) in enumerate(CLASSES)}
    pipeline = DiTPipeline(
        transformer=build_transformer(), vae=load_vae(vae), scheduler=build_scheduler(), id2label=labels
    )
    # DiTPipeline reads this from its configuration but does not write it there.
    pipeline.register_to_config(id2label=labels)
    return pipeline


@torch.no_grad()
def encode_heaps(vae: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents of `count` rendered pictures, (count, 12, 16, 16), and their class ids, (count,)."""
    heaps = list(itertools.islice(itertools.cycle(zoo.leaves.all_heaps().values()), count))
    pixels = torch.from_numpy(leaves.render(heaps, seed=seed)).permute(0, 3, 1, 2)
    chunks = torch.split(pixels, 50)
    latents = torch.cat([vae.encode(to_pixels(chunk, vae.device)).latent_dist.mean.cpu() for chunk in chunks])
    return latents * vae.config.scaling_factor, torch.tensor([class_of(heap) for heap in heaps])


def noise_stage(pipeline: DiTPipeline, latents: Tensor, labels: Tensor, settings: Settings) -> Stage:
    """Tell the noise in noisy latents, with times and weights as a flow would have them."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    ratio = (1 / scheduler.alphas_cumprod - 1).sqrt()
    weights = (1 + ratio).square().clamp(max=settings.largest_weight)

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.batch,)
        chosen = torch.randint(len(latents), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.no_class
        wanted = torch.exp(1.3 * torch.randn(size, generator=generator))
        time = torch.searchsorted(ratio, wanted).clamp(max=len(ratio) - 1)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        predicted = transformer(
            scheduler.add_noise(clean, noise, time).to(transformer.device),
            timestep=time.to(transformer.device),
            class_labels=torch.where(dropped, NO_CLASS, labels[chosen]).to(transformer.device),
            return_dict=False,
        )[0]
        errors = (predicted - noise.to(transformer.device)).square().mean(dim=(1, 2, 3))
        return torch.mean(errors * weights[time].to(transformer.device))

    def hidden(name: str) -> bool:
        return "_blocks." in name and ".norm" not in name

    return Stage(
        "noise", transformer, batch_loss, settings.steps, hidden, matrix_rate=0.02, other_rate=2e-3, average=0.995
    )


def train(
    checkpoints: Path,
    out: Path,
    *,
    device: torch.device,
    seed: int,
    should_stop: Callable[[int], bool] = lambda step: False,
    settings: Settings | None = None,
    vae: Path = BUNDLED["hard-flux"].directory / "vae",
) -> None:
    """Train from nothing, or resume, and save the pipeline.

    Args:
        checkpoints: directory of the checkpoint.
        out: where to save the pipeline, in diffusers format.
        device: where to train.
        seed: seed of weights, pictures and noise.
        should_stop: asked before every step.
        settings: how much to train; the default makes the model that ships.
        vae: directory of the autoencoder.

    Raises:
        Interrupted: if `should_stop` said so; the same call resumes.
    """
    settings = settings or Settings()
    pipeline = build_pipeline(vae, seed).to(device)
    latents, labels = encode_heaps(pipeline.vae, settings.pictures, seed)
    stage = noise_stage(pipeline, latents, labels, settings)
    train_stage(stage, checkpoints / "noise.pt", seed=seed + 1, should_stop=should_stop)
    save_pipeline(pipeline, out)
