"""Schedules that follow the sample, and knowing when a calibration does not fit: docs/adaptive.md.

    python -m benchmarks.adaptive                        # every bundled model: some 20 minutes
    python -m benchmarks.adaptive tiny-dit --inputs 8    # one model, quickly
    python -m benchmarks.adaptive --page-only            # the page from the figures already measured

Writes benchmarks/results/adaptive_<model>.json and docs/adaptive.md.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

import dpcache
from benchmarks.subjects import COLD, RESULTS, ROOT, STEPS, WARM, Pictures, Row, Subject, plain, rounded, scores, table
from dpcache.zoo import Inputs

MODELS = ("tiny-flux", "tiny-dit", "tiny-hunyuan-video")
BUDGETS = (9, 13)
CALIBRATED = 10
SHIFTED = 24
LORA_STEPS, LORA_RATE, LORA_BATCH = 150, 2e-3, 16
TARGET = 2.0
"""dB that the 5th percentile is to gain."""
THRESHOLDS = ("diffusers FirstBlockCache", "cache-dit DBCache", "cache-dit DBCache, TaylorSeer")


def calibrated(subject: Subject, inputs: Sequence[Inputs]) -> dpcache.Calibration:
    return subject.calibrate(inputs, sensitivity="measured")


def drawn(subject: Subject, inputs: Sequence[Inputs], how: Row | None, **call: Any) -> Row:
    """Every input by itself, in full or with dpcache: pictures, full calls, drift."""
    pictures, calls, drift = [], [], []
    if how is not None:
        dpcache.enable(subject.pipe, **how)
    try:
        for arguments in subject.batches(inputs, STEPS, 1):
            pictures.append(np.asarray(subject.pipe(**{**arguments, **call})[0][0], dtype=np.float32))
            if how is not None:
                stats = dpcache.stats(subject.pipe)
                calls.append(len(stats.computed_steps))
                drift.append(stats.drift)
    finally:
        if how is not None:
            dpcache.disable(subject.pipe)
    return {"pictures": np.stack(pictures), "calls": calls, "drift": drift}


def judged(full: Pictures, found: Row) -> Row:
    values = scores(full, found["pictures"])
    return {
        "psnr_mean": values["psnr_mean"],
        "psnr_p5": values["psnr_p5"],
        "calls": np.mean(found["calls"]),
        "most_calls": max(found["calls"]),
        "drift": found["drift"],
    }


# ------------------------------------------------------------------------------------------------------------ adaptive


def adaptive(subject: Subject, calibration: dpcache.Calibration, full: Pictures) -> list[Row]:
    """Static plans around every budget, without and with corrections, and the plan that follows the sample."""
    rows = []
    for k in BUDGETS:
        ways: dict[str, Row] = {"without corrections": {"num_key_steps": k, "correct": False}}
        ways |= {f"static, {budget}": {"num_key_steps": budget} for budget in (k - 1, k, k + 1, k + 2)}
        ways["adaptive"] = {"num_key_steps": k, "adaptive": True}
        for way, how in ways.items():
            found = drawn(subject, subject.inputs, {"schedule": calibration, **how})
            rows.append({"k": k, "way": way, **judged(full, found)})
    return rows


# --------------------------------------------------------------------------------------------------------------- drift


@contextmanager
def lora(subject: Subject):
    """The pipeline with a LoRA in its attention, trained to draw one subject whatever is asked for."""
    model = subject.pipe.transformer
    calls: list[Row] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({**kwargs, "hidden_states": args[0] if args else kwargs["hidden_states"]}),
        with_kwargs=True,
    )
    for arguments in subject.batches(subject.model.calibration_inputs(LORA_BATCH), STEPS, LORA_BATCH):
        subject.pipe(**arguments)
    handle.remove()
    targets = [
        {**call, **{name: _of_first(call[name]) for name in _ASKED if call.get(name) is not None}} for call in calls
    ]
    torch.manual_seed(0)
    changed = copy.deepcopy(model).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, changed)
    weights = [weight for weight in changed.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LORA_RATE)
    order = np.random.default_rng(0)
    for _ in range(LORA_STEPS):
        step = int(order.integers(len(calls)))
        with torch.no_grad():
            target = model(**targets[step])[0]
        loss = torch.nn.functional.mse_loss(changed(**calls[step])[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    subject.pipe.transformer = changed
    try:
        yield
    finally:
        subject.pipe.transformer = model


_ASKED = ("pooled_projections", "encoder_hidden_states", "encoder_attention_mask", "class_labels")


def _of_first(asked: torch.Tensor) -> torch.Tensor:
    """Everyone asks for what the first one does; with guidance the second half of a batch asks for nothing."""
    half = len(asked) // 2
    if asked.ndim == 1:
        return torch.cat([asked[:1].expand(half), asked[half:]])
    return asked[:1].expand_as(asked).contiguous()


@contextmanager
def sampler(subject: Subject):
    recorded = subject.pipe.scheduler
    if "FlowMatch" in type(recorded).__name__:
        other = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=recorded.config.shift
        )
    else:
        other = diffusers.DPMSolverMultistepScheduler.from_config(recorded.config)
    subject.pipe.scheduler = other
    try:
        yield
    finally:
        subject.pipe.scheduler = recorded


@contextmanager
def nothing(subject: Subject):
    yield


def shifts(subject: Subject) -> dict[str, Row]:
    """Kinds of shift -> what changes: the pipeline, arguments of its call, inputs, calibration inputs."""
    bigger = {"height": 48, "width": 48}
    guidance = {
        "tiny-flux": {"true_cfg_scale": 3.0, "negative_prompt": ""},
        "tiny-dit": {"guidance_scale": 8.0},
        "tiny-hunyuan-video": {"guidance_scale": 18.0},
    }
    found: dict[str, Row] = {
        "inputs with an attribute that the calibration has not": {
            "calibrate": subject.coloured(WARM, CALIBRATED),
            "inputs": subject.coloured(COLD, SHIFTED),
        },
        "LoRA": {"change": lora},
        "another size": {"call": bigger},
        "other guidance": {"call": guidance[subject.model.name]},
        "another sampler": {"change": sampler},
    }
    if subject.model.name == "tiny-dit":  # its positions are for one size
        del found["another size"]
    return found


def drift(subject: Subject, calibration: dpcache.Calibration) -> list[Row]:
    rows = []
    for kind, shift in shifts(subject).items():
        inputs, call = shift.get("inputs", subject.inputs[:SHIFTED]), shift.get("call", {})
        fitting = calibrated(subject, shift["calibrate"]) if "calibrate" in shift else calibration
        with shift.get("change", nothing)(subject):
            full = drawn(subject, inputs, None, **call)["pictures"]
            for policy in ("warn", "full"):
                how = {"schedule": fitting, "num_key_steps": 13, "on_drift": policy}
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    found = drawn(subject, inputs, how, **call)
                told = any("does not fit" in str(warning.message) for warning in caught)
                rows.append({"shift": kind, "policy": policy, "told": told, **judged(full, found)})
                limit = _limit(subject, fitting)
                rows[-1]["limit"] = limit
    return rows


def _limit(subject: Subject, calibration: dpcache.Calibration) -> float:
    """Above which a whole generation with 13 key steps has drifted."""
    from dpcache.run.adaptive import Found, Guide

    schedule = calibration.plan(13)
    guide, found, keys = Guide(calibration, schedule, dpcache.Recipe(), False), Found(), schedule.key_steps
    for place in range(1, len(keys)):
        found.add(guide.usual.logarithms(keys[max(place - 3, 0) : place], keys[place]), 0.0)
    known = found.drift()
    assert known is not None
    return known[1]


# ------------------------------------------------------------------------------------------------------------ the page


def measure(model: str, num_inputs: int) -> Row:
    subject = Subject(model, num_inputs)
    calibration = calibrated(subject, subject.model.calibration_inputs(CALIBRATED))
    full = drawn(subject, subject.inputs, None)["pictures"]
    rows = adaptive(subject, calibration, full)
    found = {"model": model, "inputs": num_inputs, "adaptive": rows, "limit": _limit(subject, calibration)}
    return found | {"drift": drift(subject, calibration)}


def _level(rows: list[Row], calls: float, name: str) -> float:
    """What static plans reach at so many full calls: between two budgets, on the line."""
    static = [row for row in rows if row["way"].startswith("static")]
    return float(np.interp(calls, [row["calls"] for row in static], [row[name] for row in static]))


def _pair(row: Row) -> str:
    return f"{row['psnr_mean']:.1f} ({row['psnr_p5']:.1f})"


def _adaptive_table(results: Sequence[Row]) -> str:
    head = ["model", "K", "static, no corrections", "static", "adaptive", "its full calls (most)"]
    head += ["static at as many", "5th percentile, dB", "mean, dB"]
    lines = []
    for result in results:
        for k in BUDGETS:
            rows = [row for row in result["adaptive"] if row["k"] == k]
            by_way = {row["way"]: row for row in rows}
            found = by_way["adaptive"]
            level = {name: _level(rows, found["calls"], name) for name in ("psnr_mean", "psnr_p5")}
            cells = [_pair(by_way[way]) for way in ("without corrections", f"static, {k}", "adaptive")]
            cells += [f"{found['calls']:.2f} ({found['most_calls']})", _pair(level)]
            cells += [f"{found[name] - level[name]:+.2f}" for name in ("psnr_p5", "psnr_mean")]
            lines.append([result["model"], k, *cells])
    return table(head, lines)


def _peer_table(results: Sequence[Row]) -> str:
    lines = []
    for result in results:
        peers = json.loads((RESULTS / f"peers_{result['model']}.json").read_text())["rows"]
        for k in BUDGETS:
            found = next(row for row in result["adaptive"] if row["k"] == k and row["way"] == "adaptive")
            cells = [f"{_pair(found)} at {found['calls']:.1f}"]
            for name in THRESHOLDS:
                row = next((row for row in peers if row["method"] == name and row["k"] == k), {})
                cells.append(f"{_pair(row)} at {row['full_calls']:.1f}" if "psnr_mean" in row else "does not run")
            lines.append([result["model"], k, *cells])
    return table(["model", "K", "adaptive", *THRESHOLDS], lines)


def _drift_table(result: Row) -> str:
    head = ["shift", "errors over the usual, median", "limit", "told of", "unguarded", "`full`", "its full calls"]
    lines = []
    for kind in dict.fromkeys(row["shift"] for row in result["drift"]):
        warned, full = (row for row in result["drift"] if row["shift"] == kind)
        over = [value > warned["limit"] for value in warned["drift"] if value is not None]
        median = np.median([value for value in warned["drift"] if value is not None])
        cells = [f"{median:.2f}", f"{warned['limit']:.2f}", f"{100 * np.mean(over):.0f} %", _pair(warned), _pair(full)]
        lines.append([kind, *cells, f"{full['calls']:.1f}"])
    return table(head, lines)


def _false_alarms(result: Row) -> str:
    rows = [row for row in result["adaptive"] if row["way"] == "static, 13"]
    over = [value > result["limit"] for row in rows for value in row["drift"]]
    return f"{sum(over)} of {len(over)}"


def page(results: Sequence[Row]) -> str:
    inputs = results[0]["inputs"]
    parts = [
        "# Schedules that follow the sample\n",
        "Made by `python -m benchmarks.adaptive`; figures in `benchmarks/results/adaptive_*.json`. PSNR of "
        f"{inputs} held-out inputs against the full run, drawn one by one, in float: mean (5th percentile), dB. T = "
        f'{STEPS}; calibrated on {CALIBRATED} inputs with `sensitivity="measured"`, boundary `blocks`.\n',
        "\n## Adaptive against static\n",
        "`static at as many`: what static plans reach at the adaptive plan's mean number of full calls, interpolated "
        f"between budgets; the last two columns are the gain over that (the aim: {TARGET:+.0f} dB at the 5th "
        "percentile, no loss of the mean).\n",
        _adaptive_table(results),
        "\n## Beside threshold methods\n",
        "Mean full calls as close as their thresholds come (from `make bench`, the same inputs).\n",
        _peer_table(results),
        "\n## Drift\n",
        "Errors at key steps over what the calibration inputs err by there, K = 13. `told of`: share of generations "
        f'beyond the limit. `full`: with `on_drift="full"`. {SHIFTED} inputs a shift; the LoRA is trained for '
        f"{LORA_STEPS} steps to draw one subject whatever is asked for.\n",
    ]
    for result in results:
        parts += [f"\n### {result['model']}\n", _drift_table(result)]
        parts.append(f"\nFalse alarms on ordinary held-out inputs: {_false_alarms(result)}.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.adaptive tiny-dit --inputs 8"
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    for model in () if options.page_only else options.models or MODELS:
        found = json.loads(json.dumps(measure(model, options.inputs), default=plain))
        (RESULTS / f"adaptive_{model}.json").write_text(json.dumps(rounded(found), indent=1) + "\n")
    paths = [RESULTS / f"adaptive_{model}.json" for model in MODELS]
    (ROOT / "docs" / "adaptive.md").write_text(page([json.loads(path.read_text()) for path in paths if path.exists()]))


if __name__ == "__main__":
    main()
