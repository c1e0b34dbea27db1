"""Which pipeline something was measured with: its class, its scheduler, its model with adapters, and their weights.

A directory or a configuration does not tell two sets of weights apart. A few elements of every parameter do: training,
merging or quantizing a model changes some of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpcache.errors import CalibrationError
from dpcache.files.journal import digest
from dpcache.files.whole import write_whole

#: The file of a checkpoint that says what the others were measured with.
FILE = "measured-with.json"
FORMAT = "dpcache.fingerprint"
VERSION = 1
#: Elements that are read of every parameter, at even distances in memory.
SAMPLES = 16
#: Bits are compared, not numbers: every element is read as a whole number of its own size.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What the parts are called in messages.
_WORDS = {"pipeline": "pipeline", "scheduler": "scheduler", "model": "model or adapter", "weights": "weights"}


@dataclass(frozen=True)
class Fingerprint:
    """What tells a pipeline from another.

    Attributes:
        pipeline: its class, with the settings in its configuration.
        scheduler: digest of its class and configuration.
        model: digest of names, shapes and types of all parameters, and of adapters and their scales.
        weights: digest of elements of every parameter; None where some cannot be read, such as those on disk.
    """

    pipeline: str
    scheduler: str
    model: str
    weights: str | None

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, in words. Weights that one of them could not read are taken for the same."""
        pairs = {name: (value, getattr(other, name)) for name, value in asdict(self).items()}
        return [_WORDS[name] for name, (a, b) in pairs.items() if a != b and None not in (a, b)]


def fingerprint(pipeline: Any) -> Fingerprint:
    """The fingerprint of a diffusers pipeline, wherever its weights are.

    Reads 16 elements of every parameter and waits for each device once or twice: well under a second for billions of
    parameters.
    """
    modules = {
        name: getattr(component, "_orig_mod", component)  # compiled
        for name, component in sorted(pipeline.components.items())
        if isinstance(component, torch.nn.Module)
    }
    structure: list[Any] = []
    tensors: list[torch.Tensor] = []
    is_whole = True
    for name, module in modules.items():
        structure.append([name, type(module).__name__, list(_adapters(module))])
        for path, parameter, found in _parameters(module):
            structure.append([path, list(parameter.shape), str(parameter.dtype)])
            is_whole = is_whole and found is not None
            tensors += found or []
    settings = {name: value for name, value in pipeline.config.items() if isinstance(value, str | int | float)}
    return Fingerprint(
        pipeline=f"{type(pipeline).__name__} {digest(_plain(settings))}",
        scheduler=digest([type(pipeline.scheduler).__name__, _plain(pipeline.scheduler.config)]),
        model=digest(structure),
        weights=digest(_sampled(tensors)) if is_whole else None,
    )


def weights_digest(tensors: Iterable[torch.Tensor]) -> str | None:
    """A digest of elements of these tensors, in this order; None where one of them cannot be read."""
    found: list[torch.Tensor] = []
    for tensor in tensors:
        parts = _parts(tensor)
        if parts is None:
            return None
        found += parts
    try:
        return digest(_sampled(found))
    except RuntimeError:  # a kind of tensor that shows no elements
        return None


def require_same(folder: Path, pipeline: Any) -> None:
    """Notes in a checkpoint what it is measured with; of one that is there already, checks that it is the same.

    Raises:
        CalibrationError: the checkpoint was measured with something else, or does not say with what.
    """
    path, found = folder / FILE, fingerprint(pipeline)
    remedy = "go on with the one it was begun with, give another checkpoint, or delete this one"
    if path.exists():
        known = _read(path)
        if known is None:
            raise CalibrationError(f"{path} cannot be read, so nobody knows what {folder} was measured with: {remedy}.")
        if different := found.differences(known):
            raise CalibrationError(f"{folder} was measured with another {' and another '.join(different)}: {remedy}.")
        return
    if any(folder.glob("input-*.safetensors")):
        raise CalibrationError(f"{folder} does not say with which model it was measured: {remedy}.")
    document = {"format": FORMAT, "version": VERSION, **asdict(found)}
    write_whole(path, lambda part: part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"))


def _read(path: Path) -> Fingerprint | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            return None
        found = Fingerprint(**document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    texts = [found.pipeline, found.scheduler, found.model, *([] if found.weights is None else [found.weights])]
    return found if all(isinstance(text, str) for text in texts) else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that only say where something came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _adapters(module: torch.nn.Module) -> Iterator[list[Any]]:
    """What of adapters is no parameter: which are active, and by how much they count."""
    for path, part in module.named_modules():
        scaling = vars(part).get("scaling")
        if isinstance(scaling, dict):  # a layer of peft
            facts = (getattr(part, name, None) for name in ("active_adapters", "disable_adapters", "merged_adapters"))
            yield [path, sorted(scaling.items()), *map(str, facts)]
        scale = getattr(getattr(part, "processor", None), "scale", None)
        if isinstance(scale, int | float | list):  # an IP-Adapter
            yield [path, scale]


def _parameters(
    module: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Parameter, list[torch.Tensor] | None]]:
    """Every parameter, by its path, with the plain tensors it is made of; None where they are out of reach."""
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            there = _offloaded(part, name) if parameter.is_meta else parameter
            yield f"{path}.{name}".replace("_orig_mod.", ""), parameter, None if there is None else _parts(there)


def _offloaded(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """Where accelerate keeps a parameter in host memory that is on no device between calls."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        kept = getattr(weights, "dataset", weights)
        if isinstance(kept, dict):  # a folder on disk would be read whole
            return kept.get(f"{getattr(weights, 'prefix', '')}{name}")
    return None


def _parts(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The plain tensors in one; None where there are none to be read here."""
    if hasattr(tensor, "to_local"):  # of several processes
        return None
    data = tensor.detach()
    if hasattr(data, "__tensor_flatten__"):  # quantized
        inner = [_parts(getattr(data, name)) for name in data.__tensor_flatten__()[0]]
        return None if None in inner else [part for parts in inner if parts for part in parts]
    if data.is_meta or data.element_size() not in _WHOLE or data.layout is not torch.strided:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return [data.as_subclass(torch.Tensor)] if data.numel() else []


def _sampled(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Elements of every tensor, all of a device and size in one transfer."""
    spread = [_spread(tensor) for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for some in spread:
        groups.setdefault((some.device, some.dtype), []).append(some)
    read = {key: iter(torch.cat(group).cpu().tolist()) for key, group in groups.items()}
    # In the order of the parameters: next time the same weights may be on other devices.
    return [[next(read[some.device, some.dtype]) for _ in range(len(some))] for some in spread]


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements at even distances in memory, as whole numbers: a view, whatever the order of dimensions."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(SAMPLES, last + 1)
    return tensor.as_strided((count,), (max(1, last // max(count - 1, 1)),)).view(_WHOLE[tensor.element_size()])
