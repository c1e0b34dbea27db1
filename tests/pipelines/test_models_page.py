"""docs/models.md and verdicts.json say what the pipelines do."""

from importlib.metadata import version
from pathlib import Path

import pytest

from dpcache.run import layouts
from tests.pipelines import models_page, unbuilt
from tests.pipelines.count import class_of, classes
from tests.pipelines.every import BUILDS, SMALL
from tests.pipelines.following import NOT_DESCRIBED, RIGHT, examine

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
KEPT = models_page.read()
FOUND = KEPT["found"]


def of_each_denoiser() -> list[str]:
    """One pipeline of each class of denoiser, beside those in the table of test_table.py; and those to be refused."""
    chosen = {found["denoiser"]: name for name, found in reversed(FOUND.items()) if name not in SMALL}
    tested = {FOUND[name]["denoiser"] for name in SMALL if name in FOUND}
    refused = [name for name in FOUND if class_of(name) in unbuilt.REFUSED]
    return sorted({name for denoiser, name in chosen.items() if denoiser not in tested} | set(refused))


@pytest.fixture(autouse=True)
def pinned() -> None:
    if f"diffusers=={version('diffusers')}" not in CONSTRAINTS.read_text().split():
        pytest.skip("the verdicts are of the pinned version of diffusers")


def test_the_page_is_up_to_date() -> None:
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.render(KEPT), (
        "run `python -m tests.pipelines.models_page`"
    )


def test_every_pipeline_is_in_the_verdicts() -> None:
    assert set(FOUND) == set(BUILDS), "run `python -m tests.pipelines.count`"
    assert set(unbuilt.NOT_BUILT) | set(unbuilt.REFUSED) <= set(classes())


def test_every_denoiser_in_the_table_is_tested() -> None:
    right = {found["denoiser"] for found in FOUND.values() if found["verdicts"].get("blocks") == RIGHT}
    assert set(layouts.BLOCK_STACKS) <= right
    described = {found["denoiser"] for found in FOUND.values() if found["verdicts"].get("blocks") == NOT_DESCRIBED}
    assert not described & set(layouts.BLOCK_STACKS)


@pytest.mark.parametrize("name", of_each_denoiser())
@pytest.mark.filterwarnings("ignore")
def test_a_verdict(name: str) -> None:
    found = examine(BUILDS[name], plans=False)
    kept = FOUND[name]
    assert (found.runs, found.denoiser) == (kept["runs"], kept["denoiser"])
    assert found.verdicts == {where: kept["verdicts"][where] for where in found.verdicts}, found.reasons
