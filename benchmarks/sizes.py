"""What plans lose that were made from smaller pictures or shorter clips than they are followed for.

    python -m benchmarks.sizes    # prints the table of docs/recipes.md

Calibrates and searches with inputs of the model's own size and with smaller ones, and draws held-out ones of its own.
"""

import argparse
from typing import Any

import dpcache
from benchmarks.subjects import STEPS, Subject, scores, shown

KEY_STEPS = (13, 9)
CALIBRATED, SEARCHED, HELD_OUT = 10, 20, 64
BUDGET = 60
"""Of the search, full runs of its own size."""
#: Model -> how large inputs are made in calibration; the first is the model's own size.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-hunyuan-video": {
        "32 x 32, 9 frames (its own)": {},
        "32 x 32, 5 frames": {"num_frames": 5},
        "16 x 16, 9 frames": {"height": 16, "width": 16},
        "16 x 16, 5 frames": {"height": 16, "width": 16, "num_frames": 5},
    },
    "hard-flux": {
        "64 x 64 (its own)": {},
        "32 x 32": {"height": 32, "width": 32},
    },
}
HEAD = ("model", "measured on", *(f"{way}, K = {k}" for way in ("one plan", "optimize") for k in KEY_STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*SIZES])
    options = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for name in options.models:
        subject = Subject(name, HELD_OUT)
        full, _ = subject.draw()
        schedules = {}
        for told, size in SIZES[name].items():
            call = {**subject.model.call_defaults, **size}
            call |= {"num_inference_steps": STEPS, "progress": False}
            calibration = dpcache.calibrate(subject.pipe, subject.model.calibration_inputs(CALIBRATED), **call)
            found = dpcache.optimize(
                subject.pipe,
                subject.model.calibration_inputs(SEARCHED),
                num_key_steps=KEY_STEPS,
                budget=BUDGET * len(KEY_STEPS),
                **call,
            )
            schedules[told] = [*map(calibration.plan, KEY_STEPS), *(found[k] for k in KEY_STEPS)]
        for told, some in schedules.items():
            reached = [scores(full, subject.draw(schedule)[0]) for schedule in some]
            print(f"| `{name}` | {told} | " + " | ".join(map(shown, reached)) + " |", flush=True)


if __name__ == "__main__":
    main()
