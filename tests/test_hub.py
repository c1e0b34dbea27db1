"""Directories and the Hub: real huggingface_hub code, both ways, against a local server that answers as the Hub does.

Which parts of the Hub's interface that server stands in for is said in `fake_hub`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dpcache
from dpcache.files.hub import repository_file
from dpcache.measure.calibration_file import Facts
from dpcache.plan.schedule import ModelIdentity

from . import fake_hub

FLUX = "black-forest-labs/FLUX.1-dev"
PROMPT = "a ring | of `gold`\n<script>, top *left*"


def made_calibration() -> dpcache.Calibration:
    features = np.random.default_rng(0).normal(size=(20, 8)).cumsum(axis=0)
    gram = (features @ features.T)[None]
    empty = np.empty((0, 20))
    facts = Facts(
        num_inference_steps=20,
        boundary="blocks",
        order=2,
        model=ModelIdentity(denoiser="FluxTransformer2DModel", config="0123456789abcdef"),
        pipeline="FluxPipeline",
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=tuple(np.linspace(1000, 50, 20).tolist()),
        num_inputs=1,
        num_branches=1,
        calls=({"prompt": PROMPT},),
    )
    cost = dpcache.paper_cost(features)
    return dpcache.Calibration(facts, cost, gram, gram, np.ones((1, 20)), empty, empty, np.empty(0))


def made_schedule(num_key_steps: int = 13) -> dpcache.Schedule:
    model = ModelIdentity(denoiser="FluxTransformer2DModel", config="0123456789abcdef")
    return dpcache.Schedule.uniform(num_key_steps, 50, model=model, cost=1.5)


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str) -> dict[str, str]:
    """First and second column of every row of the card's tables."""
    rows = [line.replace(r"\|", "¦").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert all(len(row) == 3 for row in rows)
    return {row[0].strip("| "): row[1] for row in rows}


def test_a_directory_holds_both_with_a_card_of_their_facts(tmp_path):
    folder = tmp_path / "flux-caching"
    schedule, calibration = made_schedule(), made_calibration()
    assert schedule.save_pretrained(folder, base_model=FLUX) == folder / "schedule.json"
    calibration.save_pretrained(folder)
    made_schedule(9).save_pretrained(folder, filename="schedule-9.json")
    assert dpcache.Schedule.from_pretrained(folder) == schedule
    assert dpcache.Schedule.from_pretrained(folder / "schedule.json") == schedule
    assert dpcache.Schedule.from_pretrained(str(folder), filename="schedule-9.json") == made_schedule(9)
    assert dpcache.Schedule.from_pretrained(tmp_path, subfolder="flux-caching") == schedule
    loaded = dpcache.Calibration.from_pretrained(folder)
    assert loaded.facts == calibration.facts
    np.testing.assert_array_equal(loaded.paper_cost, calibration.paper_cost)

    card = (folder / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "dpcache",
        "base_model": FLUX,
        "tags": ["dpcache", "diffusers", "diffusion", "cache", "acceleration"],
    }
    assert card.count("## `") == card.count("```python") == 3
    facts = cells(card)
    assert facts["key steps"] == " ".join(map(str, made_schedule(9).key_steps))  # of the last section
    assert facts["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert facts["timesteps"] == "20 values, 1000 to 50"
    assert facts["calls"] == r"a ring ¦ of \`gold\` &lt;script&gt;, top \*left\*"
    assert 'from_pretrained("flux-caching", filename="schedule-9.json")' in card


def test_the_card_in_a_directory_keeps_what_people_wrote(tmp_path):
    mine = "---\nlicense: mit\n---\n\nMy own words.\n"
    (tmp_path / "README.md").write_text(mine)
    made_schedule().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(mine.rstrip()) and cells(card)["K"] == "13"
    (tmp_path / "README.md").write_text(card + "\nMore of them.\n")
    made_schedule(7).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(mine.rstrip()) and card.endswith("\nMore of them.\n")
    assert cells(card)["K"] == "7" and card.count("## `schedule.json`") == 1


def test_the_use_a_card_shows_runs(tmp_path, flux, monkeypatch):
    """The lines in the card, as they stand, on a pipeline."""
    monkeypatch.chdir(tmp_path)
    dpcache.Schedule.uniform(3, 6).save_pretrained("mine")
    usage = Path("mine/README.md").read_text().split("```python\n")[1].split("```")[0]

    names: dict[str, Any] = {"pipe": flux, "prompt": "a small red ring"}
    exec(usage, names)
    assert names["schedule"] == dpcache.Schedule.uniform(3, 6)
    assert names["output"].images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("nowhere", {}, "no file or directory nowhere"),
        ("here", {"filename": "s-3.json"}, "holds s-5.json, schedule.json: give one as filename="),
        ("empty", {}, "made by `calibration.plan"),
    ],
)
def test_missing_on_disk(tmp_path, monkeypatch, source, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    made_schedule().save_pretrained("here")
    made_schedule(5).save_pretrained("here", filename="s-5.json")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        dpcache.Schedule.from_pretrained(source, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/flux", ("me/flux", None, None)),
        ("me/FLUX.1-dev@v1.0", ("me/FLUX.1-dev", "v1.0", None)),
        ("me/flux/schedule-9.json", ("me/flux", None, "schedule-9.json")),
        ("me/flux@main/sub/s.json", ("me/flux", "main", "sub/s.json")),
        ("me/s.json", None),
        ("s.json", None),
        ("/me/flux", None),
        ("./me/flux", None),
        ("me/flux/other", None),
        ("../me/s.json", None),
    ],
)
def test_what_text_says_of_a_repository(text, expected):
    names = ("source", "revision", "filename")
    assert repository_file(text, ".json") == (expected and dict(zip(names, expected, strict=True)))


@pytest.fixture(scope="module")
def hub():
    with fake_hub.serving() as server:
        yield server


def in_process(hub: fake_hub.FakeHub, home: Path, code: str, **environment: str) -> Any:
    """What `code` assigns to `result`, run by a Python that takes the server for the Hub."""
    before = "import json, dpcache\nfrom tests.test_hub import *\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{code}\nprint(json.dumps(result))"],
        env={**os.environ, **hub.environment(home), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
schedule, calibration = made_schedule(), made_calibration()
result = [
    schedule.push_to_hub("me/flux", base_model=FLUX),
    calibration.push_to_hub("me/flux", commit_message="What I measured"),
    made_schedule(9).push_to_hub("me/hidden", filename="schedule-9.json", private=True),
]
"""

PULL = """
assert dpcache.Schedule.from_pretrained("me/flux") == made_schedule()
assert dpcache.Schedule.from_pretrained("me/flux", revision=FIRST) == made_schedule()
assert dpcache.Schedule.from_pretrained("me/hidden", filename="schedule-9.json") == made_schedule(9)
result = "all"
"""

PULL_CALIBRATION = """
whole = dpcache.Calibration.from_pretrained("me/flux")
assert whole.facts == made_calibration().facts
np.testing.assert_array_equal(whole.paper_cost, made_calibration().paper_cost)
"""

FAIL = """
attempts = {
    "file": lambda: dpcache.Schedule.from_pretrained("me/flux", filename="other.json"),
    "revision": lambda: dpcache.Schedule.from_pretrained("me/flux", revision="v7"),
    "earlier": lambda: dpcache.Schedule.from_pretrained("me/flux", revision=EMPTY),
    "nobody": lambda: dpcache.Schedule.from_pretrained("no/body"),
    "private": lambda: dpcache.Schedule.from_pretrained("me/hidden", token="hf_of_somebody_else"),
    "gated": lambda: dpcache.Schedule.from_pretrained("someone/gated"),
    "strange": lambda: dpcache.Schedule.from_pretrained("someone/strange"),
    "broken": lambda: made_schedule().push_to_hub("someone/broken"),
    "writing": lambda: made_schedule().push_to_hub("me/flux", token="hf_of_somebody_else"),
    "name": lambda: made_schedule().push_to_hub("not a name/at all"),
}
errors = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except dpcache.HubError as error:
        errors[name] = str(error)
result = [result, errors]
"""


def test_push_and_pull(hub, tmp_path):
    empty, first = (fake_hub.commit_id("me/flux", number) for number in (0, 1))
    names = f"EMPTY, FIRST = {empty!r}, {first!r}\n"
    urls, errors = in_process(hub, tmp_path / "pushing", names + PUSH + FAIL)
    assert urls[0] == f"{hub.url}/me/flux/commit/{first}"
    assert hub.private == {"me/hidden"}
    files = hub.repositories["me/flux"][-1]
    assert set(files) == {".gitattributes", "README.md", "schedule.json", "calibration.safetensors"}
    assert files["calibration.safetensors"] in hub.stored.values()
    card = files["README.md"].decode()
    assert front_matter(card)["base_model"] == FLUX
    assert 'Schedule.from_pretrained("me/flux")' in card and 'Calibration.from_pretrained("me/flux")' in card
    assert cells(card)["K"] == "13" and cells(card)["pipeline"] == "FluxPipeline"

    expected = {
        "file": "no other.json in the repository me/flux; it holds schedule.json: give one as filename=",
        "revision": "no revision v7",
        "earlier": "no schedule.json in the repository me/flux; look for another",
        "nobody": "check it, and if it is private log in",
        "private": "check it, and if it is private log in",
        "gated": "is gated: accept its terms at https://huggingface.co/someone/gated",
        "strange": "something else: check HF_ENDPOINT and proxy",
        "broken": "the Hub answered 503 about someone/broken (Down for maintenance): try again later",
        "writing": "you may not write to me/flux: log in with `hf auth login`",
        "name": "is no repository's id",
    }
    assert set(errors) == set(expected)
    for name, message in expected.items():
        assert message in errors[name] and "\n" not in errors[name]

    # From another home, where nothing is in the cache yet; then once more without the Hub, from the cache alone.
    assert in_process(hub, tmp_path / "pulling", names + PULL + PULL_CALIBRATION) == "all"
    asked = len(hub.asked)
    _, errors = in_process(hub, tmp_path / "pulling", names + PULL + FAIL, HF_HUB_OFFLINE="1")
    assert len(hub.asked) == asked
    for name in ("nobody", "writing"):
        assert "the Hub cannot be reached" in errors[name] and "HF_HUB_OFFLINE" in errors[name]
