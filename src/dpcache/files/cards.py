"""Model cards: what a schedule or calibration file says of itself, as the README.md of its directory or repository."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

Rows = list[tuple[str, str, str]]

_BEGIN, _END = "<!-- dpcache: {name} -->", "<!-- dpcache: end of {name} -->"
_TAGS = ("dpcache", "diffusers", "diffusion", "cache", "acceleration")
#: Sequences of whole numbers up to this length are shown, of others only how many there are and their range.
_SHOWN_NUMBERS = 100
_LONGEST = 300


def fact_rows(model: BaseModel) -> Rows:
    """(name, value, meaning) of every field that says something; the meaning is the field's own description."""
    rows = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is not None:
            rows.append((name.replace("_", " "), shown(value), field.description or ""))
    return rows


def shown(value: Any) -> str:
    """The value on one short line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, BaseModel):
        return ", ".join(f"{name} {shown(part)}" for name, part in dict(value).items() if part is not None)
    if isinstance(value, Mapping):
        return f"{len(value)} entries, in the file"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(part, int) for part in value) and len(value) <= _SHOWN_NUMBERS:
            return " ".join(map(str, value)) or "none"
        if all(isinstance(part, int | float) for part in value):
            return f"{len(value)} values, {value[0]:.6g} to {value[-1]:.6g}"
        if all(isinstance(part, Mapping) and "prompt" in part for part in value):
            return _cut("; ".join(str(part["prompt"]) for part in value))
        return f"{len(value)} entries, in the file"
    return _cut(str(value))


def section(name: str, title: str, rows: Rows, usage: str) -> str:
    """What the card says of one file: a table of its facts, and how to use it."""
    table = [f"| {fact} | {_cell(value)} | {_cell(meaning)} |" for fact, value, meaning in rows]
    lines = [
        _BEGIN.format(name=name),
        f"## `{name}`",
        "",
        title,
        "",
        "| fact | value | meaning |",
        "|---|---|---|",
        *table,
        "",
        "```python",
        usage,
        "```",
        _END.format(name=name),
    ]
    return "\n".join(lines) + "\n"


def updated_card(card: str | None, name: str, text: str, *, heading: str, base_model: str | None) -> str:
    """The card with this section: a new card, or the old one with the file's section replaced or added.

    Whatever else the old card says, its front matter included, stays as it is.

    Args:
        card: the card there is.
        name: of the file that the section is about.
        text: the section.
        heading: of a new card.
        base_model: hub id of the model the file is for, for the front matter of a new card.
    """
    if card is None:
        return f"{_front_matter(base_model)}\n# {heading}\n\n{_ABOUT}\n\n{text}"
    begin, end = re.escape(_BEGIN.format(name=name)), re.escape(_END.format(name=name))
    found = re.search(f"{begin}.*?{end}\n?", card, flags=re.DOTALL)
    if found:
        return card[: found.start()] + text + card[found.end() :]
    return f"{card.rstrip()}\n\n{text}"


_ABOUT = (
    "By dpcache, for pipelines of [diffusers](https://huggingface.co/docs/diffusers): a few key steps of the sampling "
    "loop are computed in full, all others are predicted from what was cached at the key steps before. The method is "
    "DPCache ([arXiv 2602.22654](https://arxiv.org/abs/2602.22654))."
)


def _front_matter(base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="dpcache", tags=list(_TAGS), base_model=base_model)
    return f"---\n{data.to_yaml()}\n---\n"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _cell(text: str) -> str:
    """Within one cell of a table, whatever is in the text: prompts are anybody's."""
    return text.translate(_ESCAPED)


_ESCAPED = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " ", **{sign: f"\\{sign}" for sign in "\\|`*_[]"}}
)
