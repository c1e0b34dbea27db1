"""Which diffusers each pipeline needs: `python -m tests.pipelines.since WHEEL ...` keeps it in since.json.

Wheels by `pip download --no-deps "diffusers==0.35.*"`, and so on. What a release exports is what its `__init__` names.
"""

import json
import re
import sys
from pathlib import Path
from zipfile import ZipFile

from tests.pipelines.count import class_of
from tests.pipelines.every import BUILDS

KEPT = Path(__file__).with_name("since.json")


def read() -> dict[str, str]:
    """Class -> the first release that has it, of those looked at: the oldest stands for all before it too."""
    releases: dict[str, list[str]] = json.loads(KEPT.read_text(encoding="utf-8"))
    return {name: release for release, names in releases.items() for name in names}


def exported(wheel: Path) -> set[str]:
    """Names that a release exports."""
    with ZipFile(wheel) as files:
        return set(re.findall(r'"(\w+)"', files.read("diffusers/__init__.py").decode()))


def main(wheels: list[str]) -> int:
    by_release = {}
    for wheel in map(Path, wheels):
        major, minor = wheel.name.split("-")[1].split(".")[:2]
        by_release[int(major), int(minor)] = exported(wheel)
    left = {class_of(name) for name in BUILDS}
    found = {}
    for (major, minor), names in sorted(by_release.items()):
        found[f"{major}.{minor}"] = sorted(left & names)
        left -= names
    if left:
        raise SystemExit(f"in none of these releases: {', '.join(sorted(left))}")
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
