"""Putting things on one instance and taking them off again without a trace. Classes are never touched."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

Listener = Callable[..., Any]

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
    above = [registry.hooks[other].fn_ref for other in names[names.index(name) + 1 :][:1]]
    forwards = [reference.forward for reference in above]
    registry.remove_hook(name, recurse=False)
    for reference, forward in zip(above, forwards, strict=True):
        # remove_hook connects the hook above to what lay below by its `forward`; a hook with a `new_forward` of its own
        # would lose that, and finds what lies below in `original_forward`.
        if reference.original_forward is not None:
            reference.original_forward, reference.forward = reference.forward, forward
    if registry.hooks:
        return
    own = vars(module).get("forward")
    if getattr(own, "__func__", None) is type(module).forward:
        del module.forward
    if getattr(registry, _CREATED, False):
        del module._diffusers_hook


def listen(owner: Any, method: str, listener: Listener) -> Callable[[], None]:
    """Passes the result of one object's method through `listener`, by a wrapper on the instance.

    After every successful call of `owner.method` the caller gets `listener(result, *args, **kwargs)`. Listeners to one
    method (pipelines may share a scheduler) share the wrapper: it comes with the first and goes with the last.

    Returns:
        a function that ends the listening.
    """
    tap = _tap_of(vars(owner).get(method)) or _Tap(owner, method)
    tap.listeners.append(listener)
    return lambda: tap.leave(listener)


class _Tap:
    def __init__(self, owner: Any, method: str) -> None:
        self.owner, self.method = owner, method
        self.listeners: list[Listener] = []
        self.original = getattr(owner, method)
        self.had_own = method in vars(owner)

        setattr(owner, method, _Wrapper(self))

    def leave(self, listener: Listener) -> None:
        self.listeners.remove(listener)
        current = vars(self.owner).get(self.method)
        # Where somebody wrapped the method after us, ours must stay underneath; it has no listeners any more.
        if not self.listeners and _tap_of(current) is self:
            if self.had_own:
                setattr(self.owner, self.method, self.original)
            else:
                delattr(self.owner, self.method)


class _Wrapper:
    """The instance's own method while it is listened to."""

    def __init__(self, tap: _Tap) -> None:
        # Keeps the signature visible: pipelines inspect that of `set_timesteps`.
        functools.update_wrapper(self, tap.original)
        self.tap = tap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.tap.original(*args, **kwargs)
        for listener in tuple(self.tap.listeners):
            result = listener(result, *args, **kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the owner gets its own method, unheard: pipelines copy schedulers, for sound next to pictures."""
        owner = memo.get(id(self.tap.owner))
        if owner is None:
            return self
        if self.tap.had_own:
            return copy.deepcopy(self.tap.original, memo)
        return types.MethodType(getattr(type(owner), self.tap.method), owner)


def _tap_of(method: Any) -> _Tap | None:
    return method.tap if isinstance(method, _Wrapper) else None
