"""since.json says what the diffusers that is installed here has, and what it has not."""

from importlib.metadata import version

import diffusers

from tests.pipelines import since


def test_what_is_installed_is_what_is_said() -> None:
    installed = tuple(map(int, version("diffusers").split(".")[:2]))
    for name, release in since.read().items():
        assert hasattr(diffusers, name) == (tuple(map(int, release.split("."))) <= installed), (name, release)
