"""Memory of cached values: measured on a pipeline, and computed from shapes for models at their published size."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

import dpcache
from dpcache.run.denoisers import find_blocks
from dpcache.run.inputs import Input, call_arguments, seeded

Row = dict[str, Any]
ORDER = 2
MEGABYTE = 1e6


def measured(pipe: Any, item: Input, num_steps: int, arguments: Mapping[str, Any]) -> Row:
    """Most bytes held in one generation of one output, for both boundaries."""
    (call,) = call_arguments([item], {"num_inference_steps": num_steps, "output_type": "latent", **arguments})
    found = {}
    for boundary in ("blocks", "output"):
        schedule = dpcache.Schedule.uniform(13, num_steps, order=ORDER, boundary=boundary)
        with dpcache.enabled(pipe, schedule):
            pipe(**seeded(pipe, call, 0))
            found[boundary] = dpcache.stats(pipe).peak_cached_bytes
    return found


def flux_dev() -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev at 1024 x 1024: 128 x 128 latents in patches of 2 x 2, 512 text tokens."""
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    return transformer, {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
    }


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo at 1280 x 720, 129 frames: 33 x 90 x 160 latents, 256 text tokens."""
    transformer = diffusers.HunyuanVideoTransformer3DModel()
    return transformer, {
        "hidden_states": torch.empty(1, 16, 33, 90, 160),
        "encoder_hidden_states": torch.empty(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1, dtype=torch.long),
        "guidance": torch.empty(1),
    }


PUBLISHED = {"FLUX.1-dev, 1024 x 1024": flux_dev, "HunyuanVideo, 1280 x 720 x 129 frames": hunyuan_video}


def published() -> list[Row]:
    """Bytes of order + 1 values in bfloat16, for both boundaries, by running the full-size models without memory."""
    rows = []
    for name, build in PUBLISHED.items():
        with torch.device("meta"), torch.no_grad():
            denoiser, inputs = build()
            (head,) = [block for block in find_blocks(denoiser) if block.head]
            streams: list[torch.Tensor] = []
            head.module.register_forward_hook(lambda *call, head=head, seen=streams: seen.extend(head.streams(call[2])))
            (output,) = denoiser(**inputs, return_dict=False)
        size = (ORDER + 1) * torch.bfloat16.itemsize
        rows.append(
            {"model": name, "blocks": sum(stream.numel() for stream in streams) * size, "output": output.numel() * size}
        )
    return rows


def table(results: Sequence[Row], sizes: Sequence[Row]) -> str:
    """The measured and the computed ones."""
    lines = [
        "At most order + 1 = 3 values a branch. Measured is the most held in one generation of one output in "
        "float32; computed is from the shapes of a full-size model's own forward pass, in bfloat16, for one "
        "branch. It is what the cache holds, not the peak of a whole call, which may lie elsewhere: for "
        "HunyuanVideo the paper reports a peak of 60.58 GB instead of 60.22.\n",
        "| model | | boundary `blocks` | boundary `output` |",
        "|---|---|---|---|",
    ]
    for row, kind in [
        *((r["memory"] | {"model": r["model"]}, "measured") for r in results),
        *((s, "computed") for s in sizes),
    ]:
        lines.append(
            f"| {row['model']} | {kind} | {row['blocks'] / MEGABYTE:.3f} MB | {row['output'] / MEGABYTE:.3f} MB |"
        )
    return "\n".join(lines) + "\n"
