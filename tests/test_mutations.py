"""Broken files: whatever is changed in one, reading it works or raises the one error that names the remedy.

DPCACHE_MUTATIONS sets how many mutations of every kind of file are tried, 10000 for a thorough search.
"""

import contextlib
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dpcache
from dpcache.files.journal import Journal
from dpcache.files.prompts import read_requests
from dpcache.measure.calibration_file import TENSORS, _digest

MUTATIONS = int(os.environ.get("DPCACHE_MUTATIONS", "1500"))
FILES = Path(__file__).parent / "files"
#: What takes the place of a value in JSON.
STRANGE = [None, True, False, -1, 0, 1, 3, 2.5, 1e308, -0.0, 10**30, 10**400, float("nan"), float("inf"), "", "x", "0"]
STRANGE += ["\ud800", [], {}, [1], [[]], {"key_step": 0}, {"0": []}, [0.5] * 4, "a" * 300]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 100])
    some = bytes(rng.randrange(256) for _ in range(length))
    return rng.choice(
        [
            data[:at] + some + data[at + length :],
            data[:at] + some + data[at:],
            data[:at] + data[at + length :],
            data[:at] + data[at : at + length] * 2 + data[at + length :],
            data[:at],
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            some + data,
        ]
    )


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value, with something in it replaced, left out, added or swapped."""
    inner = [part for part in (value.values() if isinstance(value, dict) else value) if isinstance(part, dict | list)]
    if inner and rng.random() < 0.6:
        place = rng.choice([key for key in keys_of(value) if isinstance(value[key], dict | list)])
        value[place] = mutate_json(value[place], rng)
        return value
    if not value:
        return rng.choice(STRANGE)
    key, way = rng.choice(keys_of(value)), rng.randrange(6)
    if way < 3:
        value[key] = rng.choice(STRANGE)
    elif way == 3:
        del value[key]
    elif isinstance(value, dict):
        value[rng.choice(["x", "7", key + "0"])] = rng.choice([value[key], rng.choice(STRANGE)])
    elif way == 4:
        value.append(rng.choice(STRANGE))
    else:
        value.insert(0, value[key])
    return value


def keys_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def mutated_schedule(data: bytes, rng: random.Random) -> bytes:
    document = mutate_json(json.loads(data), rng)
    if isinstance(document, dict) and rng.random() < 0.7:  # as if it had been written so
        fields = {name: value for name, value in document.items() if name not in ("format", "version", "digest")}
        document["digest"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(document).encode()


def mutated_calibration(data: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header["__metadata__"]
    if rng.random() < 0.5:
        metadata["facts"] = json.dumps(mutate_json(json.loads(metadata["facts"]), rng))
    elif rng.random() < 0.5:
        header = mutate_json(header, rng)
    else:
        at = 8 * rng.randrange(len(body) // 8)
        strange = rng.choice([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308])
        body = body[:at] + struct.pack("<d", strange) + body[at + 8 :]
    if isinstance(header, dict) and isinstance(metadata.get("facts"), str):
        parts = [header.get(name) for name in TENSORS]
        offsets = [part.get("data_offsets") if isinstance(part, dict) else None for part in parts]
        spans = [span for span in offsets if isinstance(span, list) and len(span) == 2]
        whole = [body[slice(*span)] for span in spans if all(isinstance(n, int) and abs(n) < 2**60 for n in span)]
        metadata["digest"] = hashlib.sha256(metadata["facts"].encode(errors="replace") + b"".join(whole)).hexdigest()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines) - 1)
    lines[place] = json.dumps(mutate_json(json.loads(lines[place]), rng)).encode()
    return b"\n".join(lines)


def use_calibration(path: Path) -> None:
    calibration = dpcache.Calibration.load(path)
    assert calibration == calibration and repr(calibration)
    with contextlib.suppress(ValueError):  # no plan from numbers like 1e308
        calibration.plan(min(2, calibration.facts.num_inference_steps))


def use_schedule(path: Path) -> None:
    schedule = dpcache.Schedule.load(path)
    assert repr(schedule) and schedule.last_uses
    for start in range(schedule.num_inference_steps):
        schedule.from_step(start)


def use_journal(path: Path) -> None:
    journal = Journal(path, {"inputs": ["a ring"], "seed": 0})
    assert journal.get("one", lambda: 0.25) == 0.25
    assert journal.get("two", lambda: [[1.0], [2.0]]) == [[1.0], [2.0]]


KINDS: dict[str, tuple[Callable[[bytes, random.Random], bytes], Callable[[Path], Any], type[Exception]]] = {
    "schedule.json": (mutated_schedule, use_schedule, dpcache.FileFormatError),
    "calibration.safetensors": (mutated_calibration, use_calibration, dpcache.FileFormatError),
    "journal.jsonl": (mutated_lines, use_journal, dpcache.FileFormatError),
    "prompts.jsonl": (mutated_lines, read_requests, dpcache.PromptError),
}


@pytest.fixture
def written(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / request.param
    if request.param == "journal.jsonl":
        use_journal(path)
    elif request.param == "prompts.jsonl":
        lines = [{"prompt": "a ring"}, {"id": "a", "seed": 3, "prompt": "a star", "guidance_scale": 2.0}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_bytes((FILES / request.param).read_bytes())
    return path


@pytest.mark.parametrize("written", KINDS, indirect=True)
@pytest.mark.filterwarnings("ignore")  # they overflow
def test_every_failure_names_the_remedy(written: Path) -> None:
    mutate, use, error = KINDS[written.name]
    whole = written.read_bytes()
    use(written)
    refused = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        data = mutated_bytes(whole, rng) if seed % 2 else mutate(whole, rng)
        written.write_bytes(data)
        try:
            use(written)
        except error as caught:
            refused += 1
            assert str(caught)
        except Exception as caught:
            raise AssertionError(f"mutation {seed} of {written.name}: {caught!r}") from caught
    assert refused > MUTATIONS / 4


def test_a_calibration_is_read_whatever_the_length_of_its_header(tmp_path: Path) -> None:
    """The file begins with that length: 0x80 is also how pickles begin, and 0x504B how archives do."""
    data = (FILES / "calibration.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    path, expected = tmp_path / "c.safetensors", dpcache.Calibration.load(FILES / "calibration.safetensors")
    for length in [*range(size, size + 256), 0x4B50]:
        header = data[8 : 8 + size].ljust(length)
        path.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
        assert dpcache.Calibration.load(path) == expected
    assert {length % 256 for length in range(size, size + 256)} == set(range(256))


def test_what_the_library_writes_it_reads(tmp_path: Path) -> None:
    """Prompts of many lengths, and with them headers."""
    calibration = dpcache.Calibration.load(FILES / "calibration.safetensors")
    for length in range(0, 300, 4):
        facts = calibration.facts.model_copy(update={"calls": ({"prompt": "x" * length},)})
        made = dpcache.Calibration(facts, **{name: getattr(calibration, name) for name in TENSORS})
        made.save(tmp_path / "c.safetensors")
        assert dpcache.Calibration.load(tmp_path / "c.safetensors").facts == facts


def test_files_written_before_still_load() -> None:
    schedule = dpcache.Schedule.load(FILES / "schedule.json")
    assert (schedule.key_steps, schedule.num_inference_steps) == ((0, 5, 11, 16, 22, 27, 33, 38, 44), 50)
    calibration = dpcache.Calibration.load(FILES / "calibration.safetensors")
    assert calibration.is_measured and calibration.plan(3).num_key_steps == 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gram", lambda a: a.astype(np.float32), "gram must be float64"),
        ("value_gram", lambda a: a[0], "value_gram must have the shape"),
        ("tried_error", lambda a: -a, "tried_error must be above 0"),
        ("influence", lambda a: a * np.nan, "influence must be finite"),
        ("tried", lambda a: np.roll(a, 1, axis=1), "tried must be 1 at key steps, step 0 among them"),
        ("probes", lambda a: a - 1e9, "probes must be 0 or more"),
        ("paper_cost", lambda a: a * np.nan, "paper_cost must hold no NaN"),
        ("paper_cost", None, "missing or unknown, paper_cost"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, change: Any, message: str) -> None:
    source, path = FILES / "calibration.safetensors", tmp_path / "c.safetensors"
    data = source.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load_file(source)
    old = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(old))
    save_file(tensors, path, metadata={**metadata, "digest": _digest(metadata["facts"], tensors)})
    with pytest.raises(dpcache.FileFormatError, match=message):
        dpcache.Calibration.load(path)
