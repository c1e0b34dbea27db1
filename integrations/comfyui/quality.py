"""How near pictures come to those drawn in full, in a real ComfyUI on a CPU: our nodes, EasyCache and LazyCache.

    python integrations/comfyui/quality.py COMFYUI_DIRECTORY [--model tiny-flux] [--count 16] [--calibrated 5]

Run it with the Python that ComfyUI runs with, dpcache installed. ComfyUI gets the trained transformer of a zoo model as
its own Flux, with the text embeddings of the model's own encoders. Each way draws the same held-out prompts with the
same noise, by euler on ComfyUI's noise levels "simple", and is compared with ComfyUI's pictures in full. EasyCache and
LazyCache take a threshold, not a number of evaluations: the largest is searched for with which they make at least K of
T on average for the prompts that are calibrated. They may skip in all of the run: in 15 to 95 % of it, as their nodes
suggest, they cannot make fewer than 13 of 50.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from check import known_nodes, start_comfyui, versions

STEPS, KEY_STEPS = 50, (13, 9)
FIRST_SEED = 1000
HEAD = ("evaluations", "way", "PSNR, mean (worst), dB")


class Trained:
    """A trained zoo model in ComfyUI.

    Args:
        name: of a Flux of the zoo.
    """

    def __init__(self, name: str) -> None:
        import comfy.latent_formats
        import comfy.model_patcher
        import comfy.supported_models
        import torch

        import dpcache
        from dpcache.zoo import BUNDLED

        self.zoo = BUNDLED[name]
        self.pipe = dpcache.load_pipeline(name, device="cpu")
        vae, shift = self.pipe.vae.config, self.pipe.scheduler.config.shift
        self.guidance = float(self.zoo.call_defaults.get("true_cfg_scale", 1.0))
        config = flux_config(self.pipe.transformer.config, vae.latent_channels)
        supported = comfy.supported_models.Flux({**config, "dtype": torch.float32})
        supported.sampling_settings = {"shift": math.log(shift)}  # ComfyUI has it as an exponent
        supported.latent_format = comfy.latent_formats.SD3()
        supported.latent_format.latent_channels = vae.latent_channels
        supported.latent_format.scale_factor = vae.scaling_factor
        supported.latent_format.shift_factor = vae.shift_factor
        inner = supported.get_model({}, device="cpu").eval()
        inner.diffusion_model.load_state_dict(flux_weights(self.pipe.transformer.state_dict(), config))
        cpu = torch.device("cpu")
        self.model = comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)
        side = vae.sample_size // self.pipe.vae_scale_factor
        self.shape = (vae.latent_channels, side, side)
        self._check()

    def _check(self) -> None:
        """Raises AssertionError if the network makes something else of its inputs than diffusers'."""
        import torch

        numbers = torch.Generator().manual_seed(1)
        latents = torch.randn(1, *self.shape, generator=numbers)
        ((context, more),) = self.condition("a ball")
        pooled, time, size = more["pooled_output"], torch.tensor([0.7]), self.shape
        ids = self.pipe._prepare_latent_image_ids(1, size[1] // 2, size[2] // 2, "cpu", torch.float32)
        with torch.no_grad():
            found = self.model.model.diffusion_model(latents, time, context, pooled)
            expected = self.pipe.transformer(
                self.pipe._pack_latents(latents, 1, *size),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=time,
                img_ids=ids,
                txt_ids=torch.zeros(context.shape[1], 3),
            ).sample
        difference = (self.pipe._pack_latents(found, 1, *size) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, f"ComfyUI's network is not the one of diffusers: {difference:.1e}"

    def condition(self, text: str) -> Any:
        """The CONDITIONING of a text."""
        import torch

        length = self.zoo.call_defaults["max_sequence_length"]
        with torch.no_grad():
            context, pooled, _ = self.pipe.encode_prompt(text, None, max_sequence_length=length)
        return [[context, {"pooled_output": pooled}]]

    def sigmas(self, steps: int = STEPS) -> Any:
        """ComfyUI's noise levels "simple"."""
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.model.model.model_sampling, "simple", steps)

    def draw(self, model: Any, text: str, seed: int, steps: int = STEPS) -> Any:
        """The picture of a text, of values from 0 to 1."""
        import comfy.samplers
        import torch

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.condition(text), self.condition(""))
        guider.set_cfg(self.guidance)
        noise = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(seed))
        sampler = comfy.samplers.sampler_object("euler")
        with torch.no_grad():
            latents = guider.sample(
                noise, torch.zeros_like(noise), sampler, self.sigmas(steps), disable_pbar=True, seed=seed
            )
            picture = self.pipe.vae.decode(latents).sample[0]
        return (picture / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()

    def draws(
        self, model: Any, texts: list[str], *, first_seed: int = FIRST_SEED, steps: int = STEPS
    ) -> tuple[Any, float]:
        """The pictures of texts, and how often the network was called for each, guidance taken as one call."""
        import numpy as np

        calls = []
        # EasyCache skips inside of the network: its last layer is called only in earnest.
        last = self.model.model.diffusion_model.final_layer
        watch = last.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
        try:
            pictures = [self.draw(model, text, first_seed + number, steps) for number, text in enumerate(texts)]
        finally:
            watch.remove()
        return np.stack(pictures), sum(calls) / len(texts) / (1 if self.guidance == 1 else 2)


def flux_config(config: Any, latent_channels: int) -> dict[str, Any]:
    """What ComfyUI calls the configuration of a Flux of diffusers."""
    hidden = config.num_attention_heads * config.attention_head_dim
    return {
        "image_model": "flux",
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "vec_in_dim": config.pooled_projection_dim,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": hidden,
        "mlp_ratio": 4.0,
        "num_heads": config.num_attention_heads,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": 10000,
        "patch_size": math.isqrt(config.in_channels // latent_channels),
        "qkv_bias": True,
        "guidance_embed": config.guidance_embeds,
        "txt_ids_dims": [],
    }


def flux_weights(weights: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Weights of diffusers as ComfyUI has them, by ComfyUI's own map."""
    import comfy.utils
    import torch

    found: dict[str, Any] = {}
    parts: dict[str, list[tuple[int, Any]]] = {}
    for name, target in comfy.utils.flux_to_diffusers(config).items():
        if name not in weights:  # the map knows other models of the kind as well
            continue
        if isinstance(target, str):
            found[target] = weights[name]
        elif target[1] is None:
            found[target[0]] = target[2](weights[name])
        else:  # one of several that ComfyUI has in one
            parts.setdefault(target[0], []).append((target[1][1], weights[name]))
    return found | {
        name: torch.cat([value for _, value in sorted(each, key=lambda part: part[0])]) for name, each in parts.items()
    }


def with_copies(model: Any) -> Any:
    """A clone whose network gets copies of its samples.

    EasyCache adds to them in place, which in float32 would change the sampler's own; in half precision ComfyUI makes a
    copy anyway.
    """
    clone = model.clone()
    clone.add_wrapper_with_key(
        "diffusion_model", "copies", lambda call, x, *rest, **more: call(x.clone(), *rest, **more)
    )
    return clone


def threshold_for(evaluations: int, made: Callable[[float], float]) -> float:
    """The largest threshold, to about 0.01, that leaves on average so many evaluations."""
    low, high = 0.0, 3.0  # the nodes' own limits
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if made(middle) >= evaluations else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="ComfyUI's directory")
    parser.add_argument("--model", default="tiny-flux", choices=("tiny-flux", "hard-flux"))
    parser.add_argument("--count", type=int, default=16, help="held-out prompts (default 16)")
    parser.add_argument("--calibrated", type=int, default=5, help="prompts that are calibrated (default 5)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_comfyui(asked.comfyui.resolve(), Path(folder))
        print(f"{versions()}, {asked.model}\n", flush=True)
        measure(asked.model, asked.count, asked.calibrated)


def measure(name: str, count: int, calibrated: int) -> None:
    """Prints the table."""
    import numpy as np

    from dpcache.judge.metrics import psnr

    trained = Trained(name)
    texts = trained.zoo.held_out_inputs(count)
    nodes = known_nodes()
    full, evaluations = trained.draws(trained.model, texts)
    assert evaluations == STEPS, evaluations
    print("| " + " | ".join(HEAD) + " |\n|---|---|---|")

    def row(way: str, drawn: tuple[Any, float]) -> None:
        values = [psnr(a, b) for a, b in zip(full, drawn[0], strict=True)]
        print(f"| {round(drawn[1], 1):g} of {STEPS} | {way} | {np.mean(values):.1f} ({min(values):.1f}) |", flush=True)

    (measured,) = nodes["DPCacheCalibrate"]().calibrate(trained.model, "quality", 0, -1, "add to the file")
    seen = trained.zoo.calibration_inputs(calibrated)
    trained.draws(measured, seen, first_seed=0)
    for k in KEY_STEPS:
        for way, file in ((f"calibrated with {calibrated} prompts", "quality.safetensors"), ("no calibration", "none")):
            (ours,) = nodes["DPCacheKeySteps"]().apply(trained.model, k, file)
            row(f"DPCache Key Steps, {way}", trained.draws(ours, texts))
        for name in ("EasyCache", "LazyCache"):

            def theirs(threshold: float, name: str = name) -> Any:
                return nodes[name].execute(with_copies(trained.model), threshold, 0.0, 1.0, False).args[0]

            found = threshold_for(k, lambda threshold: trained.draws(theirs(threshold), seen, first_seed=0)[1])
            row(f"{name}, threshold {found:.2f}", trained.draws(theirs(found), texts))
        row(f"{k} steps instead of {STEPS}", trained.draws(trained.model, texts, steps=k))


if __name__ == "__main__":
    sys.exit(main())
