"""One pipeline class looked at from outside: does it run, and does it keep its promises with dpcache enabled?"""

import inspect
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import dpcache
from dpcache.errors import DPCacheError, UnsupportedPipelineError
from dpcache.plan.levels import noise_levels
from dpcache.run.denoisers import find_denoisers
from tests.pipelines.looking import Skip, counted, in_full, layers_of, same, skipped_calls, stepped, tensors
from tests.pipelines.small import Built

STEPS = 6
#: Key steps of loops of this many steps at least; the prediction is of first order.
KEYS = (0, 1, 3)

#: Their loops leave out the last step of the grid. Only noise levels tell, as schedules from a calibration have them.
LEAVES_THE_LAST_STEP = ("LTXI2VLongMultiPromptPipeline",)

RIGHT, FAILS, REFUSED, NOT_DESCRIBED = "right", "fails", "refused", "not described"


class Wrong(Exception):
    """A promise that was not kept."""


@dataclass
class Found:
    """What was found of one pipeline class.

    Attributes:
        denoiser: class of what it calls at every step, as the library finds it.
        runs: empty if the plain call works, else why not.
        steps: what the loop of the plain call takes.
        others: networks beside the denoiser that are called at every step: class -> calls.
        verdicts: at "output", at "blocks", and for a calibration with a plan from it.
        reasons: first line of why a verdict is not "right".
    """

    denoiser: str = ""
    runs: str = ""
    steps: int = 0
    others: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def examine(build: Callable[[], Built], *, blocks: bool = True, plans: bool = True) -> Found:
    """Builds a pipeline and tries everything."""
    found = Found()
    try:
        pipe, arguments = build()
        subject = Subject(pipe, arguments)
    except Exception as error:
        found.runs = _line(error)
        return found
    found.steps, found.others, found.denoiser = subject.steps, subject.others, subject.denoiser
    checks: dict[str, Callable[[], None]] = {"output": lambda: check(subject, "output")}
    if blocks:
        checks["blocks"] = lambda: check(subject, "blocks")
    if plans:
        checks["plan"] = lambda: check_plan(subject)
    for name, run in checks.items():
        try:
            run()
            found.verdicts[name] = RIGHT
        except UnsupportedPipelineError as error:
            missing = name == "blocks" and "are described only for" in str(error)
            found.verdicts[name] = NOT_DESCRIBED if missing else REFUSED
            found.reasons[name] = "" if missing else _line(error)
        except Exception as error:
            found.verdicts[name] = FAILS
            found.reasons[name] = _line(error)
            subject.release()
    return found


class Subject:
    """A pipeline with the arguments of its call, and what its plain call does."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.pipe = pipe
        takes = _parameters(type(pipe))
        defaults = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        self.arguments = {**{name: value for name, value in defaults.items() if name in takes}, **arguments}
        self.seeded = "generator" in takes
        self.events: list[Any] = []
        parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
        with counted(parts) as runs, stepped(pipe, self.events, parts):
            self.plain = self.draw()
        if not same(self.draw(), self.plain):
            raise Wrong("the plain call does not give the same twice")
        if not all(bool(torch.isfinite(value).all()) for value in self.plain if value.is_floating_point()):
            raise Wrong("the plain call gives NaN")
        try:
            self.denoisers = find_denoisers(pipe)
        except DPCacheError:
            self.denoisers = []
        stepping = Counter(event for event in self.events if isinstance(event, int))
        loops = self._loops()
        self.steps = loops[0] if loops else max(stepping.values(), default=0)
        self.denoiser = type(self.denoisers[0]).__name__ if self.denoisers else ""
        names = {id(denoiser): type(denoiser).__name__ for denoiser in self.denoisers}
        self.others = {
            f"{name}: {type(part).__name__}": runs[name][0]
            for name, part in parts.items()
            if runs[name][0] >= max(self.steps, 2) and id(part) not in names
        }

    def draw(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        np.random.seed(0)
        generator = {"generator": torch.Generator().manual_seed(0)} if self.seeded else {}
        return tensors(self.pipe(**{**self.arguments, **generator}))

    def _loops(self) -> list[int]:
        """How many steps the pipeline's own scheduler takes in each of its sampling loops."""
        loops = [0]
        for event in self.events:
            if event == "begin":
                loops.append(0)
            elif event == "step":
                loops[-1] += 1
        return [steps for steps in loops if steps]

    def release(self) -> None:
        """Takes dpcache off after a failure."""
        with suppress(DPCacheError):
            dpcache.disable(self.pipe)


def check(subject: Subject, boundary: Any) -> None:
    """The promises at one boundary; raises Wrong, or what the library raised."""
    pipe, steps = subject.pipe, subject.steps
    if steps < 4:
        with dpcache.enabled(pipe, dpcache.Schedule.from_key_steps(KEYS, STEPS, order=1, boundary=boundary)):
            subject.draw()
        raise Wrong(f"the scheduler took {steps} steps")
    full = dpcache.Schedule.from_key_steps(range(steps), steps, boundary=boundary)
    schedule = dpcache.Schedule.from_key_steps(KEYS, steps, order=1, boundary=boundary)
    if type(pipe).__name__ in LEAVES_THE_LAST_STEP and (levels := noise_levels(pipe.scheduler)) is not None:
        full, schedule = (one.model_copy(update={"sigmas": levels[: steps + 1]}) for one in (full, schedule))
    with dpcache.enabled(pipe, full):
        if not same(subject.draw(), subject.plain):
            raise Wrong("all key steps give other bits than the plain call")
    layers = {
        f"{n}.{m}": layer for n, d in enumerate(subject.denoisers) for m, layer in enumerate(layers_of(d, boundary))
    }
    with counted(layers) as runs:
        plain = subject.draw()
        all_runs = {name: count for name, (count,) in runs.items()}
    if not same(plain, subject.plain):
        raise Wrong("after disable the plain call gives other bits")
    with warnings.catch_warnings(record=True) as caught, dpcache.enabled(pipe, schedule):
        warnings.simplefilter("always")
        skips: list[Skip] = []
        looked_at = subject.denoisers if boundary == "blocks" else []
        with counted(layers) as runs, skipped_calls(looked_at, skips):
            first = subject.draw()
        stats = dpcache.stats(pipe)
        again = subject.draw()
    told = [str(w.message) for w in caught if "computed in full" in str(w.message)]
    if told:
        raise Wrong(told[0])
    if not stats.predicted_calls:
        raise Wrong("no call was predicted")
    calls, expected = _calls(subject), expected_runs(subject, schedule)
    for name, (count,) in runs.items():
        denoiser = int(name.split(".")[0])
        if all_runs[name] == calls[denoiser] and count != expected[denoiser]:
            raise Wrong(f"{count} of {all_runs[name]} runs of a layer in the denoiser, {expected[denoiser]} expected")
    if not same(again, first):
        raise Wrong("the second generation differs from the first")
    if not same(subject.draw(), subject.plain):
        raise Wrong("after disable the plain call gives other bits")
    if boundary == "blocks" and not skips:
        raise Wrong("no call was seen in which the last block did not run")
    if not all(same(in_full(skip), skip.output) for skip in skips):
        raise Wrong("a skipped step is not what the head makes of the predicted value")


def check_plan(subject: Subject) -> None:
    """A calibration, a plan from it, and a call that follows it."""
    arguments = dict(subject.arguments)
    steps = arguments.pop("num_inference_steps", STEPS)
    calibration = dpcache.calibrate(
        subject.pipe, [arguments], num_inference_steps=steps, boundary="output", order=1, progress=False
    )
    plan = calibration.plan(max(2, subject.steps // 2))
    with dpcache.enabled(subject.pipe, plan):
        subject.draw()
        if not dpcache.stats(subject.pipe).predicted_calls:
            raise Wrong("no call was predicted by a plan")
    if not same(subject.draw(), subject.plain):
        raise Wrong("after calibrating and disabling the plain call gives other bits")


def _calls(subject: Subject) -> list[int]:
    """Calls of each denoiser in the plain call."""
    return [sum(isinstance(e, tuple) and e[0] is denoiser for e in subject.events) for denoiser in subject.denoisers]


def expected_runs(subject: Subject, schedule: Any) -> list[int]:
    """Real runs to be expected of each denoiser: its calls at key steps.

    A call that comes in at a later step, or whose inputs take another shape there, begins anew with what is left of the
    schedule.
    """
    counts = [0 for _ in subject.denoisers]
    begun: dict[Any, tuple[Any, int]] = {}
    numbers: Counter[int] = Counter()
    step = 0
    for event in subject.events:
        if event == "begin":
            step, begun = 0, {}
            numbers.clear()
        elif event == "step":
            step += 1
            numbers.clear()
        elif not isinstance(event, int):
            module, shape = event
            denoiser = next((n for n, d in enumerate(subject.denoisers) if d is module), None)
            if denoiser is None:
                continue
            branch = (denoiser, numbers[denoiser])
            numbers[denoiser] += 1
            if begun.get(branch, (None, 0))[0] != shape:
                begun[branch] = shape, step
            start = begun[branch][1]
            left = schedule.from_step(start) if 0 < start < schedule.num_inference_steps else schedule
            outside = step >= subject.steps  # a call between two loops belongs to none, and is computed
            counts[denoiser] += outside or step - start in left.key_steps
    return counts


def _parameters(kind: type) -> Any:
    return inspect.signature(kind.__call__).parameters


def _line(error: BaseException) -> str:
    """The first line of an error, with where it was raised unless it is one of the library's or of this module's."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    text = re.sub(r"0x[0-9a-f]+", "...", text)
    if isinstance(error, Wrong | DPCacheError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name})"
