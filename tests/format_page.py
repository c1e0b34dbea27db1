"""Keeps the tables of docs/format.md as the code has them: `python -m tests.format_page` writes them anew.

What each table says is in the code already: the fields' own descriptions, and those of the calibration's tensors.
"""

import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dpcache.measure.calibration import Calibration
from dpcache.measure.calibration_file import TENSORS, Facts
from dpcache.plan.schedule import ModelIdentity, Schedule, Term

PAGE = Path(__file__).parents[1] / "docs" / "format.md"
MODELS: tuple[type[BaseModel], ...] = (Schedule, ModelIdentity, Term, Facts)
UNITS = {
    "paper_cost": "that of the values at the boundary",
    "gram": "square of what the scheduler receives",
    "value_gram": "square of the values at the boundary",
    "influence": "of the sample, per unit of what the scheduler receives",
    "probes": "none, a ratio",
    "tried": "none, 0 or 1",
    "tried_error": "none, a fraction",
}
_SIMPLE = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "anything",
    type(None): "null",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def tables() -> dict[str, str]:
    """Every table of the page by its name."""
    return {**{model.__name__: _fields(model) for model in MODELS}, "tensors": _tensors()}


def updated(page: str) -> str:
    """The page with its tables as they should be.

    Raises:
        ValueError: it has no place for one of them.
    """
    for name, table in tables().items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->\n"
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", page, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"docs/format.md needs one place for the table {name}: {begin.strip()} ... {end.strip()}")
        page = f"{parts[0]}{begin}{table}{end}{parts[1]}"
    return page


def _fields(model: type[BaseModel]) -> str:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        bounds = [
            f"{sign} {getattr(bound, key)}"
            for bound in field.metadata
            for key, sign in _BOUNDS.items()
            if hasattr(bound, key)
        ]
        default = "required" if field.is_required() else _json(field.get_default(call_default_factory=True))
        kind = ", ".join([_type(field.annotation), *bounds])
        rows.append(f"| `{name}` | {kind} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _tensors() -> str:
    told = _attributes(Calibration)
    rows = ["| tensor | shape, float64 | unit | meaning |", "|---|---|---|---|"]
    for name in TENSORS:
        shape, meaning = re.fullmatch(r"float64 \[(.*?)\], (.*)", told[name]).groups()  # type: ignore[union-attr]
        rows.append(f"| `{name}` | [{shape}] | {UNITS[name]} | {meaning} |")
    return "\n".join(rows) + "\n"


def _attributes(described: type) -> dict[str, str]:
    """The attributes a docstring describes."""
    section = (described.__doc__ or "").split("Attributes:\n")[1]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", section, flags=re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _json(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, str | dict) else json.dumps(value)


def _type(annotation: Any) -> str:
    """An annotation in the words of JSON."""
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin in (tuple, list):
        return f"list ({_type(arguments[0])})"
    if origin in (dict, Mapping):
        return f"object ({_type(arguments[0])} → {_type(arguments[1])})"
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the tables of {PAGE}")
