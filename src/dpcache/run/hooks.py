"""Putting things on one instance and taking them off again without a trace. Classes are never touched."""

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

Listener = Callable[..., Any]

_CREATED = "_dpcache_created_registry"


class Hook(ModelHook):  # type: ignore[misc]
    """Runs its `new_forward` in place of what lies beneath it."""

    entered: Callable[..., Any]

    def beneath(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with whatever other hooks lie beneath this one."""
        return self.fn_ref.original_forward(*args, **kwargs)

    def mend(self) -> None:
        """Has calls go through the hook again: diffusers, removing one beneath it, joins what is left past this one."""
        if self.fn_ref.forward is not self.entered:
            self.fn_ref.original_forward, self.fn_ref.forward = self.fn_ref.forward, self.entered


class Gate:
    """Stands where calls of a compiled module come in, before the compiled code: hooks on it are not compiled."""

    def __init__(self, owner: Any, method: str, compiled: Callable[..., Any]) -> None:
        self.owner, self.method = owner, method
        self.compiled = self.forward = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def open(self) -> None:
        setattr(self.owner, self.method, self)

    def close(self) -> None:
        """Gives way to the compiled code again, unless the module was compiled anew."""
        if vars(self.owner).get(self.method) is self:
            setattr(self.owner, self.method, self.compiled)


def entrance(module: nn.Module) -> Any:
    """What to attach a hook to that shall see a module's calls and stay out of its compiled code: itself, or a gate."""
    if hasattr(module, "_orig_mod"):
        method = "forward"
    elif module._compiled_call_impl is not None:
        method = "_compiled_call_impl"
    else:
        return module
    compiled = vars(module)[method]
    return compiled if isinstance(compiled, Gate) else Gate(module, method, compiled)


def attach(module: Any, hook: Hook, name: str) -> None:
    """Registers a hook on a module or gate, next to whatever hooks diffusers has there."""
    if isinstance(module, Gate):
        module.open()
    created = not hasattr(module, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if created:
        setattr(registry, _CREATED, True)
    with _beneath_accelerate(module):
        registry.register_hook(hook, name)
    hook.entered = hook.fn_ref.forward
    module.__deepcopy__ = functools.partial(_copy, module)
    module.__reduce_ex__ = functools.partial(_reduced, module)


def detach(module: Any, name: str) -> None:
    """Removes a hook put there by `attach`, and what registering it left."""
    with _beneath_accelerate(module):
        _detach(module, name)


def _detach(module: Any, name: str) -> None:
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
    if not any(isinstance(hook, Hook) for hook in registry.hooks.values()):
        del module.__deepcopy__, module.__reduce_ex__
    if registry.hooks:
        return
    own = vars(module).get("forward")
    if isinstance(module, Gate):
        module.close()
    elif getattr(own, "__func__", None) is type(module).forward:
        del module.forward
    if getattr(registry, _CREATED, False):
        del module._diffusers_hook


@contextmanager
def _beneath_accelerate(module: Any) -> Iterator[None]:
    """Has `module.forward` be what lies beneath accelerate's hook.

    Offloading takes that hook off, with all that lies above it, and puts it on again at the end of every pipeline call.
    """
    if "_old_forward" not in vars(module):
        yield
        return
    above, module.forward = module.forward, module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, above


def _copy(module: Any, memo: dict[int, Any]) -> Any:
    """A copy without this library's hooks, which would call the original: they close over it."""
    with _without_hooks(module):
        return copy.deepcopy(module, memo)


def _reduced(module: Any, protocol: Any) -> Any:
    """What is pickled of a module: all but this library's hooks."""
    with _without_hooks(module):
        reduce_ex: Any = type(module).__reduce_ex__
        make, arguments, state, *rest = reduce_ex(module, protocol)
        state = dict(state)
        if "_diffusers_hook" in state:  # it is there again, with our hooks, when the pickler gets to it
            state["_diffusers_hook"] = registry = copy.copy(state["_diffusers_hook"])
            for name in ("hooks", "_hook_order", "_fn_refs"):
                setattr(registry, name, copy.copy(getattr(registry, name)))
        return make, arguments, state, *rest


@contextmanager
def _without_hooks(module: Any) -> Iterator[None]:
    """Has the module as it would be without this library, all but hooks and taps of others."""
    hooks = {name: hook for name, hook in module._diffusers_hook.hooks.items() if isinstance(hook, Hook)}
    taps = {name: own for name, own in vars(module).items() if _tap_of(own) is not None and not own.tap.had_own}
    for name in hooks:
        detach(module, name)
    for name in taps:
        delattr(module, name)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            attach(module, hook, name)
        vars(module).update(taps)


def listen(
    owner: Any,
    method: str,
    listener: Listener,
    copied: "Callable[[Callable[[], None]], bool] | None" = None,
) -> Callable[[], None]:
    """Passes the result of one object's method through `listener`, by a wrapper on the instance.

    After every successful call of `owner.method` the caller gets `listener(owner, result, *args, **kwargs)`. Listeners
    to one method (pipelines may share a scheduler) share the wrapper: it comes with the first and goes with the last.

    Args:
        owner: the object; its class stays as it is.
        method: name of the method.
        listener: must not hold on to what owns it: it lives as long as the owner.
        copied: asked when the owner is deep-copied, with a function that ends the listening to the copy: whether the
            copy is listened to as well. It is not unless given.

    Returns:
        a function that ends the listening.
    """
    tap = _tap_of(vars(owner).get(method)) or _Tap(owner, method, getattr(owner, method), method in vars(owner))
    entry = (listener, copied)
    tap.listeners.append(entry)
    return lambda: tap.leave(entry)


def is_heard(owner: Any, method: str, listener: Listener) -> bool:
    """Whether this listener listens, through the method that a call would find now."""
    tap = _tap_of(vars(owner).get(method))
    return tap is not None and any(one == listener for one, _ in tap.listeners)


def lock_of(owner: Any, method: str) -> threading.RLock:
    """Held by those who must not use an object that is listened to at the same time."""
    tap = _tap_of(vars(owner).get(method))
    return tap.lock if tap is not None else threading.RLock()


class _Tap:
    def __init__(self, owner: Any, method: str, original: Callable[..., Any], had_own: bool) -> None:
        self.owner, self.method, self.original, self.had_own = owner, method, original, had_own
        self.listeners: list[tuple[Listener, Any]] = []
        self.lock = threading.RLock()
        setattr(owner, method, _Wrapper(self))

    def leave(self, entry: tuple[Listener, Any]) -> None:
        if entry in self.listeners:
            self.listeners.remove(entry)
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
        for listener, _ in tuple(self.tap.listeners):
            result = listener(self.tap.owner, result, *args, **kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the owner has its own method: pipelines copy schedulers, for sound next to pictures."""
        owner = memo.get(id(self.tap.owner))
        if owner is None:
            return self
        had_own, method = self.tap.had_own, self.tap.method
        own = copy.deepcopy(self.tap.original, memo) if had_own else _method_of_class(owner, method)
        heard = _Tap(owner, method, own, had_own)
        for listener, copied in self.tap.listeners:
            entry = (listener, copied)
            if copied is not None and copied(functools.partial(heard.leave, entry)):
                heard.listeners.append(entry)
        return vars(owner)[method] if heard.listeners else own

    def __reduce__(self) -> Any:
        """Pickled, it is the plain method again."""
        return _method_of_class, (self.tap.owner, self.tap.method)


def _method_of_class(owner: Any, method: str) -> Any:
    return types.MethodType(getattr(type(owner), method), owner)


def _tap_of(method: Any) -> _Tap | None:
    return method.tap if isinstance(method, _Wrapper) else None
