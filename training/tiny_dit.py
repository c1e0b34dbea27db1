"""`tiny-dit`: a small genuine DiTPipeline that draws coloured shapes by class, and how it is trained.

One stage: the transformer, by noise prediction (Ho et al., "Denoising Diffusion Probabilistic Models", 2020) on the
latents of the autoencoder of `tiny-flux`, which serves here as it is.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from dpcache.zoo import BUNDLED, classes, shapes
from training.stages import Stage, train_stage

NO_CLASS = 1000
"""What DiTPipeline gives in place of a class for guidance, whatever the number of classes."""


@dataclass(frozen=True)
class Settings:
    """How much to train."""

    pictures: int = 32_256
    """Rendered once; every scene of the classes appears eight times."""
    steps: int = 3_600
    batch: int = 128
    no_class: float = 0.1
    """Fraction of classes dropped, so that classifier-free guidance works."""
    largest_weight: float = 20.0
    """Of the weight 1 / alpha_bar of a time, which makes errors of the noise count like errors of the velocity."""


def load_vae() -> AutoencoderKL:
    """The trained autoencoder of `tiny-flux`.

    Its shift goes: DiTPipeline knows only the scale. It is a fortieth of the latents' deviation, so they stay of about
    zero mean and unit variance.
    """
    vae = AutoencoderKL.from_pretrained(BUNDLED["tiny-flux"].directory / "vae")
    vae.register_to_config(shift_factor=None)
    return vae


def build_transformer() -> DiTTransformer2DModel:
    """An untrained denoiser: 6 blocks of width 128 on 16 patches of 2x2 latent pixels."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,  # DiTPipeline divides what stands here, even where None would mean the same
        num_layers=6,
        sample_size=8,
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
        table[len(classes.CLASSES) : NO_CLASS] = 0
    share_embedding(transformer)
    # Only this keeps the embedding from dropping classes by itself, with randomness that no checkpoint holds.
    return transformer.eval()


def share_embedding(transformer: DiTTransformer2DModel) -> None:
    """Let all blocks use the first one's embedding of time and class: DiT has one, diffusers one a block."""
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb


def build_pipeline(seed: int) -> DiTPipeline:
    """The pipeline with an untrained transformer."""
    torch.manual_seed(seed)
    labels = {str(number): one.caption for number, one in enumerate(classes.CLASSES)}
    pipeline = DiTPipeline(
        transformer=build_transformer(),
        vae=load_vae(),
        # Less noise than DiT's own schedule, which would destroy pictures this small in the first half of the times.
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        id2label=labels,
    )
    # DiTPipeline reads this from its configuration but does not write it there.
    pipeline.register_to_config(id2label=labels)
    return pipeline


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents of `count` rendered pictures, (count, 8, 8, 8), about of unit variance, and their class ids, (count,)."""
    scenes = classes.all_scenes()
    chosen = [scenes[row % len(scenes)] for row in range(count)]
    pixels = torch.from_numpy(shapes.render(chosen, seed=seed)).permute(0, 3, 1, 2)
    chunks = [chunk.to(vae.device).float() / 127.5 - 1 for chunk in torch.split(pixels, 250)]
    latents = torch.cat([vae.encode(chunk).latent_dist.mean.cpu() for chunk in chunks])
    return latents * vae.config.scaling_factor, torch.tensor([classes.class_of(scene) for scene in chosen])


def noise_stage(pipeline: DiTPipeline, latents: Tensor, labels: Tensor, settings: Settings) -> Stage:
    """Tell the noise in noisy latents, with more weight on the noisy times.

    There the picture is decided, yet the noise is told nearly right by repeating the input: of an even weight most
    would go to times at which everything is visible already.
    """
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    times = scheduler.config.num_train_timesteps
    weights = (1 / scheduler.alphas_cumprod).clamp(max=settings.largest_weight)
    weights /= weights.mean()

    def batch_loss(generator: torch.Generator) -> Tensor:
        size = (settings.batch,)
        chosen = torch.randint(len(latents), size, generator=generator)
        dropped = torch.rand(size, generator=generator) < settings.no_class
        time = torch.randint(times, size, generator=generator)
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


def save_pipeline(pipeline: DiTPipeline, directory: Path) -> None:
    """Write the diffusers directory, transformer and autoencoder in float16."""
    pipeline = copy.deepcopy(pipeline).to("cpu")
    for block in pipeline.transformer.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    for model in (pipeline.transformer, pipeline.vae):
        model.half()
    pipeline.save_pretrained(directory)


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
        checkpoints: directory of the checkpoint.
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
    latents, labels = encode_scenes(pipeline.vae, settings.pictures, seed)
    stage = noise_stage(pipeline, latents, labels, settings)
    train_stage(stage, checkpoints / "noise.pt", seed=seed + 1, should_stop=should_stop)
    save_pipeline(pipeline, out)
