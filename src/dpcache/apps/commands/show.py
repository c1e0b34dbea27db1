"""`dpcache show`."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import listed

from . import terminal
from .following import check_budget, is_calibration, num_steps, read_calibration, read_schedule
from .options import SCHEDULE_HELP
from .plan import facts as schedule_facts

if TYPE_CHECKING:
    from dpcache.measure.calibration import Calibration
    from dpcache.plan.planner import Plan
    from dpcache.plan.recipe import Method
    from dpcache.plan.schedule import Schedule


def show(
    name: Annotated[
        str,
        typer.Argument(
            help=f"A calibration file or directory. {SCHEDULE_HELP}. builtin: what ships with the package.",
            metavar="FILE",
        ),
    ],
    num_key_steps: Annotated[
        int | None,
        typer.Option("--key-steps", "-k", min=1, help="Of a calibration: the number of key steps to point at."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "-s", help="Of a calibration: the schedule to point at.")
    ] = None,
) -> None:
    """Prints what a calibration or schedule holds; of a calibration, error against speedup for every budget.

    --json: kind, "schedule", "calibration" or "builtin"; of the first two file, what was given. Of a schedule what
    `dpcache plan --json` says, with denoiser and config. Of a calibration its facts, and plans: a list of
    num_key_steps, key_steps, ideal_speedup, cost, and expected_error, which is null where no schedules were tried;
    chosen is the number of key steps that was asked for. Of builtin a list of that name, with name, models and plans.
    """
    if Path(name).is_file() and Path(name).suffix not in (".json", ".safetensors"):
        raise typer.BadParameter(f"{name} is neither a schedule (.json) nor a calibration (.safetensors).")
    if is_calibration(name):
        calibration = read_calibration(name)
        if schedule is not None:
            num_key_steps = read_schedule(schedule).num_key_steps
        check_budget(num_key_steps or 1, num_steps(calibration))
        _show_calibration(name, calibration, num_key_steps)
        return
    if num_key_steps is not None or schedule is not None:
        raise typer.BadParameter(f"{name} is a schedule: --key-steps and --schedule point at plans of a calibration.")
    if name == "builtin":
        _show_builtin()
    else:
        _show_schedule(name, read_schedule(name))


def _show_builtin() -> None:
    from dpcache.plan.builtin import builtin_of, builtins

    words: list[Any] = []
    for one in builtins().values():
        steps = one.num_inference_steps
        table = Table("K", "T/K", "cost", title=f"{one.name}: {', '.join(one.models)}, {steps} steps", box=SIMPLE_HEAD)
        table.add_column(f"computed, of {steps}", no_wrap=True)
        by_source: dict[str, list[str]] = {}
        for k, plan in one.plans.items():
            cost = "-" if plan.cost is None else f"{plan.cost:.1f}"
            table.add_row(str(k), f"{steps / k:.2f}", cost, _short_strip(plan.key_steps, steps))
            if plan.source:
                by_source.setdefault(plan.source, []).append(str(k))
        first = all(builtin_of(model) == one.name for model in one.models)
        short = f", or builtin:K with {one.models[0]}" if first else ""
        table.caption = f"--schedule builtin:{one.name}:K{short}"
        words += [table, *(f"K = {', '.join(those)}: {source}" for source, those in by_source.items())]
        words.append(f"source: {one.source}")
    terminal.result(
        {"kind": "builtin", "builtin": [one.model_dump(mode="json") for one in builtins().values()]}, *words
    )


def _strip(key_steps: Collection[int], num_steps: int) -> str:
    """A cell for every step; of long loops in several lines, each with its first step."""
    cells = "".join("█" if t in key_steps else "·" for t in range(num_steps))
    if num_steps <= _LINE:
        return cells
    firsts = range(0, num_steps, _LINE)
    return "\n".join(f"{first:{len(str(firsts[-1]))}} {cells[first : first + _LINE]}" for first in firsts)


def _show_schedule(name: str, schedule: "Schedule") -> None:
    table = Table(show_header=False, box=None)
    model = schedule.model
    for fact, value in (
        ("speedup", f"at most {schedule.ideal_speedup:.2f}x"),
        ("boundary", schedule.boundary),
        ("predictor", f"{schedule.predictor}, order {schedule.order}"),
        ("corrections", f"at {len(schedule.corrections)} key steps" if schedule.corrections else "none"),
        ("model", f"{model.denoiser}, configuration {model.config or 'any'}" if model else "any"),
        ("cost", "not known" if schedule.cost is None else f"{schedule.cost:.6g}"),
        ("measured error", "not known" if schedule.error is None else f"{schedule.error:.3%}"),
        ("expected error", "not known" if schedule.expected_error is None else f"{schedule.expected_error:.3%}"),
        ("source", schedule.source or "not known"),
    ):
        table.add_row(fact, escape(str(value)))
    terminal.result(
        {
            "kind": "schedule",
            "file": name,
            **schedule_facts(schedule),
            "denoiser": model.denoiser if model else None,
            "config": model.config if model else None,
        },
        f"schedule: {schedule}",
        _strip(schedule.key_steps, schedule.num_inference_steps),
        table,
    )


def _show_calibration(name: str, calibration: "Calibration", chosen: int | None) -> None:
    facts = calibration.facts.model_dump(mode="json", exclude={"timesteps", "sigmas", "model", "calls"})
    model = calibration.facts.model
    table = Table(show_header=False, box=None)
    for fact, value in facts.items():
        if value is not None:
            table.add_row(fact.replace("_", " "), str(value))
    table.add_row("model", f"{model.denoiser}, configuration {model.config}")
    measured = "yes" if calibration.is_measured else "no (calibrate with --sensitivity measured)"
    table.add_row("sensitivity measured", measured)
    steps = calibration.facts.num_inference_steps
    method: Method = "sampler" if len(calibration.gram) else "paper"
    found = calibration.plan_all(Recipe(method=method))
    plans = {k: plan for k, plan in found.items() if plan.cost > 0 and (k <= steps // 2 or k == chosen)}
    errors = _errors(calibration, plans)
    terminal.result(
        {
            "kind": "calibration",
            "file": name,
            **facts,
            "denoiser": model.denoiser,
            "config": model.config,
            "measured": calibration.is_measured,
            "method": method,
            "chosen": chosen,
            "plans": [
                {
                    "num_key_steps": k,
                    "key_steps": plan.key_steps,
                    "ideal_speedup": steps / k,
                    "cost": plan.cost,
                    "expected_error": errors[k] if errors else None,
                }
                for k, plan in plans.items()
            ],
        },
        table,
        *_trade_off(plans, errors, steps, method, chosen),
    )


def _errors(calibration: "Calibration", plans: "dict[int, Plan]") -> dict[int, float]:
    """The expected error of each plan; empty where no schedules were tried."""
    if not len(calibration.tried):
        return {}
    return {k: calibration.expected_error(calibration.schedule(plan.key_steps)) for k, plan in plans.items()}


#: Cells of `_short_strip` and of a bar, at most: with the numbers beside them that is a terminal of 60 columns.
_STRIP, _BAR = 25, 6
#: Cells of a line of `_strip`, and lines of the table of plans, at most.
_LINE, _ROWS = 50, 30


def _short_strip(key_steps: Collection[int], steps: int) -> str:
    """The loop from left to right: two steps a cell, or, of many, darker where more of them are computed."""
    width = max(2, math.ceil(steps / _STRIP))
    cells = [
        [step in key_steps for step in range(first, min(first + width, steps))] for first in range(0, steps, width)
    ]
    if width == 2:
        return "".join("·▌▐█"[sum(1 << place for place, key in enumerate(cell) if key)] for cell in cells)
    return "".join("·░▒▓█"[math.ceil(4 * sum(cell) / len(cell))] for cell in cells)


def _bar(share: float) -> str:
    """So much of a bar, to an eighth of a cell."""
    eighths = 1 + round(share * (8 * _BAR - 1))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _thinned(budgets: list[int], chosen: int | None) -> set[int]:
    """Of many numbers of key steps so many that they fit on a screen, ever farther apart."""
    if len(budgets) <= _ROWS:
        return set(budgets)
    places = {round(len(budgets) ** (number / (_ROWS - 1))) - 1 for number in range(_ROWS)}
    return {budgets[place] for place in places} | {k for k in budgets if k == chosen}


def _trade_off(
    plans: "dict[int, Plan]", errors: dict[int, float], steps: int, method: str, chosen: int | None
) -> "list[Table | str]":
    """Error against speedup: a bar for every budget, or of many for some, on a logarithmic scale."""
    kind = "expected error" if errors else "relative error (uncalibrated)"
    shown: dict[int, Any] = errors or {
        k: plan.cost ** (0.5 if method == "sampler" else 1.0) for k, plan in plans.items()
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("", "K", "T/K", "error", "", f"computed, of {steps}"):
        table.add_column(heading, no_wrap=True)
    logs = [math.log(error) for error in shown.values()]
    listed_budgets = _thinned(list(plans), chosen)
    for k, plan in plans.items():
        if k not in listed_budgets:
            continue
        share = (math.log(shown[k]) - min(logs)) / ((max(logs) - min(logs)) or 1.0)
        figure = f"{shown[k]:.3%}" if errors else f"{shown[k]:.3g}"
        cells = (
            "→" if k == chosen else "",
            str(k),
            f"{steps / k:.{2 if steps < 100 * k else 0}f}",
            figure,
            _bar(share),
            _short_strip(plan.key_steps, steps),
        )
        table.add_row(*cells, style="bold" if k == chosen else None)
    found: list[Table | str] = [f"\nbest plans by {method} cost: {kind}", table]
    if chosen in plans:
        found.append(f"{chosen} key steps: {listed(plans[chosen].key_steps)}")
    elif chosen is not None:
        found.append(f"{chosen} key steps are none of these: they are infeasible, or nothing is skipped.")
    return found
