"""Ways to look at a pipeline from outside: what is called, how often, and what comes in and out of it."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dpcache.run.denoisers import find_blocks


@contextmanager
def counted(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """Counts calls of modules by plain torch hooks."""
    runs = {name: [0] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: runs[name].__setitem__(0, runs[name][0] + 1))
        for name, module in modules.items()
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stepped(pipe: Any, events: list[Any], parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Notes in order: "begin" and "step" of the pipeline's scheduler, ids of others that step, calls of networks."""
    schedulers = [part for part in vars(pipe).values() if hasattr(part, "step") and not isinstance(part, nn.Module)]
    own = getattr(pipe, "scheduler", None)
    kinds = {type(scheduler) for scheduler in schedulers if callable(getattr(type(scheduler), "step", None))}
    originals = {
        (kind, name): getattr(kind, name) for kind in kinds for name in ("step", "set_timesteps") if hasattr(kind, name)
    }

    def noting(kind: type, name: str) -> Any:
        original = originals[kind, name]

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "step" and self is not own:
                events.append(id(self))
            elif name == "step":
                # Called twice without a network between, it takes one step in two parts.
                events.extend(["step"] if events[-1:] != ["step"] else [])
            elif self is own:
                events.append("begin")
            return original(self, *args, **kwargs)

        method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return method

    handles = [
        part.register_forward_pre_hook(
            lambda module, args, kwargs: events.append((module, shapes_of([*args, *kwargs.values()]))), with_kwargs=True
        )
        for part in parts.values()
    ]
    patched = {key: noting(*key) for key in originals}
    inherited = {key: key[1] not in vars(key[0]) for key in originals}
    for (kind, name), method in patched.items():
        setattr(kind, name, method)
    try:
        yield
    finally:
        for (kind, name), original in originals.items():
            if inherited[kind, name]:
                delattr(kind, name)
            else:
                setattr(kind, name, original)
        for handle in handles:
            handle.remove()


def shapes_of(values: Any) -> tuple[Any, ...]:
    """Shapes of tensors among the values and in lists of them."""
    if isinstance(values, torch.Tensor):
        return (tuple(values.shape),)
    return tuple(s for value in values for s in shapes_of(value)) if isinstance(values, list | tuple) else ()


def layers_of(denoiser: nn.Module, boundary: str) -> list[nn.Module]:
    """Layers that show whether the denoiser, or a block of it, really ran."""
    if boundary == "blocks":
        return [block.layer() for block in find_blocks(denoiser)]
    leaves = [module for module in denoiser.modules() if not any(True for _ in module.children())]
    return [leaf for leaf in leaves if any(True for _ in leaf.parameters())]


@dataclass
class Skip:
    """A call in which no block ran: what came in and out, and what the last block handed on."""

    denoiser: nn.Module
    inputs: Any
    output: list[torch.Tensor]
    streams: list[torch.Tensor]


@contextmanager
def skipped_calls(denoisers: list[nn.Module], found: list[Skip], most: int = 4) -> Iterator[None]:
    """Keeps the first few calls in which the last block did not run."""
    handles = []
    for denoiser in denoisers:
        last = find_blocks(denoiser)[-1]
        ran: list[int] = []
        inputs: list[Any] = []
        streams: list[list[torch.Tensor]] = []

        def enter(_: Any, args: Any, kwargs: Any, inputs: Any = inputs, ran: Any = ran, streams: Any = streams) -> None:
            # Before the call: some denoisers use up the lists that they are given.
            inputs[:] = [_cloned((args, kwargs))] if len(found) < most else []
            ran.clear()
            streams.clear()

        def handed(_: Any, __: Any, output: Any, streams: Any = streams, last: Any = last) -> None:
            streams[:] = [stream.clone() for stream in last.streams(output)]

        def leave(module: Any, _: Any, output: Any, inputs: Any = inputs, ran: Any = ran, kept: Any = streams) -> None:
            if inputs and kept and not ran:
                found.append(Skip(module, inputs[0], tensors(output), list(kept)))

        handles += [
            denoiser.register_forward_pre_hook(enter, with_kwargs=True),
            last.layer().register_forward_pre_hook(lambda *_, ran=ran: ran.append(1)),
            last.module.register_forward_hook(handed),
            denoiser.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_full(skip: Skip) -> list[torch.Tensor]:
    """What the denoiser makes of the same inputs in full, but for the streams that its last block hands on."""
    block = find_blocks(skip.denoiser)[-1]

    def replaced(_: Any, __: Any, output: Any) -> Any:
        given = dict(zip(block.head, skip.streams, strict=True))
        results = (output,) if len(block.returns) == 1 else tuple(output)
        results = tuple(given.get(name, result) for name, result in zip(block.returns, results, strict=False))
        return results[0] if len(block.returns) == 1 else results

    args, kwargs = skip.inputs
    handle = block.module.register_forward_hook(replaced)
    try:
        with torch.no_grad():
            return tensors(skip.denoiser(*args, **kwargs))
    finally:
        handle.remove()


def tensors(output: Any) -> list[torch.Tensor]:
    """Every number in what a pipeline or a denoiser returned."""
    if isinstance(output, torch.Tensor):
        return [output.detach().clone()]
    if isinstance(output, np.ndarray):
        return [torch.as_tensor(output.copy())]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors(value)]
    if dataclasses.is_dataclass(output):
        return tensors(vars(output))
    if hasattr(output, "getbands"):
        return [torch.as_tensor(np.array(output))]
    return []


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return bool(left) and len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cloned(item) for item in value)
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
