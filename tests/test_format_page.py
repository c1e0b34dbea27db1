"""docs/format.md: every field and tensor as the code has it, and its examples run on files as they are written."""

import re

import numpy as np
import pytest

import dpcache
from dpcache.measure.calibration_file import FORMAT, TENSORS, VERSION
from dpcache.plan.schedule import FORMAT as SCHEDULE_FORMAT
from dpcache.plan.schedule import VERSION as SCHEDULE_VERSION

from . import format_page
from .test_hub import made_calibration

TEXT = format_page.PAGE.read_text(encoding="utf-8")
COMMAND = "python -m tests.format_page"


@pytest.mark.parametrize("name", format_page.tables())
def test_tables_are_as_the_code_has_them(name):
    """Tells row by row what is missing and what is too many."""
    expected = format_page.tables()[name].splitlines()
    found = TEXT.split(f"<!-- table: {name} -->\n")[1].split("<!-- end of table -->")[0].splitlines()
    missing = [row for row in expected if row not in found]
    stale = [row for row in found if row not in expected]
    assert not missing and not stale, f"in docs/format.md, to be written anew by `{COMMAND}`: {missing=} {stale=}"
    assert format_page.updated(TEXT) == TEXT
    for row in expected[2:]:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4 and all(cells), f"the description or unit of {row!r} is empty"


def test_says_the_versions_that_are_written():
    for format_, version in ((SCHEDULE_FORMAT, SCHEDULE_VERSION), (FORMAT, VERSION)):
        kind = format_.removeprefix("dpcache.")
        assert f"## {kind.capitalize()}, version {version}\n" in TEXT
        assert f'`"{format_}"`' in TEXT
    assert f"`{SCHEDULE_VERSION}`, a number" in TEXT and f'`"{VERSION}"`' in TEXT
    order = re.search(r"order = \((.*?)\)", TEXT).group(1)
    assert tuple(re.findall(r'"(\w+)"', order)) == TENSORS


def test_shapes_are_as_told():
    calibration = made_calibration()
    sizes = {"T": 20, "T+1": 21, "inputs": 1, "probed inputs": 0, "trials": 0}
    for name in TENSORS:
        shape = re.search(rf"\| `{name}` \| \[(.*?)\]", TEXT).group(1)
        tensor = getattr(calibration, name)
        assert tensor.dtype == np.float64
        assert tensor.shape == tuple(sizes[size] for size in shape.split(", ")), name


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibration = made_calibration()
    schedule = calibration.schedule([0, 1, 2, 5])
    schedule.save("schedule.json")
    calibration.save("calibration.safetensors")
    first, second = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert "dpcache" not in re.sub(r'"dpcache\.\w+"', "", first + second)  # they do without it
    exec(first, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[5].endswith("keep the value at the boundary 'blocks'")
    last = schedule.predictions[19]
    assert lines[19] == "step 19: " + " + ".join(f"{t.coefficient:.3f} x value {t.key_step}" for t in last)
    exec(second, {})
    told, cost = capsys.readouterr().out.splitlines()
    assert told == "1 inputs, 20 steps of FluxTransformer2DModel, boundary blocks"
    forced = dpcache.plan(calibration.paper_cost, 4, first_key_steps=3)
    assert float(cost.split()[1]) >= forced.cost
