"""The main job on a bundled model, end to end: find schedules, draw in full and cached, report."""

from collections.abc import Callable
from pathlib import Path

from dpcache.files.pictures import save_picture
from dpcache.judge.comparison import Comparison, compare_all
from dpcache.judge.report import write_report
from dpcache.measure.measuring import calibrate
from dpcache.search.optimize import optimize
from dpcache.zoo import BUNDLED, load_pipeline

CALIBRATION_INPUTS, SEARCH_INPUTS = 5, 16
#: Full runs that the search for both schedules may cost: a demonstration should be short.
BUDGET = 30
#: K / T: 13 and 9 of 50 steps.
SHARES = (0.26, 0.18)


def run_demo(
    model: str,
    folder: Path,
    num_inputs: int,
    say: Callable[[str], object] = print,
    *,
    num_inference_steps: int = 50,
    progress: bool = True,
) -> tuple[list[Comparison], Path]:
    """Calibrates, optimizes, compares; writes calibration, schedules, pictures and `report.html` into the folder.

    Returns:
        one Comparison per number of key steps, and the report's path.

    Raises:
        ValueError: not a bundled model, or it has fewer held-out inputs.
    """
    if model not in BUNDLED:
        raise ValueError(f"{model} is not a bundled model; the demo runs on: {', '.join(BUNDLED)}.")
    bundled = BUNDLED[model]
    held_out = bundled.held_out_inputs(num_inputs)
    pipeline = load_pipeline(model)
    say(f"calibrating {model} on {CALIBRATION_INPUTS} inputs, {num_inference_steps} steps each")
    calibration = calibrate(
        pipeline,
        bundled.calibration_inputs(CALIBRATION_INPUTS),
        num_inference_steps=num_inference_steps,
        progress=progress,
        **bundled.call_defaults,
    )
    calibration.save(folder / "calibration.safetensors")
    found = optimize(
        pipeline,
        bundled.calibration_inputs(SEARCH_INPUTS),
        num_key_steps=sorted({max(2, round(share * num_inference_steps)) for share in SHARES}),
        budget=BUDGET,
        num_inference_steps=num_inference_steps,
        progress=progress,
        **bundled.call_defaults,
    )
    schedules = [found[k] for k in sorted(found, reverse=True)]
    for schedule in schedules:
        say(f"found {schedule}: {schedule.source}")
        schedule.save(folder / f"schedule-{schedule.num_key_steps}.json")
    say(f"drawing {num_inputs} held-out inputs in full and with {len(schedules)} schedules")
    comparisons = compare_all(pipeline, schedules, held_out, seeds=1000, progress=progress, **bundled.call_defaults)
    for number, sample in enumerate(comparisons[0].samples):
        save_picture(folder / f"{number:02d}-full.png", sample.full)
    for comparison in comparisons:
        for number, sample in enumerate(comparison.samples):
            save_picture(folder / f"{number:02d}-{comparison.schedule.num_key_steps}-key-steps.png", sample.cached)
    report = write_report(
        folder / "report.html",
        title=f"dpcache on {model}",
        model=model,
        calibration=calibration,
        comparisons=comparisons,
        plans=calibration.plan_all(),
    )
    return comparisons, report
