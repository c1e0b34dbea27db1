"""docs/models.md says what the tests of the table say."""

from importlib.metadata import version
from pathlib import Path

import diffusers
import pytest

from dpcache.run import layouts
from tests.pipelines import models_page
from tests.pipelines.every import SMALL

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_the_page_is_up_to_date() -> None:
    """Where every test of the table passes, which they check themselves, the page says so for all of it."""
    if f"diffusers=={version('diffusers')}" not in CONSTRAINTS.read_text().split():
        pytest.skip("the page is of the pinned version of diffusers")
    page = models_page.render(set(), diffusers.__version__)
    assert models_page.PAGE.read_text(encoding="utf-8") == page, "run `python -m tests.pipelines.models_page`"


def test_every_denoiser_in_the_table_is_tested() -> None:
    assert set(layouts.BLOCK_STACKS) <= {models_page.denoiser(name) for name in SMALL}


def test_a_failure_is_shown() -> None:
    name = next(iter(SMALL))
    assert "not verified" in models_page.render({(name, "output")}, "0")
    assert all(hasattr(diffusers, name) for name in models_page.NOT_FOLLOWED)
