"""One way to plan: who predicts, what an error costs, and which steps are key steps in any case."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from typing_extensions import Self

from dpcache.checks import number, one_of, whole

PredictorName = Literal["taylor", "trend", "fitted"]
Method = Literal["sampler", "paper"]


@dataclass(frozen=True)
class Recipe:
    """How to plan. The defaults make a good plan; `dpcache.optimize` runs candidates of many kinds and keeps the best.

    Attributes:
        predictor: what predicts skipped steps. `"taylor"`, a Taylor series of differences between key steps, needs no
            fitting; nor does `"trend"`, a line that bends to a halt (see `plan.predictors.Trend`), of order 1, which is
            safer where key steps are few and errors large; `"fitted"` has the least mean square error on the
            calibration's inputs, which is better with many inputs and few key steps, and worse on inputs unlike them.
            None: Taylor where the plan's errors are small, or an order is given, or the paper's method; else the one
            of Taylor's orders and the trend that plans cheapest at that K.
        order: of the prediction, 0 or more: one less than the number of key steps it uses. Higher orders follow curves
            more closely, magnify rounding and noise, and hold one more value in memory each. None: that of the
            calibration, where the predictor is named.
        measured: weight of the measured sensitivity, 0 to 1. At 0 an error counts as far as the scheduler
            moves on it in that step; at 1 as far as the final sample was measured to move; between, the weighted
            geometric mean. Above 0 it needs a calibration with `sensitivity="measured"`. None: 0.5 where that was
            measured, else 0.
        method: what an error costs. `"sampler"`: what it does to the sample, errors of a hop added up with their signs
            as the sampler adds them. `"paper"`: mean absolute errors of the cached values, as DPCache has it; needs
            nothing of the scheduler, knows one order, no other grid, and plans worse.
        power: above 0, of a hop's error in its cost. 2 adds hops up as errors that know nothing of each other; with
            more, single large errors weigh heavier.
        first_key_steps: steps 0 .. first_key_steps - 1 are key steps. More of them are safer where the first steps make
            the picture, and leave fewer for the rest. None: 3 with the paper's method, as there, and 1 otherwise, where
            the cost itself says what the first steps are worth.
        last_key_steps: steps T - last_key_steps .. T - 1 are key steps: spares details that the last steps make.
        max_gap: largest distance from one key step to the next, the end included; None for no limit. A limit keeps
            predictions near what is known, and makes planning long grids fast.
        correct: whether key steps make up for errors of the skipped steps before them (see `dpcache.plan.corrections`):
            nearer to the full run at no further call, where the scheduler's steps are of a known kind and errors are
            small. None: where the plan's errors are small enough, but never with the paper's method.

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
        ValueError: an unknown name or a number out of range.
    """

    predictor: PredictorName | None = None
    order: int | None = None
    measured: float | None = None
    method: Method = "sampler"
    power: float = 2.0
    first_key_steps: int | None = None
    last_key_steps: int = 0
    max_gap: int | None = None
    correct: bool | None = None

    def __new__(cls, *values: Any, **named: Any) -> Self:
        # The message of Python's own does not say which fields there are.
        if unknown := set(named) - set(RECIPE_FIELDS):
            raise TypeError(f"a Recipe has no {', '.join(sorted(unknown))}: it has {', '.join(RECIPE_FIELDS)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.predictor is not None:
            one_of("predictor", self.predictor, get_args(PredictorName))
        one_of("method", self.method, get_args(Method))
        if self.measured is not None:
            number("measured", self.measured, 0, 1)
        number("power", self.power, 0, above=True)
        for name, least in (("order", 0), ("first_key_steps", 0), ("last_key_steps", 0), ("max_gap", 1)):
            value = getattr(self, name)
            if value is not None or name == "last_key_steps":
                object.__setattr__(self, name, whole(name, value, least))
        if self.predictor == "trend" and self.order not in (None, 1):
            raise ValueError(f"the trend is of order 1, got {self.order}: leave the order out.")
        if self.correct is not None and not isinstance(self.correct, bool):
            raise TypeError(f"correct must be True, False or None, got {self.correct!r}.")

    @property
    def forced_first(self) -> int:
        """How many first steps are key steps."""
        if self.first_key_steps is not None:
            return self.first_key_steps
        return 3 if self.method == "paper" else 1

    def __str__(self) -> str:
        order = "" if self.order is None else f" of order {self.order}"
        named = self.predictor or ("any predictor" if self.order is None else "taylor")
        parts = [f"{named}{order}, {self.method} cost"]
        if self.measured is not None:
            parts.append(f"{self.measured:.0%} of the measured sensitivity")
        if self.power != 2:
            parts.append(f"errors to the power {self.power:g}")
        if self.first_key_steps is not None:
            parts.append(f"{self.first_key_steps} forced at the start")
        if self.last_key_steps:
            parts.append(f"{self.last_key_steps} forced at the end")
        if self.max_gap is not None:
            parts.append(f"hops of at most {self.max_gap}")
        if self.correct is not None:
            parts.append("corrected" if self.correct else "not corrected")
        return ", ".join(parts)


#: In the order in which they may be given without a name.
RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))


def require_recipe(recipe: object) -> None:
    """Raises TypeError where something else than a Recipe was given."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f'recipe must be a dpcache.Recipe, like Recipe(method="paper"), got {recipe!r}.')
