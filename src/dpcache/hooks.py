"""Putting things on one instance and taking them off again without a trace. Classes are never touched."""

import functools
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

Listener = Callable[[Any], Any]

_CREATED = "_dpcache_created_registry"


def attach(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Registers a hook on one module, next to whatever hooks diffusers has there."""
    created = not hasattr(module, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if created:
        setattr(registry, _CREATED, True)
    registry.register_hook(hook, name)


def detach(module: nn.Module, name: str) -> None:
    """Removes a hook put there by `attach`, and what registering it left on the module."""
    registry: Any = module._diffusers_hook
    names = list(registry.hooks)
    above = registry.hooks[names[names.index(name) + 1]].fn_ref if names[-1] != name else None
    replaces = above is not None and above.original_forward is not None
    forward = above.forward if above else None
    registry.remove_hook(name, recurse=False)
    if replaces:
        # remove_hook connects the hook above to what lay below by its `forward`; a hook with a `new_forward` of its own
        # would lose that, and finds what lies below in `original_forward`.
        above.original_forward, above.forward = above.forward, forward
    if registry.hooks:
        return
    forward = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.forward
    if getattr(registry, _CREATED, False):
        del module._diffusers_hook


class MethodTap:
    """Passes the result of one object's method through listeners, by a wrapper on the instance.

    Pipelines that share a scheduler share the wrapper: it is put there for the first listener, removed with the last.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self.owner, self.method = owner, method
        self.listeners: list[Listener] = []

    @classmethod
    def listen(cls, owner: Any, method: str, listener: Listener) -> "MethodTap":
        """Calls `listener(result)` after every successful call of `owner.method`, which returns what that returns."""
        tap = getattr(vars(owner).get(method), "_dpcache_tap", None)
        if tap is None:
            tap = cls(owner, method)
            tap._install()
        tap.listeners.append(listener)
        return tap

    def _install(self) -> None:
        original = getattr(self.owner, self.method)

        # `wraps` keeps the signature visible: pipelines inspect that of `set_timesteps`.
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            for listener in tuple(self.listeners):
                result = listener(result)
            return result

        self._had_own = self.method in vars(self.owner)
        self._original = original
        wrapper._dpcache_tap = self  # type: ignore[attr-defined]
        setattr(self.owner, self.method, wrapper)

    def leave(self, listener: Listener) -> None:
        """Stops telling this listener; the last one takes the wrapper with it."""
        self.listeners.remove(listener)
        current = vars(self.owner).get(self.method)
        # Where somebody wrapped the method after us, ours must stay underneath; it tells nobody any more.
        if not self.listeners and getattr(current, "_dpcache_tap", None) is self:
            if self._had_own:
                setattr(self.owner, self.method, self._original)
            else:
                delattr(self.owner, self.method)
