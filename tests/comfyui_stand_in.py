"""A stand-in for the parts of ComfyUI that custom nodes meet, in its words, around any network.

Written anew after the public repository Comfy-Org/ComfyUI (formerly comfyanonymous/ComfyUI):

| here | there | commit read |
|---|---|---|
| `WrapperExecutor`, `copy_nested_dicts`, `merge_nested_dicts` | comfy/patcher_extension.py | 06ce62de4b2a |
| `ModelPatcher` | comfy/model_patcher.py | 08d0e510f4e5 |
| `CFGGuider`, `KSAMPLER`, `calc_cond_batch`, `sampling_function` | comfy/samplers.py | e0d4ea77a9f6 |
| wrappers of a model put into its options | comfy/sampler_helpers.py, `prepare_model_patcher` | |
| `BaseModel` | comfy/model_base.py | 003617c441f2 |
| `CONST`, `EPS` and their levels | comfy/model_sampling.py | 2fd2083913be |
| `sample_*` | comfy/k_diffusion/sampling.py, after Karras et al., arXiv 2206.00364 | |
| `folder_paths` | folder_paths.py | |

Left out is what no wrapper sees: weights and where they are, areas, masks, hooks, control networks. What matters here
is kept: wrappers see what they see there, with the same arguments in the same places; conditions are joined from the
last to the first while memory allows, so `cond_or_uncond` is [1, 0]; options are copied as dicts and lists, everything
else by reference; `apply_model` returns the denoised sample, and the samplers step along (x - denoised) / sigma.
"""

import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def copy_nested_dicts(given: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: copy_nested_dicts(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
        for key, value in given.items()
    }


def merge_nested_dicts(into: dict[Any, Any], more: dict[Any, Any]) -> dict[Any, Any]:
    for key, value in more.items():
        if isinstance(value, dict):
            merge_nested_dicts(into.setdefault(key, {}), value)
        elif isinstance(value, list):
            into.setdefault(key, []).extend(value)
        else:
            into[key] = value
    return into


class WrapperExecutor:
    """Calls wrappers from the outermost inwards, and the original last."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)


def wrapped(original: Callable[..., Any], class_obj: Any, kind: str, transformer_options: dict[str, Any]) -> Any:
    of_kind = transformer_options.get("wrappers", {}).get(kind, {})
    return WrapperExecutor(original, class_obj, [wrapper for some in of_kind.values() for wrapper in some]).execute


class ModelPatcher:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.object_patches: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}
        #: Elements of a batch that fit; ComfyUI asks the device.
        self.free_memory: float = 1e9

    def clone(self) -> "ModelPatcher":
        other = ModelPatcher(self.model)
        other.model_options = copy_nested_dicts(self.model_options)
        other.wrappers = copy_nested_dicts(self.wrappers)
        other.object_patches = dict(self.object_patches)
        other.backup = self.backup
        other.free_memory = self.free_memory
        return other

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, wrapper_type: str, key: str) -> list[Callable[..., Any]]:
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))

    def add_object_patch(self, name: str, patched: Any) -> None:
        self.object_patches[name] = patched

    def set_model_unet_function_wrapper(self, unet_wrapper_function: Callable[..., Any]) -> None:
        self.model_options["model_function_wrapper"] = unet_wrapper_function


def _levels(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sigma.view(sigma.shape[:1] + (1,) * (like.ndim - 1))


class CONST:
    """Flow matching: the level is the share of noise, and the network returns noise minus data."""

    def calculate_input(self, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - output * _levels(sigma, output)

    def noise_scaling(self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return sigma * noise + (1 - sigma) * latent


class EPS:
    """The level is the ratio of noise to data, and the network returns the noise."""

    def calculate_input(self, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x / (_levels(sigma, x) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x - output * _levels(sigma, output)

    def noise_scaling(self, sigma: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return noise * (1 + sigma**2) ** 0.5 + latent


class ModelSamplingDiscreteFlow(CONST):
    def __init__(self, shift: float) -> None:
        share = torch.arange(1, 1001) / 1000
        self.sigmas = shift * share / (1 + (shift - 1) * share)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * 1000


class ModelSamplingDiscrete(EPS):
    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).float()


class BaseModel(nn.Module):
    """A network called with `x, timestep, context=, control=, transformer_options=` and conditions, and its levels."""

    def __init__(self, diffusion_model: nn.Module, model_sampling: Any, unet_config: dict[str, Any]) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, model_sampling
        self.model_config = types.SimpleNamespace(unet_config=unet_config)
        self.current_patcher: Any = None

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> torch.Tensor:
        call = wrapped(self._apply_model, self, "apply_model", transformer_options)
        return call(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any,
        c_crossattn: Any,
        control: Any,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> torch.Tensor:
        given = self.model_sampling.calculate_input(t, x)
        output = self.diffusion_model(
            given,
            self.model_sampling.timestep(t).float(),
            context=c_crossattn,
            control=control,
            transformer_options=transformer_options,
            **kwargs,
        )
        return self.model_sampling.calculate_denoised(t, output.float(), x)

    def memory_required(self, input_shape: list[int]) -> float:
        return float(torch.Size(input_shape).numel())


def calc_cond_batch(model: Any, conds: list[Any], x_in: torch.Tensor, timestep: Any, model_options: Any) -> list[Any]:
    """The denoised sample for every list of conditions; equal ones are computed in one batch, if there is room."""
    totals = [torch.zeros_like(x_in) for _ in conds]
    counts = [torch.full_like(x_in, 1e-37) for _ in conds]
    to_run = [
        (cond, index)
        for index, some in enumerate(conds)
        for cond in some or ()
        if not timestep[0] > cond.get("timestep_start", float("inf"))
    ]
    while to_run:
        first = to_run[0][0]["model_conds"]
        alike = [
            number
            for number, (cond, _) in enumerate(to_run)
            if {name: value.shape for name, value in cond["model_conds"].items()}
            == {name: value.shape for name, value in first.items()}
        ]
        alike.reverse()
        batch = alike[:1]
        for parts in range(1, len(alike) + 1):
            some = alike[: len(alike) // parts]
            shape = [len(some) * x_in.shape[0], *x_in.shape[1:]]
            if model.memory_required(shape) * 1.5 < model.current_patcher.free_memory:
                batch = some
                break
        taken = [to_run.pop(number) for number in batch]
        cond_or_uncond = [index for _, index in taken]
        c: dict[str, Any] = {
            name: torch.cat([cond["model_conds"][name].expand(x_in.shape[0], *value.shape[1:]) for cond, _ in taken])
            for name, value in first.items()
        }
        options = merge_nested_dicts({}, model_options.get("transformer_options", {}))
        options["cond_or_uncond"] = cond_or_uncond[:]
        options["uuids"] = [cond["uuid"] for cond, _ in taken]
        options["sigmas"] = timestep
        c["transformer_options"] = options
        x, t = torch.cat([x_in] * len(taken)), torch.cat([timestep] * len(taken))
        if "model_function_wrapper" in model_options:
            given = {"input": x, "timestep": t, "c": c, "cond_or_uncond": cond_or_uncond}
            output = model_options["model_function_wrapper"](model.apply_model, given)
        else:
            output = model.apply_model(x, t, **c)
        for index, chunk in zip(cond_or_uncond, output.chunk(len(taken)), strict=True):
            totals[index] += chunk
            counts[index] += 1
    return [total / count for total, count in zip(totals, counts, strict=True)]


def sampling_function(
    model: Any, x: torch.Tensor, timestep: Any, uncond: Any, cond: Any, cond_scale: float, model_options: Any
) -> torch.Tensor:
    conds = [cond, None if cond_scale == 1.0 else uncond]
    denoised, without = calc_cond_batch(model, conds, x, timestep, model_options)
    given = {"uncond_denoised": without if conds[1] is not None else denoised, "cond_denoised": denoised}
    if conds[1] is not None:
        denoised = without + (denoised - without) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function({**given, "denoised": denoised, "sigma": timestep, "input": x})
    return denoised


class KSAMPLER:
    def __init__(self, sampler_function: Callable[..., torch.Tensor]) -> None:
        self.sampler_function = sampler_function

    def sample(
        self,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: Any,
        callback: Any,
        noise: Any,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Any:
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        total = len(sigmas) - 1

        def told(state: dict[str, Any]) -> None:
            if callback is not None:
                callback(state["i"], state["denoised"], state["x"], total)

        return self.sampler_function(guider, x, sigmas, extra_args=extra_args, callback=told)


class CFGGuider:
    def __init__(self, model_patcher: ModelPatcher) -> None:
        self.model_patcher = model_patcher
        self.model_options = model_patcher.model_options
        self.cfg = 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, model_options: Any, seed: Any = None) -> torch.Tensor:
        call = wrapped(self.predict_noise, self, "predict_noise", self.model_options["transformer_options"])
        return call(x, timestep, model_options, seed)

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> torch.Tensor:
        negative, positive = self.conds["negative"], self.conds["positive"]
        return sampling_function(self.inner_model, x, timestep, negative, positive, self.cfg, model_options)

    def inner_sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, callback: Any, seed: Any) -> Any:
        options = copy_nested_dicts(self.model_options)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        extra_args = {"model_options": options, "seed": seed}
        call = wrapped(sampler.sample, sampler, "sampler_sample", options["transformer_options"])
        return call(self, sigmas, extra_args, callback, noise, latent_image, None, True)

    def outer_sample(
        self,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: Any = None,
    ) -> Any:
        self.inner_model = self.model_patcher.model
        self.inner_model.current_patcher = self.model_patcher
        return self.inner_sample(noise, latent_image, sampler, sigmas, callback, seed)

    @torch.no_grad()
    def sample(
        self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, callback: Any = None, seed: Any = None
    ) -> Any:
        before = self.model_options
        self.model_options = copy_nested_dicts(before)
        self.model_options["transformer_options"]["wrappers"] = copy_nested_dicts(self.model_patcher.wrappers)
        try:
            call = wrapped(self.outer_sample, self, "outer_sample", self.model_options["transformer_options"])
            return call(noise, latent_image, sampler, sigmas, None, callback, True, seed)
        finally:
            self.model_options = before


def condition(**model_conds: torch.Tensor) -> list[dict[str, Any]]:
    """One CONDITIONING: tensors by the names under which the model takes them, for a batch of one."""
    return [{"uuid": uuid.uuid4(), "model_conds": model_conds}]


# ------------------------------------------------------------------------------------------------- levels and samplers


def simple_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    stride = len(model_sampling.sigmas) / steps
    return torch.tensor([float(model_sampling.sigmas[-(1 + int(n * stride))]) for n in range(steps)] + [0.0])


def karras_scheduler(model_sampling: Any, steps: int, rho: float = 7.0) -> torch.Tensor:
    high, low = (float(model_sampling.sigmas[at]) ** (1 / rho) for at in (-1, 0))
    return torch.tensor([(high + n / (steps - 1) * (low - high)) ** rho for n in range(steps)] + [0.0])


def _told(callback: Any, i: int, x: Any, sigma: Any, denoised: Any) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


def sample_euler(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **(extra_args or {}))
        _told(callback, i, x, sigmas[i], denoised)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **(extra_args or {}))
        _told(callback, i, x, sigmas[i], denoised)
        d, dt = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            ahead = x + d * dt
            again = model(ahead, sigmas[i + 1] * s_in, **(extra_args or {}))
            x = x + (d + (ahead - again) / sigmas[i + 1]) / 2 * dt
    return x


def sample_dpm_2(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **(extra_args or {}))
        _told(callback, i, x, sigmas[i], denoised)
        d = (x - denoised) / sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * (sigmas[i + 1] - sigmas[i])
        else:
            between = sigmas[i].log().lerp(sigmas[i + 1].log(), 0.5).exp()
            middle = x + d * (between - sigmas[i])
            again = model(middle, between * s_in, **(extra_args or {}))
            x = x + (middle - again) / between * (sigmas[i + 1] - sigmas[i])
    return x


def sample_offset(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
    """As dpmpp_2m_sde and its kin on flow matching: it begins beside all noise, whose logarithm is infinite."""
    sigmas = sigmas.clone()
    sigmas[0] = min(float(sigmas[0]), 0.99997)
    return sample_euler(model, x, sigmas, extra_args, callback)


def sample_euler_cfg_pp(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None) -> Any:
    """Steps along the unconditional output, which it gets by a function of its own after guidance."""
    seen: list[torch.Tensor] = []

    def watch(given: dict[str, Any]) -> torch.Tensor:
        seen.append(given["uncond_denoised"])
        return given["denoised"]

    options = dict((extra_args or {})["model_options"])
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), watch]
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, options)
        _told(callback, i, x, sigmas[i], denoised)
        x = denoised + (x - seen[-1]) / sigmas[i] * sigmas[i + 1]
    return x


def folder_paths(models_dir: Path) -> types.ModuleType:
    """ComfyUI's module of this name: kinds of model files and the folders they are in."""
    module = types.ModuleType("folder_paths")
    module.models_dir = str(models_dir)  # type: ignore[attr-defined]
    known: dict[str, tuple[list[str], set[str]]] = {}
    module.folder_names_and_paths = known  # type: ignore[attr-defined]

    def get_filename_list(kind: str) -> list[str]:
        folders, suffixes = known[kind]
        files = [path for folder in folders if Path(folder).is_dir() for path in Path(folder).iterdir()]
        return sorted(path.name for path in files if path.suffix in suffixes)

    def add_model_folder_path(kind: str, folder: str, is_default: bool = False) -> None:
        folders, _ = known.setdefault(kind, ([], set()))
        if folder not in folders:
            folders.insert(0 if is_default else len(folders), folder)

    def get_folder_paths(kind: str) -> list[str]:
        return known[kind][0][:]

    def get_full_path(kind: str, name: str) -> str | None:
        return next((str(path) for folder in known[kind][0] if (path := Path(folder) / name).is_file()), None)

    for function in (get_filename_list, get_full_path, add_model_folder_path, get_folder_paths):
        setattr(module, function.__name__, function)
    return module
