"""Files of prompts: what is read from them, and what is refused before anything is drawn."""

from pathlib import Path

import pytest

import dpcache
from dpcache.errors import PromptError
from dpcache.files.prompts import as_requests, read_requests


def write(folder: Path, text: str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_of_text(tmp_path):
    requests = read_requests(write(tmp_path, "a ring\n\n  a star\r\n", "prompts.txt"), seed=7)
    assert [(r.id, r.seed, r.arguments) for r in requests] == [
        ("000000", 7, {"prompt": "a ring"}),
        ("000001", 8, {"prompt": "a star"}),
    ]


def test_lines_of_json(tmp_path):
    lines = [
        '{"prompt": "a ring", "seed": 3, "guidance_scale": 2.5}',
        '{"id": "star", "prompt": "a star\\u2028in two lines\u2028or three"}',
        "",
        '{"id": 12, "class_labels": [4]}',
    ]
    ring, star, labels = read_requests(write(tmp_path, "\n".join(lines)), seed=7)
    assert (ring.id, ring.seed, ring.arguments) == ("000000", 3, {"prompt": "a ring", "guidance_scale": 2.5})
    assert star.arguments == {"prompt": "a star\u2028in two lines\u2028or three"}
    assert (labels.id, labels.label) == ("12", '{"class_labels": [4]}')
    # A seed that comes from the id stays when lines are moved; another seed of the run, or another id, gives another.
    moved = read_requests(write(tmp_path, "\n".join(reversed(lines))), seed=7)
    assert {r.id: r.seed for r in moved if r.id in ("star", "12")} == {"star": star.seed, "12": labels.seed}
    other = read_requests(write(tmp_path, "\n".join(lines)), seed=8)
    assert len({star.seed, labels.seed, other[1].seed, other[2].seed}) == 4
    assert as_requests([{"id": "star", "prompt": "a star"}], seed=7)[0].seed == star.seed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ('\n{"prompt": "a"}\n"a star"', "line 3: not an object"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "line 2: its id 'x' is that of .*line 1 already"),
        ('{"prompt": "a"}\n{"prompt": "b", "id": "000000"}', "line 2: its id '000000' is that of"),
        ('{"prompt": "a", "id": "../x"}', "line 1: its id '../x' cannot name a file"),
        ('{"prompt": "a", "id": 1.5}', "line 1: its id 1.5 is neither"),
        ('{"prompt": "a", "seed": -1}', "line 1: its seed -1 is not a whole number"),
        ('{"prompt": "a", "seed": true}', "line 1: its seed True"),
        ('{"prompt": ["a", "b"]}', "line 1: its prompt is not a string"),
        ('{"id": "x"}', 'line 1: it has no "prompt"'),
        ('{"prompt": "a", "num_images_per_prompt": 2}', "line 1: num_images_per_prompt cannot be given"),
        ('{"prompt": \n{"id": "x"}\n[]', r"line 1: not JSON .*\(2 more cannot be used; the next is .*line 2\)"),
        ("\n\n", "has no prompts"),
    ],
)
def test_what_cannot_be_used_is_named(text, message, tmp_path):
    with pytest.raises(PromptError, match=message) as found:
        read_requests(write(tmp_path, text))
    assert "\n" not in str(found.value)
    assert isinstance(found.value, dpcache.DPCacheError)


def test_arguments_that_cannot_travel():
    with pytest.raises(PromptError, match=r"prompt 1: its arguments are more than JSON can hold"):
        as_requests(["a ring", {"prompt": "a star", "latents": object()}])
    with pytest.raises(PromptError, match="must be a list"):
        as_requests("a ring")
