"""The hooks on one denoiser: they hand its calls to the loop of the open scope, and let all others pass."""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from dpcache.plan.schedule import Boundary

from . import scope as scopes
from .boundary import BoundaryTap, blank_like
from .denoisers import as_called, find_auxiliaries
from .hooks import Hook, attach, detach, entrance, listen
from .loop import signature

ENTRY = "_dpcache_entry"
"""Where a pipeline keeps its entry."""
#: Of what runs beside the denoiser, so many forms of its output are remembered.
_KEPT_FORMS = 16
#: So many calls outside of any pipeline look like a loop of one's own.
_BARE_CALLS = 3


class Placement:
    """Hooks on one denoiser, its blocks, and what feeds them.

    The denoiser's own hook holds on to this object, which holds on to no pipeline: both live as long as the denoiser.

    Args:
        key: of the entry (see `dpcache.run.scope`).
        denoiser: the network, as torch.compile has not wrapped it.
        number: its number among those of the pipeline.
        boundary: where values are read.

    Raises:
        UnsupportedPipelineError: its blocks are not known, and the boundary is "blocks".
    """

    def __init__(self, key: object, denoiser: nn.Module, number: int, boundary: Boundary) -> None:
        self.key, self.number = key, number
        self._denoiser = weakref.ref(denoiser)
        self._name = f"dpcache-{id(key):x}"
        self.tap = BoundaryTap(denoiser, boundary)
        self._hook = _DenoiserHook(self)
        #: At "blocks" the denoiser still reads at skipped steps what a ControlNet returns.
        self._auxiliary_hooks: dict[int, _AuxiliaryHook] = {}
        self._skips_auxiliaries = boundary == "output" and number == 0
        self._places: list[tuple[Any, Hook]] = []
        self._leave_context: Callable[[], None] | None = None
        self._bare_calls = 0

    @property
    def denoiser(self) -> nn.Module | None:
        """The denoiser, while it lives."""
        return self._denoiser()

    def place(self, pipeline: Any = None) -> None:
        """Puts the hooks where calls come in: elsewhere, once a denoiser or its blocks have been compiled."""
        denoiser = self._denoiser()
        assert denoiser is not None
        outside = entrance(as_called(pipeline, denoiser))
        # Compiled as a whole, the denoiser's blocks are called inside one graph, past their own compiled code.
        inside = outside is not denoiser
        places: list[tuple[Any, Hook]] = [(outside, self._hook)]
        places += [(module if inside else entrance(module), hook) for module, hook in self.tap.block_hooks]
        # What nothing reads is not in the graph of a skipped step anyway.
        places += [] if inside else [(entrance(module), hook) for module, hook in self.tap.feeder_hooks]
        beside = find_auxiliaries(pipeline) if self._skips_auxiliaries else []
        known = self._auxiliary_hooks
        self._auxiliary_hooks = {id(module): known.get(id(module)) or _AuxiliaryHook(self.key) for module in beside}
        places += [(entrance(module), self._auxiliary_hooks[id(module)]) for module in beside]
        if places != self._places:
            self._detach()
            for place, hook in places:
                attach(place, hook, self._name)
                self._places.append((place, hook))
        if self._leave_context is None and hasattr(denoiser, "cache_context"):
            self._leave_context = listen(denoiser, "cache_context", partial(_in_context, self.key))

    def remove(self) -> None:
        """Takes all of it off again."""
        self._detach()
        if self._leave_context is not None:
            self._leave_context()
            self._leave_context = None

    def _detach(self) -> None:
        while self._places:
            detach(self._places.pop()[0], self._name)

    def mend(self) -> None:
        """Offloading takes hooks of its own off in the middle of a loop, from beneath these."""
        for _, hook in self._places:
            hook.mend()

    def note_bare_call(self) -> None:
        """Counts calls that no pipeline makes; a loop of one's own is told once that it is not followed."""
        if self._bare_calls >= _BARE_CALLS or scopes.is_any_open() or not _is_bare(self.key):
            return
        self._bare_calls += 1
        if self._bare_calls == _BARE_CALLS:
            warnings.warn(
                f"this {type(self._denoiser()).__name__} is called outside of a call of the pipeline that dpcache is "
                "enabled on: such calls are computed in full. For a loop of your own use `with "
                "dpcache.following(denoiser, schedule):`.",
                stacklevel=2,
            )


class _DenoiserHook(Hook):
    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.placement.mend()
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        placed = self.placement
        scope = scopes.current(placed.key)
        if scope is None:
            placed.note_bare_call()
        loop = scope.loop_for_call(placed.number, args, kwargs) if scope is not None else None
        with placed.tap.lock:
            if scope is None or loop is None:
                return self.beneath(*args, **kwargs)
            return loop.call(placed.tap, placed.number, scope.contexts, self.beneath, args, kwargs)


class _AuxiliaryHook(Hook):
    """A network that runs beside the denoiser, for it alone: not where the denoiser does not run."""

    def __init__(self, key: object) -> None:
        super().__init__()
        self.key = key
        self._blanks: dict[tuple[Any, ...], Callable[[], Any]] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = scopes.current(self.key)
        loop = scope.loop if scope is not None and not scope.fresh else None
        if loop is None or loop.is_over:
            return self.beneath(*args, **kwargs)
        form = signature((*args, *kwargs.values()))
        if form in self._blanks and loop.skips():
            loop.starved_step = loop.step_of_next_call
            return self._blanks[form]()
        output = self.beneath(*args, **kwargs)
        self._blanks = {**dict(list(self._blanks.items())[-_KEPT_FORMS:]), form: blank_like(output)}
        return output


def _in_context(key: object, _: Any, context: Any, name: str, *__: Any, **___: Any) -> Any:
    """Notes the name of a context that the pipeline opens around a denoiser call."""

    @contextmanager
    def noted() -> Iterator[Any]:
        with context as value:
            scope = scopes.current(key)
            if scope is None:
                yield value
                return
            scope.contexts.append(name)
            try:
                yield value
            finally:
                scope.contexts.pop()

    return noted()


def _is_bare(key: object) -> bool:
    """Whether a call is made outside of pipelines, or by a method of this key's own one.

    A twin that shares the denoiser is another; and what one calls in a thread of its own is told when the call ends.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if not isinstance(caller, nn.Module) and hasattr(caller, "scheduler"):
                entry: Any = getattr(caller, "__dict__", {}).get(ENTRY)
                return getattr(entry, "key", None) is key and not entry.is_busy
        frame = frame.f_back
    return True
