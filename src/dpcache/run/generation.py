"""One sampling loop that follows a schedule: the loop of the method, whatever calls it.

```python
generation = Generation(schedule)
for step in range(T):
    for branch, call in calls:  # conditional, unconditional, ...
        predicted = generation.predict(step, branch)  # None: it has to be computed
        value = generation.computed(step, branch, call()) if predicted is None else predicted
```

All state of the loop is here: cached values, what is left of the schedule, what was counted. It is made when the loop
begins and goes with it. It knows tensors and the schedule, and nothing of pipelines, hooks or threads.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from dpcache.plan.schedule import Schedule, Term

from .sums import keep, weighted_sum, with_correction


@dataclass
class _Held:
    """The cached values of one branch: key step -> value. Steps count from `start`, its first call of this kind."""

    like: Any
    start: int
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, terms: tuple[Term, ...]) -> torch.Tensor:
        return weighted_sum(
            [self.values[term.key_step] for term in terms], [term.coefficient for term in terms], self.device
        )


class Generation:
    """Follows a schedule through one sampling loop.

    Args:
        schedule: what to follow. None where it is known after the first step only: that step is computed in any case,
            and `follow` tells the rest.
        offload: keep cached values in host memory.

    Attributes:
        full_calls: calls computed so far.
        predicted_calls: calls predicted so far.
        peak_bytes: the most bytes that cached values took at any time.
    """

    def __init__(self, schedule: Schedule | None, *, offload: bool = False) -> None:
        self._offload = offload
        self._held: dict[Hashable, _Held] = {}
        #: From which step on -> what is left of the schedule for a branch that begins there.
        self._left: dict[int, Schedule] = {0: schedule} if schedule is not None else {}
        self._abandoned = False
        self._step = 0
        self._computed: set[int] = set()
        self._predicted: set[int] = set()
        self.full_calls = self.predicted_calls = self.peak_bytes = 0

    def follow(self, schedule: Schedule) -> None:
        """Follows this schedule from here on; its steps count from the loop's first."""
        self._left = {0: schedule}

    def abandon(self) -> None:
        """Computes the rest of the loop in full."""
        self._abandoned = True
        self._held.clear()

    def restart(self) -> None:
        """Predicts nothing from what was computed so far: what the model is told has changed."""
        self._held.clear()

    def predict(self, step: int, branch: Hashable, like: Any = None) -> torch.Tensor | None:
        """The value at this step, predicted; None if it has to be computed, and `computed` told of it.

        Args:
            step: 0 to T - 1, never less than in the call before.
            branch: which of the step's calls this is.
            like: what a cached value has to have in common with it, a shape for example. A branch that differs in this
                from its last call starts over, as does one that missed a key step it would be predicted from.

        Raises:
            ValueError: the step lies before the last one.
        """
        if step < self._step:
            raise ValueError(f"steps go forward: step {step} comes after step {self._step}. Make a new Generation.")
        self._step = step
        held = self._held.get(branch)
        if held is not None and held.like == like and not self._undecided:
            terms = self._from(held.start).predictions.get(step - held.start)
            if terms is None:
                return None
            if all(term.key_step in held.values for term in terms):
                self._predicted.add(step)
                self.predicted_calls += 1
                return held.sum(terms)
            held = None
        if held is None or held.like != like:
            self._held[branch] = _Held(like, step)
        return None

    def computed(self, step: int, branch: Hashable, value: torch.Tensor) -> torch.Tensor:
        """Takes note of a value that was computed, after `predict` of the same call returned None.

        Returns:
            what to hand on: the value itself, or, where the schedule says so, a new one that makes up for errors of the
            skipped steps before.
        """
        self._computed.add(step)
        self.full_calls += 1
        if self._abandoned:
            return value
        held = self._held[branch]
        now = step - held.start
        handed_on = value
        if not self._undecided:
            terms = self._from(held.start).corrections.get(now, ())
            handed_on = with_correction(value, now, terms, held.values)
        if self._is_wanted(held, now):
            self._drop(held, now)
            held.values[now] = keep(value, offload=self._offload)
            held.device = value.device
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return handed_on

    def end_step(self, step: int) -> None:
        """Drops what no step after this one needs."""
        for held in self._held.values():
            self._drop(held, step - held.start)

    def close(self) -> None:
        """Ends the loop: nothing is held any more."""
        self._held.clear()

    @property
    def computed_steps(self) -> tuple[int, ...]:
        """Steps whose calls were all computed."""
        return tuple(sorted(self._computed - self._predicted))

    @property
    def predicted_steps(self) -> tuple[int, ...]:
        """Steps with a call that was predicted."""
        return tuple(sorted(self._predicted))

    @property
    def held_values(self) -> int:
        """Values that are cached now."""
        return sum(len(held.values) for held in self._held.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that they take."""
        return sum(value.nbytes for held in self._held.values() for value in held.values.values())

    def will_predict(self, step: int) -> bool:
        """Whether every branch seen so far will be predicted at this step, if its next call is like its last."""
        if self._undecided or not self._held:
            return False
        for held in self._held.values():
            terms = self._from(held.start).predictions.get(step - held.start)
            if terms is None or not all(term.key_step in held.values for term in terms):
                return False
        return True

    @property
    def _undecided(self) -> bool:
        """No schedule says what to do: the loop has just begun, or is computed in full."""
        return self._abandoned or not self._left

    def _from(self, start: int) -> Schedule:
        if start not in self._left:
            self._left[start] = self._left[0].from_step(start)
        return self._left[start]

    def _is_wanted(self, held: _Held, now: int) -> bool:
        """Whether a later step may be predicted from the value at this one."""
        if not self._left:
            return now == 0
        return self._from(held.start).last_uses.get(now, now) > now

    def _drop(self, held: _Held, now: int) -> None:
        """Drops values no later step needs."""
        if held.values and self._left:
            last_uses = self._from(held.start).last_uses
            for key in [key for key in held.values if last_uses.get(key, key) <= now]:
                del held.values[key]
