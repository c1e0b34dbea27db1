"""Who may import whom: the rooms of the package form no circle, and planning needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dpcache"
#: Of every room, the rooms it may import from; all may import the modules beside them: errors, checks, the version.
ALLOWED = {
    "files": set(),
    "zoo": set(),
    "plan": {"files"},
    "run": {"plan", "files"},
    "measure": {"run", "plan", "files"},
    "search": {"measure", "run", "plan", "files"},
    "judge": {"measure", "run", "plan", "files"},
    "integrations": {"measure", "run", "plan", "files", "zoo"},
    "apps": {"integrations", "judge", "search", "measure", "run", "plan", "files", "zoo"},
}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
HEAVY = ("torch", "diffusers", "transformers", "huggingface_hub", "accelerate")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of dpcache that a file imports, in functions and for types as well."""
    package = ["dpcache", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "dpcache")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            if origin.split(".")[0] == "dpcache":
                yield from ((node.lineno, f"{origin}.{name.name}") for name in node.names)


def room(name: str) -> str | None:
    """The room a module is in; None for those beside the rooms, and for names of the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def edges(name: str) -> dict[str, list[str]]:
    """{room: the lines that import from it}, of one room."""
    found: dict[str, list[str]] = {}
    for path in sorted((PACKAGE / name).rglob("*.py")):
        for line, module in imported(path):
            if (other := room(module)) not in (None, name):
                found.setdefault(str(other), []).append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    return found


def test_the_table_names_every_room() -> None:
    assert sorted(ALLOWED) == ROOMS


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_from_those_it_may(name: str) -> None:
    wrong = [line for other, lines in edges(name).items() if other not in ALLOWED[name] for line in lines]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    for graph in (ALLOWED, {name: set(edges(name)) for name in ROOMS}):
        assert set(TopologicalSorter(graph).static_order()) == set(ROOMS)


def test_what_lies_beside_the_rooms_imports_from_none() -> None:
    """Aside of `__init__`, which imports for types alone, or when asked, and `__main__`, which starts the apps."""
    for path in PACKAGE.glob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            assert [name for _, name in imported(path) if room(name)] == [], path.name


def test_planning_imports_nothing_heavy() -> None:
    modules = [f"dpcache.plan.{path.stem}" for path in (PACKAGE / "plan").glob("*.py") if path.stem != "__init__"]
    assert len(modules) > 5
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
