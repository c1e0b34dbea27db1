"""Runs every pipeline class of diffusers that can be built small, with dpcache: `python -m tests.pipelines.count`.

Names, or parts of them, as arguments: those alone. What is found is kept in verdicts.json, from which models_page.py
makes docs/models.md.
"""

import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils.import_utils import DummyObject

from tests.pipelines.every import BUILDS
from tests.pipelines.following import FAILS, NOT_DESCRIBED, REFUSED, RIGHT, Found, examine
from tests.pipelines.unbuilt import NOT_BUILT, PLANNED_BY_THE_PAPER
from tests.pipelines.unbuilt import REFUSED as TO_BE_REFUSED

KEPT = Path(__file__).with_name("verdicts.json")


def classes() -> dict[str, str]:
    """Every pipeline class that diffusers exports -> the packages that it lacks here, if any."""
    found = {}
    for name in sorted(dir(diffusers)):
        exported = getattr(diffusers, name)
        if isinstance(exported, DummyObject):
            if name.endswith("Pipeline") and not name.endswith("ModularPipeline"):
                found[name] = ", ".join(part for part in exported._backends if part not in ("torch", "transformers"))
        elif isinstance(exported, type) and issubclass(exported, diffusers.DiffusionPipeline):
            found[name] = ""
    return found


def class_of(name: str) -> str:
    """Of an entry of the list, which may say more in parentheses."""
    return name.split(" ")[0]


def why_not_built(name: str, lacks: str) -> str:
    return f"needs {lacks}" if lacks else NOT_BUILT.get(name, "not built yet")


def is_wrong(name: str, found: Found) -> bool:
    """Whether it does not do what it should: run, and be right at "output" or refused with a reason."""
    expected = REFUSED if class_of(name) in TO_BE_REFUSED else RIGHT
    failed = {where for where, verdict in found.verdicts.items() if verdict == FAILS}
    if class_of(name) in PLANNED_BY_THE_PAPER:
        failed -= {"plan"}
    return bool(found.runs) or found.verdicts["output"] != expected or bool(failed)


def run(names: list[str]) -> dict[str, Found]:
    """Examines those entries, and tells what it finds."""
    results = {}
    for name in names:
        start = time.perf_counter()
        results[name] = found = examine(BUILDS[name])
        verdicts = "  ".join(f"{where}: {verdict}" for where, verdict in found.verdicts.items())
        print(f"{name:48}{found.denoiser:32}{verdicts or 'does not run: ' + found.runs}", end="  ", flush=True)
        print(f"{time.perf_counter() - start:.1f} s", flush=True)
        for where, reason in found.reasons.items():
            if reason:
                print(f"    {where}: {reason}", flush=True)
    return results


def summary(results: dict[str, Found]) -> dict[str, Any]:
    """The counts. Of a class that is built in several ways the worst counts."""
    lists = classes()
    order = [FAILS, REFUSED, NOT_DESCRIBED, RIGHT]
    counts: dict[str, Any] = {"classes in diffusers": len(lists)}
    counts["built here"] = len({class_of(name) for name in results})
    running = {name: found for name, found in results.items() if not found.runs}
    counts["run without dpcache"] = len({class_of(name) for name in running})
    for where in ("output", "blocks", "plan"):
        worst: dict[str, str] = {}
        for name, found in running.items():
            verdict = found.verdicts[where]
            worst[class_of(name)] = min(worst.get(class_of(name), verdict), verdict, key=order.index)
        tally = Counter(worst.values())
        counts[where] = {verdict: tally[verdict] for verdict in reversed(order) if tally[verdict]}
    return counts


def keep(results: dict[str, Found]) -> None:
    """Writes what was found to the file, beside what it has of other pipelines."""
    known = json.loads(KEPT.read_text(encoding="utf-8"))["found"] if KEPT.exists() else {}
    found = {**known, **{name: asdict(of_name) for name, of_name in results.items()}}
    kept = {"diffusers": version("diffusers"), "found": {name: found[name] for name in sorted(found) if name in BUILDS}}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def main(parts: list[str]) -> int:
    warnings.simplefilter("ignore")
    names = [name for name in BUILDS if not parts or any(part.lower() in name.lower() for part in parts)]
    results = run(names)
    print()
    for what, count in summary(results).items():
        print(f"{what:24}{count}")
    if not parts:
        built = {class_of(name) for name in results}
        print("\nNot built here:")
        for name, lacks in classes().items():
            if name not in built:
                print(f"    {name:48}{why_not_built(name, lacks)}")
    keep(results)
    wrong = [name for name, found in results.items() if is_wrong(name, found)]
    if wrong:
        print("\nNot as it should be: " + ", ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
