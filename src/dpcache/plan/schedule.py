"""Schedule: which steps are computed in full, and how every other step is predicted. A validated JSON file."""

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from dpcache.checks import number, one_of, whole
from dpcache.errors import FileFormatError, GridError
from dpcache.files.cards import Rows, fact_rows
from dpcache.files.hub import HubFile
from dpcache.files.whole import MAKERS, check_version, read_bytes, write_whole

from .curves import key_steps_for, smooth_key_steps
from .levels import noise_levels
from .predictors import Predictor, Taylor, Trend

Boundary = Literal["blocks", "output"]

FORMAT = "dpcache.schedule"
VERSION = 4


class ModelIdentity(BaseModel):
    """Which denoiser something was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoiser: str = Field(description="Class name of the denoiser, for example FluxTransformer2DModel.")
    config: str | None = Field(
        default=None, description="Digest of the denoiser's configuration; None admits every model of the class."
    )
    weights: str | None = Field(
        default=None,
        description="Digest of some of its weights; left out where they were not read. The nodes for ComfyUI read "
        "them, and warn where they are others.",
    )

    @model_serializer(mode="wrap")
    def _without_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files of models whose weights were not read are as earlier releases read them."""
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if name != "weights" or value is not None}

    def admits(self, other: "ModelIdentity") -> bool:
        """Whether what was made for this model may be used with the other, whatever its weights."""
        return self.denoiser == other.denoiser and self.config in (None, other.config)

    def is_same(self, other: "ModelIdentity") -> bool:
        """Whether the other is the same as far as is known, weights included."""
        return self.admits(other) and (None in (self.weights, other.weights) or self.weights == other.weights)


class Term(BaseModel):
    """One cached value's share in a prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key_step: int = Field(ge=0, description="The key step whose cached value is used.")
    coefficient: float = Field(description="What it is multiplied by.")


class Schedule(HubFile, BaseModel):
    """The key steps of a sampling run, and the prediction of every step between them.

    Immutable; made by `Calibration.plan` or `Schedule.from_key_steps`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    KIND: ClassVar[str] = "schedule"
    FILE_NAME: ClassVar[str] = "schedule.json"

    num_inference_steps: int = Field(ge=1, description="T: steps of the sampling loop the schedule covers.")
    key_steps: tuple[int, ...] = Field(description="Steps at which the denoiser runs in full: increasing, first is 0.")
    boundary: Boundary = Field(
        description='What is cached and predicted: "blocks", the last transformer block\'s output, or "output", the '
        "denoiser's."
    )
    predictor: str = Field(description='Where the coefficients come from, for example "taylor".')
    order: int = Field(ge=0, description="Highest order of the prediction: it uses at most order + 1 cached values.")
    predictions: dict[int, tuple[Term, ...]] = Field(
        description="For every skipped step, the linear combination of cached values that predicts it."
    )
    corrections: dict[int, tuple[Term, ...]] = Field(
        default_factory=dict,
        description="For some key steps, the linear combination of cached values, its own among them, that is added to "
        "what it hands on; it makes up for errors of the skipped steps before it. What it caches stays as computed.",
    )
    model: ModelIdentity | None = Field(default=None, description="The model it was made for; None admits any.")
    sigmas: tuple[float, ...] | None = Field(
        default=None,
        description="The noise levels it was planned for, T and where the last step ends; None where not known.",
    )
    cost: float | None = Field(default=None, description="The plan's cost, in the unit of its calibration.")
    error: float | None = Field(
        default=None,
        description="Measured: root mean square difference of what the pipeline returns from its full run, as a "
        "fraction of that; mean over inputs.",
    )
    expected_error: float | None = Field(default=None, description="Likewise, but computed from a calibration.")
    source: str | None = Field(default=None, description="How it came about, for people.")

    @classmethod
    def from_key_steps(
        cls,
        key_steps: Sequence[int],
        num_inference_steps: int,
        *,
        order: int = 2,
        predictor: Predictor | None = None,
        boundary: Boundary = "blocks",
        model: ModelIdentity | None = None,
        cost: float | None = None,
        source: str | None = None,
    ) -> Self:
        """Schedule with predictions between key steps of your choice.

        Args:
            key_steps: increasing, the first is 0.
            num_inference_steps: T, more than the last key step.
            order: order of the Taylor prediction; grows from 0 as key steps arrive.
            predictor: what predicts instead of Taylor; `order` is not used then.
            boundary: what is cached, `"blocks"` or `"output"`.
            model: the model it is for; None lets it run on any.
            cost: kept in the schedule, for people.
            source: kept in the schedule, for people.

        Raises:
            TypeError: key steps, steps or order that are not whole numbers.
            ValueError: key steps not increasing from 0, or beyond the last step; or an unknown boundary.
        """
        num_inference_steps = whole("num_inference_steps", num_inference_steps, 1)
        keys = _whole_key_steps(key_steps)
        _check_key_steps(keys, num_inference_steps)
        one_of("boundary", boundary, get_args(Boundary))
        predictor = predictor or Taylor(order)
        predictions = {}
        for step in sorted(set(range(num_inference_steps)) - set(keys)):
            passed = [key for key in keys if key < step]
            coefficients = predictor.coefficients(passed, [step])[0]
            predictions[step] = tuple(
                Term(key_step=key, coefficient=float(c))
                for key, c in zip(passed[-len(coefficients) :], coefficients, strict=True)
            )
        return cls(
            num_inference_steps=num_inference_steps,
            key_steps=keys,
            boundary=boundary,
            predictor=predictor.name,
            order=predictor.order,
            predictions=predictions,
            model=model,
            cost=cost,
            source=source,
        )

    @classmethod
    def uniform(cls, num_key_steps: int, num_inference_steps: int, *, order: int = 2, **more: Any) -> Self:
        """Key steps at even intervals (the first step included): the baseline every plan should beat.

        Key n falls on floor(n T / K). `more` goes to `from_key_steps`.
        """
        num_inference_steps = whole("num_inference_steps", num_inference_steps, 1)
        num_key_steps = whole("num_key_steps", num_key_steps, 1, num_inference_steps)
        keys = [n * num_inference_steps // num_key_steps for n in range(num_key_steps)]
        return cls.from_key_steps(keys, num_inference_steps, order=order, source="uniform interval", **more)

    @classmethod
    def smooth(cls, num_key_steps: int, num_inference_steps: int, **more: Any) -> Self:
        """Key steps on a smooth curve, others predicted by a saturating trend: what to use when nothing was measured.

        Dense where composition is decided, ever wider apart after that (see `plan.curves`), and never far off however
        long a hop is (see `plan.predictors.Trend`). `more` goes to `from_key_steps`.

        Raises:
            TypeError, ValueError: K is not a whole number from 1 to T.
        """
        keys = smooth_key_steps(num_key_steps, num_inference_steps)
        more = {"predictor": Trend(), "source": "smooth curve, nothing calibrated", **more}
        return cls.from_key_steps(keys, num_inference_steps, **more)

    @classmethod
    def for_sampler(
        cls, scheduler: Any, num_key_steps: int | None = None, *, speedup: float | None = None, **more: Any
    ) -> Self:
        """`Schedule.smooth` for a scheduler's own steps, which the schedule then knows.

        `enable(pipe, num_key_steps=K)` follows the same and, where T / K is at most 4, corrects as well: it sees how
        the scheduler moves the sample.

        Args:
            scheduler: a scheduler of diffusers on which `set_timesteps` has been called.
            num_key_steps: K.
            speedup: T / K instead.
            more: goes to `from_key_steps`; the boundary is `"output"` unless given.

        Raises:
            GridError: `set_timesteps` has not been called.
            TypeError, ValueError: not exactly one of number and speedup, or one out of range.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
            raise GridError(
                f"{type(scheduler).__name__} does not know its steps yet: call scheduler.set_timesteps(50) first."
            )
        if (num_key_steps is None) == (speedup is None):
            raise ValueError("give one of num_key_steps and speedup.")
        steps = len(timesteps)
        if num_key_steps is None:
            num_key_steps = key_steps_for(number("speedup", speedup, 1), steps)
        schedule = cls.smooth(num_key_steps, steps, **{"boundary": "output", **more})
        return schedule.model_copy(update={"sigmas": noise_levels(scheduler)})

    @classmethod
    def builtin(cls, name: str, num_key_steps: int) -> "Schedule":
        """A schedule that ships with the package: no calibration needed.

        Args:
            name: one of `builtin_names`.
            num_key_steps: K.

        Raises:
            UnknownModelError: there are none of this name.
            ValueError: there is none with this many key steps.
        """
        from .builtin import builtin_schedule

        return builtin_schedule(name, num_key_steps)

    @classmethod
    def builtin_names(cls) -> dict[str, tuple[int, ...]]:
        """Names of the schedules that ship with the package, each with the numbers of key steps there are."""
        from .builtin import builtins

        return {name: tuple(one.plans) for name, one in builtins().items()}

    def from_step(self, start: int) -> Self:
        """What is left of the schedule where nothing from before a step is known; steps count from there.

        That step is a key step, as are as many after it as stand in a row at the schedule's own beginning: without a
        past a prediction knows little. Predictions from key steps that are not known are made anew, by Taylor.

        Args:
            start: the first step left, 0 to T - 1.

        Raises:
            TypeError, ValueError: it is none of these.
        """
        if whole("start", start, 0, self.num_inference_steps - 1) == 0:
            return self
        row = next((n for n, key in enumerate(self.key_steps) if key != n), len(self.key_steps))
        left = self.num_inference_steps - start
        keys = sorted({*range(min(row, left)), *(key - start for key in self.key_steps if key >= start)})
        late = self.from_key_steps(
            keys, left, order=self.order, boundary=self.boundary, model=self.model, source=self.source
        )
        known = {
            step: tuple(Term(key_step=term.key_step - start, coefficient=term.coefficient) for term in terms)
            for step in late.predictions
            if (terms := self.predictions[step + start])[0].key_step >= start
        }
        kept: dict[str, Any] = {"predictor": self.predictor, "predictions": {**late.predictions, **known}}
        hops = pairwise(late.key_steps)
        # A correction fits the predictions that it was made for.
        as_planned = {key for before, key in hops if all(step in known for step in range(before + 1, key))}
        kept["corrections"] = {
            key - start: tuple(Term(key_step=term.key_step - start, coefficient=term.coefficient) for term in terms)
            for key, terms in self.corrections.items()
            if terms[0].key_step >= start and key - start in as_planned
        }
        kept["sigmas"] = self.sigmas and self.sigmas[start:]
        return late.model_copy(update=kept)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but what was computed from the fields is computed anew."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("last_uses", None)
        return copied

    @cached_property
    def last_uses(self) -> dict[int, int]:
        """For every key step, the last step that is made from it; the key step itself if there is none."""
        uses = {key: key for key in self.key_steps}
        for step, terms in sorted([*self.predictions.items(), *self.corrections.items()]):
            uses.update({term.key_step: step for term in terms})
        return uses

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = self.key_steps
        _check_key_steps(keys, self.num_inference_steps)
        if len(keys) + len(self.predictions) != self.num_inference_steps:  # which may be any number in a broken file
            raise ValueError(
                f"predictions must cover the skipped steps and no others; there are {len(self.predictions)}"
            )
        skipped = set(range(self.num_inference_steps)) - set(keys)
        if set(self.predictions) != skipped:
            odd = sorted(skipped ^ set(self.predictions))
            raise ValueError(f"predictions must cover the skipped steps and no others; see steps {odd}")
        if self.sigmas is not None and len(self.sigmas) != self.num_inference_steps + 1:
            raise ValueError(f"sigmas must be {self.num_inference_steps + 1} noise levels, got {len(self.sigmas)}")
        for step, terms in self.predictions.items():
            used = [term.key_step for term in terms]
            if not used or len(used) > self.order + 1 or sorted(set(used)) != used:
                raise ValueError(f"step {step} must be predicted from 1 to {self.order + 1} different key steps")
            if not set(used) <= set(keys) or used[-1] >= step:
                raise ValueError(f"step {step} must be predicted from key steps before it, got {used}")
        for key, terms in self.corrections.items():
            used = [term.key_step for term in terms]
            if key not in keys or not used or len(used) > self.order + 2 or sorted(set(used)) != used:
                raise ValueError(f"key step {key} must be corrected by 1 to {self.order + 2} different key steps")
            if not set(used) <= set(keys) or used[-1] > key:
                raise ValueError(f"key step {key} must be corrected by key steps up to itself, got {used}")
        return self

    @property
    def num_key_steps(self) -> int:
        """K: number of steps computed in full."""
        return len(self.key_steps)

    @property
    def ideal_speedup(self) -> float:
        """T / K: the speedup if skipped steps cost nothing."""
        return self.num_inference_steps / len(self.key_steps)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes the schedule as JSON, whole or not at all."""
        body = self.model_dump(mode="json")
        document = {"format": FORMAT, "version": VERSION, "digest": _digest(body), **body}
        text = json.dumps(document, indent=1) + "\n"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self:
        """Reads a schedule written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, edited, of another version, or no schedule.
        """
        remedy = f"Make it anew with {MAKERS['schedule']}."
        try:
            document = json.loads(read_bytes(path, "schedule").decode("utf-8"))
        except FileFormatError:
            raise
        except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
            raise FileFormatError(f"{path} is not a whole JSON file ({error}). {remedy}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise FileFormatError(f"{path} is not a dpcache schedule. {remedy}")
        check_version(path, "schedule", document.pop("version", None), VERSION)
        digest = document.pop("digest", None)
        try:
            schedule = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "schedule"
            raise FileFormatError(f"{path} is not a valid schedule: {where}: {first['msg']}. {remedy}") from error
        except RecursionError as error:
            raise FileFormatError(f"{path} is not a valid schedule: it is nested too deep. {remedy}") from error
        if digest != _digest(schedule.model_dump(mode="json")):
            raise FileFormatError(
                f"{path} was edited after it was written: its digest does not match. {remedy} "
                "For key steps of your own use `Schedule.from_key_steps`."
            )
        return schedule

    def _card_rows(self) -> Rows:
        speedup = ("T / K", f"{self.ideal_speedup:.2f}", "The speedup if skipped steps cost nothing.")
        return [("K", str(self.num_key_steps), "Steps computed in full."), speedup, *fact_rows(self)]

    def _card_texts(self, arguments: str) -> tuple[str, str]:
        usage = (
            "import dpcache\n"
            f"schedule = dpcache.Schedule.from_pretrained({arguments})\n"
            "with dpcache.enabled(pipe, schedule):\n"
            f"    output = pipe(prompt, num_inference_steps={self.num_inference_steps})"
        )
        return "Which steps of the sampling loop to compute in full, and how to predict the others.", usage

    def __repr__(self) -> str:
        parts = [f"K={len(self.key_steps)} of {self.num_inference_steps}", f"boundary={self.boundary!r}"]
        parts.append(f"{self.predictor} order {self.order}")
        if self.corrections:
            parts.append(f"{len(self.corrections)} corrections")
        if self.model is not None:
            parts.append(f"for {self.model.denoiser}")
        return f"Schedule({', '.join(parts)})"

    def __str__(self) -> str:
        return f"{len(self.key_steps)} of {self.num_inference_steps} steps in full ({listed(self.key_steps)})"


def listed(steps: Sequence[int]) -> str:
    """Steps for people: those in a row by the first and the last of them, like "0 to 3, 7, 12"."""
    found: list[str] = []
    for _, row in itertools.groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0]):
        numbers = [step for _, step in row]
        found += [f"{numbers[0]} to {numbers[-1]}"] if len(numbers) > 2 else map(str, numbers)
    return ", ".join(found)


def _whole_key_steps(key_steps: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(step) for step in key_steps)
    except TypeError:
        raise TypeError(f"key_steps must be whole numbers, like [0, 3, 7], got {key_steps!r}.") from None


def _check_key_steps(keys: tuple[int, ...], num_steps: int) -> None:
    if not keys or keys[0] != 0 or any(b <= a for a, b in pairwise(keys)):
        raise ValueError(f"key_steps must increase and start with 0, got {list(keys)}")
    if keys[-1] >= num_steps:
        raise ValueError(f"key step {keys[-1]} is not one of the {num_steps} steps from 0")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
