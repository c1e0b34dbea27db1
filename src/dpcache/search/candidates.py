"""What is tried: sets of key steps from a calibration, from curves and from elsewhere, each with several predictors."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from dpcache.errors import CalibrationError, InfeasibleBudgetError
from dpcache.measure.calibration import Calibration
from dpcache.plan.builtin import builtins
from dpcache.plan.corrections import by_gram, corrected
from dpcache.plan.costs import schedule_costs
from dpcache.plan.curves import EXPONENT, smooth_key_steps
from dpcache.plan.grids import frame
from dpcache.plan.predictors import Predictor, Taylor, Trend
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Boundary, ModelIdentity, Schedule

from .objectives import worst_error
from .sharing import Turns, turns

EXPONENTS = (1.6, 1.9, 2.3, 2.6, 3.2)
TAILS = (0.25, 0.4, 0.7, 1.0)
"""Of the smooth curves that are tried."""
READY_MADE = (9, 13, 21)
"""Key steps of the ready-made schedules of FLUX.1-dev that were run, not drawn between others (`plan.builtin`)."""
READY_MADE_STEPS = 50
SHARES = (1.0, 0.0)
"""Of the measured sensitivity, beside the usual one of plans."""
POWER = 4.0
"""Of a hop's error in the cost of plans that heed the worst inputs and the largest hops, beside the usual 2."""
ALL_CHOICES = 12
"""Up to so many steps every choice of key steps is among the candidates."""


@dataclass(frozen=True)
class Way:
    """How skipped steps are predicted.

    Attributes:
        name: for people.
        predictor: gives the coefficients.
        corrects: whether key steps make up for errors; only with a calibration that knows how the scheduler moves.
    """

    name: str
    predictor: Predictor
    corrects: bool = False

    @property
    def corrected(self) -> "Way":
        """The same with corrections."""
        return replace(self, name=f"{self.name}, corrected", corrects=True)


TREND = Way("trend", Trend())
TAYLOR = tuple(Way(f"Taylor of order {order}", Taylor(order)) for order in (0, 1, 2))
CORRECTED = TAYLOR[2].corrected
TREND_CORRECTED = TREND.corrected
WAYS = (
    TREND,
    *(Way(f"trend of rate {rate:g}", Trend(rate)) for rate in (0.5, 2.0)),
    *TAYLOR,
    CORRECTED,
    TREND_CORRECTED,
    TAYLOR[1].corrected,
)
"""Those that need no fitting, the simplest first."""


@dataclass(frozen=True)
class KeySteps:
    """A choice of key steps, and where it comes from, for people."""

    steps: tuple[int, ...]
    name: str


@dataclass(eq=False)
class Candidate:
    """A schedule that is tried.

    Attributes:
        schedule: the schedule.
        keys: its key steps.
        way: how it predicts.
        is_plain: one of the plain ways, which nothing may be worse than.
        expected: what errors to expect, in a unit of its own, by its cost; None without a calibration.
        errors: number of the judging input -> error.
    """

    schedule: Schedule
    keys: KeySteps
    way: Way
    is_plain: bool = False
    expected: float | None = None
    errors: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.keys.name}, {self.way.name}"


class Candidates:
    """Makes candidates for one number of key steps.

    Args:
        num_key_steps: K.
        num_steps: T.
        calibration: what to plan from; None where none could be made.
        boundary: of the schedules.
        model: of the schedules.
        sigmas: of the schedules.
    """

    def __init__(
        self,
        num_key_steps: int,
        num_steps: int,
        calibration: Calibration | None,
        *,
        boundary: Boundary,
        model: ModelIdentity,
        sigmas: tuple[float, ...] | None,
    ) -> None:
        self.num_key_steps, self.num_steps, self._calibration = num_key_steps, num_steps, calibration
        self._boundary: Boundary = boundary
        self._model, self._sigmas = model, sigmas
        grid = calibration.grid if calibration is not None and len(calibration.gram) else None
        self._frame = frame(grid) if grid is not None else None
        self._made: dict[tuple[tuple[int, ...], str], Candidate] = {}
        self._different: dict[Turns, Candidate] = {}

    def make(self, keys: KeySteps, way: Way) -> Candidate:
        """The candidate with these key steps; the same one every time, and for all ways that come to the same."""
        if (keys.steps, way.name) not in self._made:
            self._made[keys.steps, way.name] = self._candidate(self._schedule(keys.steps, way), keys, way)
        return self._made[keys.steps, way.name]

    def _candidate(self, schedule: Schedule, keys: KeySteps, way: Way) -> Candidate:
        is_plain = keys.steps == self._even.steps and way in TAYLOR
        return self._different.setdefault(
            turns(schedule), Candidate(schedule, keys, way, is_plain, self._expected(schedule))
        )

    def fitted(self, base: Candidate, schedule: Schedule) -> Candidate:
        """The candidate that a base becomes by fitting its coefficients in runs (see `hops.fitted`)."""
        way = Way(f"{base.way.name}, fitted in runs", base.way.predictor, base.way.corrects)
        return self._different.setdefault(turns(schedule), Candidate(schedule, base.keys, way, expected=base.expected))

    def correct(self, candidate: Candidate, schedule: Schedule) -> Schedule:
        """A schedule with corrections, where the candidate has them."""
        return self._corrected(schedule) if candidate.schedule.corrections else schedule

    def usual(self) -> list[Candidate]:
        """What one would do without trying anything, the simplest first: the plain ways, the smooth curve, a plan."""
        ways = [(self._smooth(), TREND), *((self._even, way) for way in TAYLOR)]
        if self._frame is not None:
            ways.append((self._smooth(), TREND_CORRECTED))
        found = [self.make(keys, way) for keys, way in ways]
        if (plan := self._plan(Recipe())) is not None:
            way = TREND if plan.predictor == "trend" else TAYLOR[plan.order]
            way = way.corrected if plan.corrections else way
            found.append(self._candidate(plan, KeySteps(plan.key_steps, "the plan"), way))
        return list(dict.fromkeys(found))

    @cached_property
    def key_steps(self) -> list[KeySteps]:
        """Every choice of key steps, the likeliest first."""
        found: dict[tuple[int, ...], KeySteps] = {}
        kinds = [[self._smooth()], self._planned(), self._curves(), self._scaled(), [self._even], self._choices()]
        for keys in itertools.chain.from_iterable(kinds):
            found.setdefault(keys.steps, keys)
        return list(found.values())

    @property
    def second(self) -> Way:
        """What every choice is tried with beside the trend."""
        return CORRECTED if self._frame is not None else TAYLOR[1]

    def ways(self) -> list[Way]:
        """Those that can be made, the simplest first."""
        found = list(WAYS)
        if self._calibration is not None and len(self._calibration.gram):
            fitted = Way("fitted of order 1", self._calibration.predictor("fitted", 1))
            found += [fitted, fitted.corrected]
        return [way for way in found if not way.corrects or self._frame is not None]

    def _schedule(self, key_steps: Sequence[int], way: Way) -> Schedule:
        made = Schedule.from_key_steps(
            key_steps, self.num_steps, predictor=way.predictor, boundary=self._boundary, model=self._model
        ).model_copy(update={"sigmas": self._sigmas})
        return self._corrected(made) if way.corrects else made

    def _corrected(self, made: Schedule) -> Schedule:
        if self._frame is None or self._calibration is None:
            return made
        return corrected(made, self._frame, by_gram(self._calibration.gram.mean(axis=0), self._frame.moves))

    def _expected(self, schedule: Schedule) -> float | None:
        """The root of its cost, mean over the dearest quarter of the recorded inputs: these make the bad pictures."""
        if self._calibration is None or not len(self._calibration.gram):
            return None
        costs = schedule_costs(self._calibration.gram, self._calibration.weights(), schedule)
        return math.sqrt(worst_error(costs.tolist()))

    def _smooth(self) -> KeySteps:
        return KeySteps(smooth_key_steps(self.num_key_steps, self.num_steps), "the smooth curve")

    @cached_property
    def _even(self) -> KeySteps:
        return KeySteps(Schedule.uniform(self.num_key_steps, self.num_steps).key_steps, "even spacing")

    def _planned(self) -> Iterator[KeySteps]:
        if self._calibration is None:
            return
        recipes = {f"a plan for order {order}": Recipe(order=order) for order in (2, 1, 0)}
        recipes["a plan for the trend"] = Recipe("trend")
        named = dict(recipes)
        named |= {
            f"{name}, errors to the power {POWER:g}": replace(recipe, power=POWER) for name, recipe in recipes.items()
        }
        for share in SHARES if self._calibration.is_measured else ():
            what = f"{share:.0%} of the measured sensitivity"
            named |= {f"{name}, {what}": replace(recipe, measured=share) for name, recipe in recipes.items()}
        if not len(self._calibration.gram):
            named = {"the paper's plan": Recipe(method="paper")}
        for name, recipe in named.items():
            if (plan := self._plan(recipe)) is not None:
                yield KeySteps(plan.key_steps, name)

    def _plan(self, recipe: Recipe) -> Schedule | None:
        if self._calibration is None:
            return None
        try:
            return self._calibration.plan(self.num_key_steps, recipe=recipe)
        except (CalibrationError, InfeasibleBudgetError):
            return None

    def _curves(self) -> Iterator[KeySteps]:
        """The nearest to the usual curve first."""
        pairs = itertools.product(EXPONENTS, TAILS)
        for exponent, tail in sorted(pairs, key=lambda one: abs(one[0] - EXPONENT) + abs(one[1] - TAILS[1])):
            steps = smooth_key_steps(self.num_key_steps, self.num_steps, exponent=exponent, tail=tail)
            yield KeySteps(steps, f"a smooth curve (exponent {exponent:g}, tail {tail:g})")

    def _scaled(self) -> Iterator[KeySteps]:
        """The shapes that are ready made, of the nearest number of key steps first."""
        flux = builtins()["flux1-dev"]
        shapes = [flux.plans[count].key_steps for count in READY_MADE]
        for shape in sorted(shapes, key=lambda one: abs(np.log(len(one) / self.num_key_steps))):
            yield KeySteps(scaled(shape, self.num_key_steps, self.num_steps), f"FLUX's best {len(shape)} of 50")

    def _choices(self) -> Iterator[KeySteps]:
        """All there are, those like the smooth curve first."""
        if self.num_steps > ALL_CHOICES:
            return
        usual = np.array(self._smooth().steps[1:])
        rest = itertools.combinations(range(1, self.num_steps), self.num_key_steps - 1)
        for some in sorted(rest, key=lambda steps: int(np.abs(np.array(steps, dtype=int) - usual).sum())):
            yield KeySteps((0, *some), "one of all choices")


def scaled(shape: Sequence[int], num_key_steps: int, num_steps: int) -> tuple[int, ...]:
    """Key steps of another K and T on the same curve, t / T over m / (K - 1); moved on where two would be one.

    Args:
        shape: key steps of `READY_MADE_STEPS`.
        num_key_steps: K, 1 to T.
        num_steps: T.
    """
    places = np.linspace(0, len(shape) - 1, num_key_steps)
    wanted = np.interp(places, np.arange(len(shape)), np.array(shape) / READY_MADE_STEPS * num_steps)
    found = [0]
    for place, step in enumerate(np.rint(wanted).astype(int).tolist()[1:], start=1):
        found.append(min(max(step, found[-1] + 1), num_steps - num_key_steps + place))
    return tuple(found)
