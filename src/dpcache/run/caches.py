"""Other caches on the same denoiser: two of them would predict from each other's predictions."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from .hooks import Hook


def other_cache(pipeline: Any, denoiser: nn.Module) -> str | None:
    """How to take another cache off that is at work on this denoiser; None if there is none."""
    kind = type(denoiser).__name__
    if getattr(denoiser, "is_cache_enabled", False):
        return f"another cache is enabled on this {kind} already: call `pipe.transformer.disable_cache()` first."
    if getattr(denoiser, "_is_cached", False) or getattr(pipeline, "_is_cached", False):  # where cache-dit notes it
        return f"another cache is enabled on this {kind} already: call `cache_dit.disable_cache(pipe)` first."
    for module in _modules(denoiser):
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            # Hooks that carry something from one step to the next say so.
            if getattr(hook, "_is_stateful", False) and not isinstance(hook, Hook):
                return (
                    f"another cache is enabled on this {kind} already, {type(hook).__name__}: take it off first, with "
                    f"`HookRegistry.check_if_exists_or_initialize(module).remove_hook({name!r})`, or load the "
                    f"{kind} anew."
                )
    return None


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    """All modules inside. `nn.Module.modules` makes up all their names, which takes ten times as long."""
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None:
            yield module
            left.extend(module._modules.values())


def replaced_forward(denoiser: nn.Module) -> str | None:
    """Whose `forward` runs in place of the denoiser's own, as DeepCache and TeaCache do it; None if its own does."""
    own = _outermost(denoiser)
    if own is not None:
        return _name(own)
    home = next((kind for kind in type(denoiser).__mro__ if "forward" in vars(kind)), None)
    if home is None:
        return None
    function = inspect.unwrap(vars(home)["forward"])
    if getattr(function, "__module__", home.__module__) != home.__module__:
        return _name(function)
    return None


def _outermost(denoiser: nn.Module) -> Any:
    """The `forward` that somebody has put on this instance, where it is not that of a hook."""
    own = vars(denoiser).get("forward")
    if own is None or hasattr(denoiser, "_hf_hook"):  # accelerate keeps the forward there that it wraps
        return None
    registry = getattr(denoiser, "_diffusers_hook", None)
    if registry is None or not registry.hooks:
        # A registry that was emptied again leaves the method of the class as an attribute.
        return None if getattr(own, "__func__", None) is type(denoiser).forward else own
    function = getattr(own, "func", own)
    return None if getattr(function, "__qualname__", "").startswith("HookRegistry.") else own


def _name(function: Any) -> str:
    function = inspect.unwrap(getattr(function, "func", function))
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
