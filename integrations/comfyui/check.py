"""Runs the nodes in a real ComfyUI on a CPU, with tiny random models, and prints what worked.

    python integrations/comfyui/check.py COMFYUI_DIRECTORY [--families flux wan ...] [--samplers euler ...]

Run it with the Python that ComfyUI runs with, dpcache installed. It downloads nothing and leaves ComfyUI's folder as it
is. For every family, sampler and guidance it draws three times: without DPCache, with a schedule of K of T steps, and
with one of T of T. From the first it counts how often the sampler evaluates the model. A sampler of one evaluation a
step has to make K of them, any other all of them, with the same bits as without DPCache and a word that says so. With
T of T steps all must give the same bits. Ends with 1 if anything was otherwise.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, KEYS = 8, 4
GUIDANCE = (1.0, 3.0)
#: Samplers that all families run; the first family of every kind of prediction runs all that ComfyUI lists.
USUAL = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "res_multistep", "uni_pc", "heun")
#: Each family by ComfyUI's class for it, the configuration of a tiny network, and the shape of its latents.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "flux": (
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 32,
            "context_in_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        (16, 8, 8),
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "input_size": None,
            "depth": 1,
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 32, "out_features": 64},
            },
            "qk_norm": None,
            "pos_embed_scaling_factor": None,
        },
        (16, 8, 8),
    ),
    "wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 32,
            "ffn_dim": 64,
            "freq_dim": 32,
            "text_dim": 32,
            "num_heads": 2,
            "num_layers": 1,
        },
        (16, 5, 8, 8),
    ),
    "qwen-image": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        (16, 1, 8, 8),
    ),
    "lumina2": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "in_channels": 16,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "multiple_of": 16,
            "cap_feat_dim": 32,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 64, 64),
            "qk_norm": True,
        },
        (16, 8, 8),
    ),
    "sdxl": (
        "SDXL",
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 32,
            "num_classes": "sequential",
            "adm_in_channels": 1568,
            "use_linear_in_transformer": True,
            "use_spatial_transformer": True,
            "legacy": False,
            "num_heads": -1,
            "num_head_channels": 16,
            "use_temporal_attention": False,
        },
        (4, 8, 8),
    ),
}


def main() -> int:
    """Checks, prints, and says whether all was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="ComfyUI's directory")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--samplers", nargs="+", help="of ComfyUI's; all by default, where a family runs all")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_comfyui(asked.comfyui.resolve(), Path(folder))
        print(versions(), end="\n\n")
        failed = drawings(asked.families, asked.samplers)
        failed += list(uses(Path(folder)))
    print(f"\n{len(failed)} of the above are not as they should be." if failed else "\nAll as it should be.")
    return 1 if failed else 0


def start_comfyui(directory: Path, folder: Path) -> None:
    """Imports ComfyUI as its main.py would, on the CPU, with models in the folder and without its own nodes."""
    if not (directory / "comfy").is_dir():
        raise SystemExit(f"{directory} is not ComfyUI's directory: it has no folder comfy.")
    (folder / "models").mkdir()
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder)]
    sys.path.insert(0, str(directory))
    import comfy.options

    comfy.options.enable_args_parsing()
    logging.disable(logging.WARNING)  # of ComfyUI, about what it cannot do here
    import comfy.samplers
    import torch

    logging.disable(logging.NOTSET)
    torch.set_num_threads(1)


def versions() -> str:
    """Of what is checked."""
    import comfyui_version
    import torch

    import dpcache

    return f"ComfyUI {comfyui_version.__version__}, dpcache {dpcache.__version__}, torch {torch.__version__}"


class Family:
    """A tiny model of one family, with random weights, and pictures drawn with it."""

    def __init__(self, name: str) -> None:
        import comfy.model_patcher
        import comfy.supported_models
        import torch
        from comfy.ldm.flux.model import FluxParams

        kind, config, self.shape = FAMILIES[name]
        if name == "flux":  # later releases know more of it
            known = {"image_model", *(field.name for field in fields(FluxParams))}
            config = {key: value for key, value in config.items() if key in known}
        torch.manual_seed(0)
        supported = getattr(comfy.supported_models, kind)({**config, "dtype": torch.float32})
        inner = supported.get_model({}, device="cpu")
        network = inner.diffusion_model
        # A checkpoint would fill these buffers, too; ComfyUI leaves in them whatever the memory held.
        filled = [pair for pair in network.named_buffers() if pair[0] == "pos_embed"]
        for tensor_name, tensor in [*network.named_parameters(), *filled]:
            tensor.data.normal_(1.0 if "norm" in tensor_name and tensor.ndim == 1 else 0.0, 0.15)
        cpu = torch.device("cpu")
        self.name, self.inner = name, inner.eval()
        self.model = comfy.model_patcher.ModelPatcher(self.inner, load_device=cpu, offload_device=cpu)
        self.calls = 0
        self.inner.diffusion_model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    @property
    def is_flow(self) -> bool:
        """Whether noise levels are shares of noise."""
        return "CONST" in {kind.__name__ for kind in type(self.inner.model_sampling).__mro__}

    def condition(self, seed: int) -> Any:
        """A CONDITIONING of random numbers."""
        import torch

        numbers = torch.Generator().manual_seed(seed)
        context = torch.randn(1, 6, 32, generator=numbers)
        more = {"attention_mask": torch.ones(1, 6, dtype=torch.long)} if self.name == "lumina2" else {}
        return [[context, {"pooled_output": torch.randn(1, 32, generator=numbers), "guidance": 3.5, **more}]]

    def sigmas(self, steps: int = STEPS, scheduler: str = "simple") -> Any:
        """The noise levels of one of ComfyUI's schedulers."""
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.inner.model_sampling, scheduler, steps)

    def draw(self, model: Any = None, sampler: str = "euler", guidance: float = 1.0, **more: Any) -> Any:
        """The latents that KSampler would return."""
        import comfy.samplers
        import torch

        guider = comfy.samplers.CFGGuider(model or self.model)
        guider.set_conds(self.condition(1), self.condition(2))
        guider.set_cfg(guidance)
        shape = more.get("shape", self.shape)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(4)
        sigmas = more["sigmas"] if "sigmas" in more else self.sigmas()
        latents = more.get("latents", torch.zeros(1, *shape))
        chosen = comfy.samplers.sampler_object(sampler)
        self.calls = 0
        with torch.no_grad():
            return guider.sample(noise, latents, chosen, sigmas, disable_pbar=True, seed=5)

    def levels(self, sampler: str, guidance: float) -> tuple[Any, list[float]]:
        """Latents without DPCache, and the noise levels at which the sampler evaluated the model."""
        watched, seen = self.model.clone(), []

        def watch(executor: Any, x: Any, timestep: Any, *rest: Any, **more: Any) -> Any:
            seen.append(float(timestep[0]))
            return executor(x, timestep, *rest, **more)

        watched.add_wrapper_with_key("predict_noise", "check", watch)
        return self.draw(watched, sampler, guidance), seen


@contextmanager
def told() -> Iterator[list[str]]:
    """What DPCache says meanwhile: in the log, and as warnings."""
    import warnings

    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("dpcache"), Keep()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            said.extend(str(warning.message) for warning in caught)


def one_drawing(family: Family, sampler: str, guidance: float) -> tuple[str, bool]:
    """What came of one family, sampler and guidance: in a word, and whether it is as it should be."""
    import torch

    import dpcache
    from dpcache.integrations.comfyui import apply

    expected, levels = family.levels(sampler, guidance)
    each = family.calls / len(levels)
    if not bool(expected.isfinite().all()):
        return "no numbers", False  # ComfyUI itself makes none here, so nothing was checked
    if not torch.equal(expected, family.draw(None, sampler, guidance)):
        return "not repeatable", False
    all_keys = dpcache.Schedule.smooth(STEPS, STEPS, boundary="output")
    same = torch.equal(expected, family.draw(apply(family.model, all_keys), sampler, guidance))
    followed = apply(family.model, dpcache.Schedule.smooth(KEYS, STEPS, boundary="output"))
    with told() as said:
        found = family.draw(followed, sampler, guidance)
    evaluations = family.calls / each
    if not same:
        return f"T of T differs ({evaluations:g})", False
    # Some samplers make T evaluations, but between the levels: these are to be computed in full.
    at_levels = all(abs(a - b) < 1e-3 * b for a, b in zip(levels, family.sigmas().tolist(), strict=False))
    if len(levels) == STEPS and at_levels:
        return f"{evaluations:g} of {STEPS}", evaluations == KEYS and bool(found.isfinite().all())
    right = torch.equal(found, expected) and any("in full" in text for text in said)
    return f"full ({len(levels)})" if right else f"{evaluations:g} of {len(levels)}", right


def drawings(families: list[str], samplers: list[str] | None) -> list[str]:
    """Prints the table of families, samplers and guidance; returns what is wrong in it."""
    import comfy.samplers

    kinds: dict[bool, str] = {}
    ran: dict[str, dict[str, str]] = {}
    failed = []
    for name in families:
        family = Family(name)
        runs_all = kinds.setdefault(family.is_flow, name) == name
        for sampler in samplers or (comfy.samplers.SAMPLER_NAMES if runs_all else USUAL):
            for guidance in GUIDANCE:
                try:
                    word, right = one_drawing(family, sampler, guidance)
                except Exception as error:  # ComfyUI's samplers may raise anything; the table shows it
                    word, right = f"{type(error).__name__}: {error}"[:60], False
                ran.setdefault(sampler, {}).setdefault(name, "")
                before = ran[sampler][name]
                shown = word if right else f"**{word}**"
                ran[sampler][name] = shown if before in ("", shown) else f"{before}, {shown}"
                if not right:
                    failed.append(f"{name}, {sampler}, guidance {guidance:g}: {word}")
    print(f"Evaluations with K = {KEYS} of T = {STEPS}; one figure where guidance {GUIDANCE[0]:g} and {GUIDANCE[1]:g}")
    print("give the same. T of T steps gave the same bits as ComfyUI everywhere else than where it says so.\n")
    print("| sampler | " + " | ".join(families) + " |")
    print("|---" * (len(families) + 1) + "|")
    for sampler, row in ran.items():
        print(f"| {sampler} | " + " | ".join(row.get(name, "") for name in families) + " |")
    return failed


def uses(folder: Path) -> Iterator[str]:
    """Prints what was tried beside plain drawings; returns what went wrong."""
    print("\n| what | found |\n|---|---|")
    for check in CHECKS:
        try:
            found, right = check(folder), True
        except Exception as error:  # the table shows it, whatever it is
            found, right = f"{type(error).__name__}: {error}".splitlines()[0][:150], False
        print(f"| {(check.__doc__ or '').splitlines()[0].rstrip('.')} | {found if right else f'**{found}**'} |")
        if not right:
            yield check.__name__


def node_module(folder: Path) -> Any:
    """The nodes, loaded by ComfyUI's own loader."""
    import nodes

    if "DPCacheApply" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(HERE))), "ComfyUI could not load the nodes"
    return nodes.NODE_CLASS_MAPPINGS


def nodes_load(folder: Path) -> str:
    """ComfyUI loads the nodes."""
    names = [name for name in node_module(folder) if name.startswith("DPCache")]
    return ", ".join(names)


def workflows(folder: Path) -> str:
    """The templates are as the frontend saves them, with a small picture each, and name nodes that there are."""
    import nodes

    known = node_module(folder)
    found = sorted((HERE / "example_workflows").glob("*.json"))
    for path in found:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert {"nodes", "links", "version"} <= workflow.keys(), f"{path.name} is not as the frontend saves it"
        for node in workflow["nodes"]:
            if node["type"] in known and node["type"].startswith("DPCache"):
                required = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
                names = [one["name"] for one in node["inputs"] if one.get("widget")]
                assert names == [name for name in required if name != "model"], f"{path.name}: {names}"
                assert len(names) == len(node["widgets_values"]), f"{path.name}: {node['widgets_values']}"
        picture = path.with_suffix(".jpg")
        assert picture.exists() and picture.stat().st_size < 60_000, f"{path.name} has no small picture"
    return ", ".join(path.stem for path in found)


CHECKS: list[Callable[[Path], str]] = [nodes_load, workflows]

if __name__ == "__main__":
    sys.exit(main())
