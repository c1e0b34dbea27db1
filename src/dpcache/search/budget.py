"""What a search may spend: full runs, or time."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

from dpcache.checks import number
from dpcache.progress import duration

_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "m": 60, "minute": 60, "h": 3600, "hour": 3600}


def parsed(budget: Any) -> tuple[float, bool]:
    """The budget as a number, and whether that is seconds; else it is full runs.

    Raises:
        TypeError: neither a number nor a text.
        ValueError: not above 0, or a text that is no time.
    """
    if not isinstance(budget, str):
        return number("budget", budget, 0, above=True), False
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", budget)
    unit = found[2] if found else ""
    seconds = _SECONDS.get(unit) or _SECONDS.get(unit.removesuffix("s"))
    if found is None or (unit and seconds is None):
        raise ValueError(
            f'budget must be a number of full runs, or a time like "15 min", "90 s" or "2 h"; got {budget!r}.'
        )
    return number("budget", float(found[1]), 0, above=True) * (seconds or 1), bool(unit)


class Budget:
    """Counts what is spent.

    Everything is counted in steps computed in full. Where the budget is a time, what a run takes is learned from those
    before it.

    Args:
        budget: full runs, or a time (see `parsed`).
        num_steps: T.
        clock: gives seconds.

    Attributes:
        runs: of the pipeline so far, whatever they computed.
        steps: computed so far.
    """

    def __init__(self, budget: "float | str", num_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total, self.is_time = parsed(budget)
        self.num_steps = num_steps
        self._clock, self._start = clock, clock()
        self.runs = self.steps = 0
        #: Of runs in earlier processes, seconds.
        self._earlier = 0.0
        self._per_step = self._per_run = 0.0
        self._beside: list[float] = []

    def spent(self) -> float:
        """In the budget's unit, full runs or seconds."""
        if self.is_time:
            return self._clock() - self._start + self._earlier
        return self.steps / self.num_steps

    def cost(self, steps: float) -> float:
        """What a run that computes so many steps costs, in the budget's unit."""
        return self._per_run + self._per_step * steps if self.is_time else steps / self.num_steps

    def affords(self, steps: float, reserve: float = 0.0) -> bool:
        """Whether a run that computes so many steps is within the budget, and leaves a reserve."""
        # Sums of fractions are not exact.
        return self.spent() + self.cost(steps) + reserve <= self.total * (1 + 1e-9)

    def left(self) -> float:
        """In the budget's unit."""
        return max(0.0, self.total - self.spent())

    def count(self, steps: int, seconds: float, *, earlier: bool = False) -> None:
        """A run has computed so many steps, in this process or an earlier one."""
        self.runs += 1
        self.steps += steps
        self._earlier += seconds if earlier else 0.0
        if steps == self.num_steps:  # the first one also pays for what is set up once
            rate = seconds / steps
            self._per_step = min(self._per_step, rate) if self._per_step else rate
        else:
            self._beside.append(max(0.0, seconds - self._per_step * steps))
            self._per_run = math.fsum(self._beside) / len(self._beside)

    def settle(self, num_steps: int) -> None:
        """After the first full run: it has taken so many steps, which may be fewer than it was called for."""
        self._per_step *= self.num_steps / num_steps
        self.num_steps = self.steps = num_steps

    def seconds_per_full_run(self) -> float:
        """As far as is known."""
        return self._per_step * self.num_steps + self._per_run

    def __str__(self) -> str:
        if self.is_time:
            return f"{duration(self.spent())} of {duration(self.total)}"
        return f"{self.spent():.1f} of {self.total:g} full runs"
