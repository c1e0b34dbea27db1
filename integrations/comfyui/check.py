"""Runs the nodes in a real ComfyUI on a CPU, with tiny random models, and prints what worked.

    python integrations/comfyui/check.py COMFYUI_DIRECTORY [--families flux wan ...] [--samplers euler ...] [--uses]

Run it with the Python that ComfyUI runs with, dpcache installed. It downloads nothing and leaves ComfyUI's folder as it
is. For every family, sampler and guidance it draws three times: without DPCache, with a schedule of K of T steps, and
with one of T of T. From the first it counts how often the sampler evaluates the model. A sampler of one evaluation a
step has to make K of them, any other all of them, with the same bits as without DPCache and a word that says so. With
T of T steps all must give the same bits. Then it queues workflows to ComfyUI's executor, with all that was ever found
to go wrong there. Ends with 1 if anything was otherwise.
"""

import argparse
import asyncio
import copy
import inspect
import json
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, KEYS = 8, 4
GUIDANCE = (1.0, 3.0)
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
    parser.add_argument("--uses", action="store_true", help="without the table of samplers")
    parser.add_argument("--samplers", nargs="+", help="of ComfyUI's; all by default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_comfyui(asked.comfyui.resolve(), Path(folder))
        print(versions(), end="\n\n")
        failed = [] if asked.uses else drawings(asked.families, asked.samplers)
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
    # What ComfyUI says of what it cannot do here is of no interest; what dpcache says is.
    logging.getLogger().setLevel(logging.ERROR)
    import comfy.samplers
    import torch
    from utils.extra_config import load_extra_path_config

    torch.set_num_threads(1)
    paths = folder / "extra_model_paths.yaml"
    paths.write_text(f"comfyui:\n  base_path: {folder}\n  dpcache: schedules\n", encoding="utf-8")
    load_extra_path_config(str(paths))


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
    """What dpcache says in the log meanwhile."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("dpcache"), Keep()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield said
    finally:
        log.removeHandler(handler)


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

    found: dict[str, list[str]] = {name: [] for name in samplers or comfy.samplers.SAMPLER_NAMES}
    failed = []
    for name in families:
        family = Family(name)
        for sampler, cells in found.items():
            words = []
            for guidance in GUIDANCE:
                try:
                    word, right = one_drawing(family, sampler, guidance)
                except Exception as error:  # ComfyUI's samplers may raise anything; the table shows it
                    word, right = f"{type(error).__name__}: {error}"[:60], False
                words.append(word if right else f"**{word}**")
                if not right:
                    failed.append(f"{name}, {sampler}, guidance {guidance:g}: {word}")
            cells.append(words[0] if len(set(words)) == 1 else ", ".join(words))
    print(f"Evaluations with K = {KEYS} of T = {STEPS}; one figure where guidance {GUIDANCE[0]:g} and {GUIDANCE[1]:g}")
    print("give the same. T of T steps gave the same bits as ComfyUI everywhere else than where it says so.\n")
    print("| samplers | " + " | ".join(families) + " |")
    print("|---" * (len(families) + 1) + "|")
    alike: dict[tuple[str, ...], list[str]] = {}
    for sampler, cells in found.items():
        alike.setdefault(tuple(cells), []).append(sampler)
    for cells, names in alike.items():
        print(f"| {', '.join(names)} | {' | '.join(cells)} |")
    return failed


def uses(folder: Path) -> Iterator[str]:
    """Prints what was tried beside plain drawings, mostly by ComfyUI's executor; returns what went wrong."""
    print("\n| what | found |\n|---|---|")
    workshop = Workshop(folder)
    for check in CHECKS:
        try:
            found, right = check(workshop), True
        except Exception as error:  # the table shows it, whatever it is
            found, right = f"{type(error).__name__}: {error}".splitlines()[0][:300], False
        print(f"| {(check.__doc__ or '').splitlines()[0].rstrip('.')} | {found if right else f'**{found}**'} |")
        if not right:
            yield check.__name__


def known_nodes() -> dict[str, Any]:
    """ComfyUI's nodes by their names, ours loaded by its own loader."""
    import nodes

    if "DPCacheApply" not in nodes.NODE_CLASS_MAPPINGS:
        assert asyncio.run(nodes.load_custom_node(str(HERE))), "ComfyUI could not load the nodes"
        for name in ("nodes_easycache", "nodes_context_windows", "nodes_model_advanced"):
            extra = Path(nodes.__file__).parent / "comfy_extras" / f"{name}.py"
            assert asyncio.run(nodes.load_custom_node(str(extra), module_parent="comfy_extras")), name
        nodes.NODE_CLASS_MAPPINGS.update(HANDED_IN)
    return nodes.NODE_CLASS_MAPPINGS


class Server:
    """What ComfyUI's executor and the nodes want of its server."""

    client_id = last_node_id = None

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}

    def send_sync(self, *_: Any) -> None:
        """Nobody is connected."""

    def send_progress_text(self, text: str, node_id: str, sid: Any = None) -> None:
        self.shown[node_id] = text


KEPT: dict[str, Any] = {}
#: One model of each family, as a server keeps what it has loaded.
loaded = cache(Family)


class CheckModel:
    """The tiny model of a family."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"family": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "check"

    def make(self, family: str) -> tuple[Any]:
        return (loaded(family).model,)


class CheckText:
    """Random numbers instead of a text."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"family": ("STRING", {}), "number": ("INT", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "check"

    def make(self, family: str, number: int) -> tuple[Any]:
        return (loaded(family).condition(number),)


class CheckLatent:
    """An empty latent picture of a family."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "family": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "check"

    def make(self, model: Any, family: str) -> tuple[Any]:
        import torch

        return ({"samples": torch.zeros(1, *loaded(family).shape)},)


class CheckKeep:
    """Keeps what was drawn."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",), "name": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "check", True

    def keep(self, latent: Any, name: str) -> dict[str, Any]:
        KEPT[name] = latent["samples"]
        return {}


HANDED_IN = {kind.__name__: kind for kind in (CheckModel, CheckText, CheckLatent, CheckKeep)}


class Workshop:
    """ComfyUI's own executor: prompts are validated, cached and run as when they are queued."""

    def __init__(self, folder: Path) -> None:
        import folder_paths
        import server

        known_nodes()
        self.folder, self.server = folder, Server()
        server.PromptServer.instance = self.server
        self.home = Path(folder_paths.get_folder_paths("dpcache")[0])
        self._number = 0
        self.restart()

    def restart(self) -> None:
        """ComfyUI drops every node from its cache."""
        import execution

        known = inspect.signature(execution.PromptExecutor).parameters
        sizes = {"cache_args": defaultdict(int)} if "cache_args" in known else {}
        self._executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, **sizes)

    def validated(self, prompt: dict[str, Any]) -> Any:
        """Whether ComfyUI accepts a prompt, and its outputs."""
        import execution

        valid, error, outputs, errors = asyncio.run(execution.validate_prompt("check", prompt, None))
        return valid, outputs, error, errors

    def queue(
        self, *ours: tuple[str, dict[str, Any]], family: str = "flux", second: bool = False, **sampler: Any
    ) -> Any:
        """Runs a prompt: the model goes through these nodes, and is sampled.

        Args:
            ours: class and inputs of every node, in this order.
            family: of the model.
            second: sample again, from what was drawn, with half the noise; as hires fix.
            sampler: inputs of KSampler that are not the usual ones.

        Returns:
            how often the network was called, and what was said.
        """
        prompt = self.prompt(*ours, family=family, second=second, **sampler)
        valid, outputs, error, errors = self.validated(copy.deepcopy(prompt))
        assert valid, f"{error} {errors}"
        self._number += 1
        KEPT.clear()
        counted = loaded(family)
        counted.calls = 0
        with told() as said:
            asyncio.run(self._executor.execute_async(prompt, f"prompt {self._number}", {}, outputs))
        for event, message in self._executor.status_messages:
            if event == "execution_error":
                raise Refused(message["exception_message"].strip(), counted.calls)
        return counted.calls, said

    def prompt(self, *ours: tuple[str, dict[str, Any]], family: str, second: bool, **sampler: Any) -> dict[str, Any]:
        """As the frontend would send it."""
        found: dict[str, Any] = {"1": {"class_type": "CheckModel", "inputs": {"family": family}}}
        for place, (kind, inputs) in enumerate(ours):
            before = f"ours {place - 1}" if place else "1"
            found[f"ours {place}"] = {"class_type": kind, "inputs": {"model": [before, 0], **inputs}}
        last = f"ours {len(ours) - 1}" if ours else "1"
        for number in ("3", "4"):
            found[number] = {"class_type": "CheckText", "inputs": {"family": family, "number": int(number)}}
        found["5"] = {"class_type": "CheckLatent", "inputs": {"model": [last, 0], "family": family}}
        usual = {"seed": 5, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        given = {**usual, **sampler, "model": [last, 0], "positive": ["3", 0], "negative": ["4", 0]}
        found["6"] = {"class_type": "KSampler", "inputs": {**given, "latent_image": ["5", 0]}}
        found["7"] = {"class_type": "CheckKeep", "inputs": {"latent": ["6", 0], "name": "first"}}
        if second:
            again = {**given, "denoise": 0.5, "latent_image": ["6", 0]}
            found["8"] = {"class_type": "KSampler", "inputs": again}
            found["9"] = {"class_type": "CheckKeep", "inputs": {"latent": ["8", 0], "name": "second"}}
        return found


class Refused(Exception):
    """A prompt that ended with an error: its text, and after how many calls of the network."""


def calibrating(name: str, file: str = "add to the file", key_steps: int = KEYS) -> tuple[str, dict[str, Any]]:
    """A DPCache Calibrate node."""
    return "DPCacheCalibrate", {"name": name, "key_steps": key_steps, "order": -1, "file": file}


def key_steps(count: int = KEYS, calibration: str = "none") -> tuple[str, dict[str, Any]]:
    """A DPCache Key Steps node."""
    return "DPCacheKeySteps", {"key_steps": count, "calibration": calibration}


def refused(workshop: Workshop, *ours: tuple[str, dict[str, Any]], text: str, **more: Any) -> str:
    """Checks that a prompt ends with this text, before the network was called."""
    try:
        workshop.queue(*ours, **more)
    except Refused as error:
        found, calls = error.args
        assert text in found, found
        assert calls == 0, f"refused only after {calls} calls: {found}"
        return text
    raise AssertionError(f"not refused: {text}")


def runs_in(path: Path) -> int:
    """So many runs a calibration holds."""
    import dpcache

    return dpcache.Calibration.load(path).facts.num_inputs


# ------------------------------------------------------------------------------------------------------ what is tried


def nodes_load(workshop: Workshop) -> str:
    """ComfyUI loads the nodes."""
    return ", ".join(name for name in known_nodes() if name.startswith("DPCache"))


def extra_paths(workshop: Workshop) -> str:
    """Files are where extra_model_paths.yaml says."""
    assert workshop.home == workshop.folder / "schedules", workshop.home
    return "yes"


def workflows(workshop: Workshop) -> str:
    """The templates are as the frontend saves them, with a small picture each, and name nodes that there are."""
    known = known_nodes()
    found = sorted((HERE / "example_workflows").glob("*.json"))
    for path in found:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert {"nodes", "links", "version"} <= workflow.keys(), f"{path.name} is not as the frontend saves it"
        for node in workflow["nodes"]:
            if node["type"].startswith("DPCache"):
                required = known[node["type"]].INPUT_TYPES()["required"]
                names = [one["name"] for one in node["inputs"] if one.get("widget")]
                assert names == [name for name in required if name != "model"], f"{path.name}: {names}"
                assert len(names) == len(node["widgets_values"]), f"{path.name}: {node['widgets_values']}"
        picture = path.with_suffix(".jpg")
        assert picture.exists() and picture.stat().st_size < 60_000, f"{path.name} has no small picture"
    return ", ".join(path.stem for path in found)


def old_workflows(workshop: Workshop) -> str:
    """Workflows that an earlier release saved are still accepted."""
    old = "DPCacheCalibrate", {"name": "old", "key_steps": 4, "order": 2, "file": "begin anew"}
    assert workshop.validated(workshop.prompt(old, family="flux", second=False))[0]
    wrong = "DPCacheCalibrate", {"name": "old", "key_steps": 4, "order": 2, "file": "whatever"}
    assert not workshop.validated(workshop.prompt(wrong, family="flux", second=False))[0]
    return "yes"


def nothing_calibrated(workshop: Workshop) -> str:
    """Key Steps without a calibration."""
    calls, said = workshop.queue(key_steps())
    assert calls == KEYS, calls
    assert workshop.server.shown["ours 0"] == f"{KEYS} of {STEPS} steps computed" == said[-1].removeprefix("DPCache: ")
    return said[-1]


def calibrated(workshop: Workshop) -> str:
    """Three prompts calibrated, planned and followed."""
    import torch

    for seed in (1, 2, 3):
        workshop.queue(seed=seed)
        full = KEPT["first"]
        calls, _ = workshop.queue(calibrating("flux"), seed=seed)
        assert calls == STEPS, calls
        assert torch.equal(full, KEPT["first"]), "calibrating changed the picture"
    assert runs_in(workshop.home / "flux.safetensors") == 3
    calls, said = workshop.queue(("DPCacheApply", {"schedule": f"flux-{KEYS}.json"}))
    assert calls == KEYS, calls
    return said[-1]


def other_grids(workshop: Workshop) -> str:
    """That calibration planned for 12 steps, denoise 0.5 and another shift."""
    shift = "ModelSamplingFlux", {"max_shift": 1.6, "base_shift": 0.9, "width": 512, "height": 512}
    for before, more in ([], {"steps": 12}), ([], {"steps": 6, "denoise": 0.5}), ([shift], {"steps": 10}):
        calls, said = workshop.queue(*before, key_steps(KEYS, "flux.safetensors"), **more)
        assert calls == KEYS and len(said) == 1, (more, calls, said)
    calls, said = workshop.queue(("DPCacheApply", {"schedule": f"flux-{KEYS}.json"}), steps=12)
    assert calls == 12 and "computed in full" in said[0], said
    return f"{KEYS} calls each; by a schedule of {STEPS} steps all, and said"


def second_pass(workshop: Workshop) -> str:
    """A second pass (hires fix) while calibrating."""
    calls, said = workshop.queue(calibrating("hires"), second=True)
    assert calls == 2 * STEPS and set(KEPT) == {"first", "second"}, calls
    assert runs_in(workshop.home / "hires.safetensors") == 1
    assert "a later run of this prompt is not measured" in workshop.server.shown["ours 0"], said
    calls, _ = workshop.queue(calibrating("hires"), second=True, seed=6)
    assert runs_in(workshop.home / "hires.safetensors") == 2
    return "first pass measured, second left alone, and said"


def refused_in_time(workshop: Workshop) -> str:
    """What cannot be calibrated is refused before the first call."""
    texts = [
        refused(workshop, calibrating("new", key_steps=9), text="lower key_steps"),
        refused(workshop, calibrating("flux"), steps=9, text="this one has 9"),
        refused(workshop, calibrating("flux"), sampler_name="dpmpp_2m", text="this one is with dpmpp_2m"),
        refused(workshop, calibrating("flux"), scheduler="karras", text="other noise levels"),
        refused(workshop, calibrating("flux"), family="wan", text="another model"),
        refused(workshop, calibrating("new"), sampler_name="heun", text="15 times in 8 steps"),
    ]
    assert not (workshop.home / "new.safetensors").exists()
    return f"{len(texts)} of {len(texts)}"


def started_over(workshop: Workshop) -> str:
    """Start over, while ComfyUI drops the node from its cache; two nodes of one name."""
    path = workshop.home / "again.safetensors"
    workshop.queue(calibrating("again"))
    for number in (1, 2, 3):
        workshop.restart()
        workshop.queue(calibrating("again", "start over"), seed=number)
        assert runs_in(path) == number, runs_in(path)
    assert runs_in(path.with_name("again.safetensors.old")) == 1
    for number in (4, 5):  # two nodes: ComfyUI takes another input for another node
        workshop.queue(calibrating("again", key_steps=number))
        assert runs_in(path) == number
    return "no run lost, the old file kept"


def other_caches(workshop: Workshop) -> str:
    """EasyCache or LazyCache beside it."""
    for name in ("EasyCache", "LazyCache"):
        other = name, {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        for ours in (key_steps(), calibrating("caches")):
            refused(workshop, other, ours, text="skips calls of this MODEL as well")
            refused(workshop, ours, other, text="skips calls of this MODEL as well")
    return "refused, before and after ours"


def said_per_prompt(workshop: Workshop) -> str:
    """A warning in every prompt, once, and in the node."""
    for seed in (1, 2):
        workshop.server.shown.clear()
        _, said = workshop.queue(key_steps(), sampler_name="heun", second=True, seed=seed)
        warned = [text for text in said if "15 times in 8 steps" in text]
        assert len(warned) == 1, said
        assert "15 times in 8 steps" in workshop.server.shown["ours 0"]
    return "yes"


def other_predictions(workshop: Workshop) -> str:
    """A schedule for noise, and the model patched to predict v."""
    workshop.queue(calibrating("sdxl"), family="sdxl")
    apply = "DPCacheApply", {"schedule": f"sdxl-{KEYS}.json"}
    calls, _ = workshop.queue(apply, family="sdxl")
    assert calls == KEYS, calls
    patch = "ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}
    return f"refused: {refused(workshop, patch, apply, family='sdxl', text='prediction V_PREDICTION')}"


def context_windows(workshop: Workshop) -> str:
    """Context windows of a long clip (wan)."""
    import torch

    given = {
        "context_length": 13,
        "context_overlap": 4,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "freenoise": True,
        "retain_first_frame": False,
        "split_conds_to_windows": False,
    }
    known = known_nodes()["WanContextWindowsManual"].INPUT_TYPES()["required"]
    windows = "WanContextWindowsManual", {name: value for name, value in given.items() if name in known}
    family = loaded("wan")
    before, family.shape = family.shape, (16, 9, 8, 8)
    try:
        each = {}
        for name, nodes in {
            "in full": [windows],
            "T": [windows, key_steps(STEPS)],
            "K": [windows, key_steps()],
            "K, ours first": [key_steps(), windows],
        }.items():
            calls, said = workshop.queue(*nodes, family="wan")
            each[name] = calls, KEPT["first"], said
    finally:
        family.shape = before
    count = each["in full"][0] // STEPS
    assert count > 1 and torch.equal(each["in full"][1], each["T"][1])
    for name in ("K", "K, ours first"):
        assert each[name][0] == KEYS * count and len(each[name][2]) == 1, (name, each[name][0], each[name][2])
    return f"{count} windows, {KEYS * count} of {STEPS * count} calls"


def parts(workshop: Workshop) -> str:
    """One half of the steps after the other, as the advanced sampler's start_at_step and end_at_step."""
    from dpcache.integrations.comfyui import Schedule, apply

    family = loaded("flux")
    schedule = Schedule.load(workshop.home / f"flux-{KEYS}.json")
    followed, sigmas = apply(family.model, schedule), family.sigmas()
    family.draw(followed, sigmas=sigmas[:5])
    first = family.calls
    family.draw(followed, sigmas=sigmas[4:])
    rest = schedule.from_step(4).num_key_steps
    assert first == sum(key < 4 for key in schedule.key_steps) and family.calls == rest, (first, family.calls, rest)
    return f"{first} and {rest} calls"


def conditions(workshop: Workshop) -> str:
    """Areas, masks, ranges of steps, a batch and inpainting."""
    import comfy.samplers
    import torch

    from dpcache.integrations.comfyui import plan_and_apply

    family = loaded("flux")
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1

    def draw(model: Any, positive: Any, batch: int = 1, inpainted: bool = False) -> Any:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, family.condition(2))
        guider.set_cfg(3.0)
        noise = torch.randn(batch, *family.shape, generator=torch.Generator().manual_seed(3))
        latents = torch.ones_like(noise) if inpainted else torch.zeros_like(noise)
        sampler, family.calls = comfy.samplers.sampler_object("euler"), 0
        with torch.no_grad():
            found = guider.sample(
                noise, latents, sampler, family.sigmas(), mask if inpainted else None, disable_pbar=True, seed=5
            )
        return found, family.calls

    def second(**more: Any) -> Any:
        ((context, given),) = family.condition(7)
        return [*family.condition(1), [context, {**given, **more}]]

    tried = {
        "two areas": (second(area=(4, 4, 2, 2), strength=1.0), {}),
        "a mask": (second(mask=mask, mask_strength=1.0), {}),
        "a range": (second(start_percent=0.0, end_percent=0.5), {}),
        "a batch": (family.condition(1), {"batch": 3}),
        "inpainting": (family.condition(1), {"inpainted": True}),
    }
    for name, (positive, more) in tried.items():
        expected, calls = draw(family.model, positive, **more)
        same, _ = draw(plan_and_apply(family.model, STEPS), positive, **more)
        assert torch.equal(expected, same), f"{name}: T of T differs"
        found, fewer = draw(plan_and_apply(family.model, KEYS), positive, **more)
        assert fewer < calls and bool(found.isfinite().all()), f"{name}: {fewer} of {calls} calls"
        assert fewer * STEPS == calls * KEYS or name == "a range", f"{name}: {fewer} of {calls} calls"
    return ", ".join(tried)


CHECKS: list[Callable[[Workshop], str]] = [
    nodes_load,
    workflows,
    extra_paths,
    old_workflows,
    nothing_calibrated,
    calibrated,
    other_grids,
    second_pass,
    refused_in_time,
    started_over,
    other_caches,
    said_per_prompt,
    other_predictions,
    context_windows,
    parts,
    conditions,
]

if __name__ == "__main__":
    sys.exit(main())
