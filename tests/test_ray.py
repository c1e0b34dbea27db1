"""Many pictures on a real Ray cluster of this machine: each exactly once, whatever happens to the workers."""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpcache
from dpcache.errors import GenerationError
from dpcache.files.pictures import is_whole, read_note
from tests.conftest import QUICK, STEPS, type_in

ray = pytest.importorskip("ray", reason="Ray is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

from dpcache.integrations.folder import INDEX, Folder, Job  # noqa: E402
from dpcache.integrations.ray import Worker, generate  # noqa: E402

PROMPTS = [
    f"a {size} {colour} ring on a grey background"
    for size in ("small", "large")
    for colour in ("red", "blue", "green", "yellow", "purple", "orange")
]
SCHEDULE = dpcache.Schedule.uniform(4, STEPS)
LENGTH = {"max_sequence_length": QUICK["max_sequence_length"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers' worth: of GPUs too, which Ray counts and hands out whether there are any or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray leaves one in the home directory
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=1,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Types a command in a fresh folder; returns exit code, standard output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    return partial(type_in, monkeypatch, capsys)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def entries(folder: Path) -> dict[str, tuple[int, int]]:
    """What is in the folder, and when it was put there."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


class Killer(threading.Thread):
    """Kills a worker that is drawing, once there are two pictures; sees that the prompt is tried again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.pictures = -1
        self.processes: list[int] = []

    def run(self) -> None:
        ending = time.monotonic() + 300
        while time.monotonic() < ending:
            time.sleep(0.005)
            done = {path.stem for path in self.folder.glob("*.png")}
            for log in self.folder.glob(".run-*/*.tries"):
                if not self.processes and len(done) >= 2 and log.stem not in done:
                    self.try_to_kill(log)
                elif self.processes and log.stem == self.victim:
                    self.processes = processes(log) or self.processes
                    if len(self.processes) > 1:
                        return

    def try_to_kill(self, log: Path) -> None:
        for process in processes(log):
            os.kill(process, signal.SIGSTOP)
            if (self.folder / f"{log.stem}.png").exists():
                os.kill(process, signal.SIGCONT)
                continue
            os.kill(process, signal.SIGKILL)
            self.victim, self.processes = log.stem, [process]
            self.pictures = len(list(self.folder.glob("*.png")))


def processes(log: Path) -> list[int]:
    try:
        return [json.loads(line)["process"] for line in log.read_text().splitlines()]
    except (OSError, ValueError):  # gone, or being written
        return []


def test_a_worker_is_killed_and_every_picture_is_there_once(cluster, run, tmp_path):
    lines = [{"id": f"ring-{number}", "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    lines[3]["seed"] = 5
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    SCHEDULE.save(tmp_path / "s.json")
    folder = tmp_path / "rings"
    killer = Killer(folder)
    killer.start()
    results = generate("tiny-flux", file, folder, schedule=SCHEDULE, gpus_per_worker=0.5, progress=False, **LENGTH)
    killer.join()

    assert 2 <= killer.pictures < len(PROMPTS), "nobody was killed in the middle"
    assert len(set(killer.processes)) == 2, "what the killed worker was drawing was not given to another"
    assert set(entries(folder)) == {INDEX, *(f"{line['id']}.png" for line in lines)}
    # Bit for bit what one process draws.
    words = ("tiny-flux", "--prompts", "prompts.jsonl", "-s", "s.json", "--set", "max_sequence_length=24")
    assert run("generate", *words, "-o", "single.png")[0] == 0
    for number, line in enumerate(lines):
        assert np.array_equal(pixels(folder / f"{line['id']}.png"), pixels(tmp_path / f"single-{number}.png"))
    rows = parquet.read_table(folder / INDEX).to_pylist()
    assert rows == [vars(result) for result in results]
    for row, line in zip(rows, lines, strict=True):
        assert (row["id"], row["prompt"], row["error"]) == (line["id"], line["prompt"], None)
        assert row["file"] == f"{line['id']}.png" and row["seconds"] > 0
        assert (row["full_calls"], row["num_key_steps"], row["num_inference_steps"]) == (4, 4, STEPS)
    assert rows[3]["seed"] == 5 and len({row["seed"] for row in rows}) == len(rows)

    # Again: nothing is repeated. With less there, only what is missing or cut short.
    words = (*words, "--ray", "auto", "-o", "rings")
    before = entries(folder)
    code, out, _ = run("generate", *words)
    assert code == 0 and "12 of 12 prompts have their picture" in out
    after = entries(folder)
    assert {name for name in before if before[name] != after[name]} == {INDEX}
    expected = [pixels(folder / f"ring-{number}.png") for number in (4, 7)]
    (folder / "ring-4.png").unlink()
    whole = (folder / "ring-7.png").read_bytes()
    (folder / "ring-7.png").write_bytes(whole[: len(whole) // 2])
    file.write_text(file.read_text() + '\n{"promt": "a ring"}')
    before = entries(folder)
    code, out, err = run("generate", *words)
    assert code == 1 and "12 of 13 prompts" in out
    assert "1 of 13 prompts could not be drawn, 000012 for one: TypeError" in err and "tries them again" in err
    after = entries(folder)
    assert {name for name in after if before.get(name) != after[name]} == {INDEX, "ring-4.png", "ring-7.png"}
    for number, picture in zip((4, 7), expected, strict=True):
        assert np.array_equal(pixels(folder / f"ring-{number}.png"), picture)
    last = parquet.read_table(folder / INDEX).to_pylist()[-1]
    assert last["id"] == "000012" and last["file"] is None and "promt" in last["error"]

    # What was drawn from something else is neither taken for it nor written over.
    before = entries(folder)
    code, _, err = run("generate", *words, "--seed", "1")
    assert code == 1 and "ring-0.png was not drawn from this prompt with this seed" in err
    assert entries(folder) == before


def fragile() -> Any:
    """tiny-flux, with prompts that it cannot stand."""
    pipeline = dpcache.load_pipeline("tiny-flux")
    encode, shied = pipeline.encode_prompt, []

    def encode_prompt(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        text = " ".join([prompt] if isinstance(prompt, str) else prompt)
        if "bomb" in text:
            os._exit(9)
        if "crash" in text:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        if "dud" in text:
            raise ValueError("nothing can be drawn of it\nas was to be expected")
        if "shy" in text and not shied:
            shied.append(text)
            raise ValueError("not now")
        return encode(prompt, *args, **kwargs)

    pipeline.encode_prompt = encode_prompt
    return pipeline


def test_a_prompt_that_kills_its_worker_does_not_stop_the_others(cluster, tmp_path):
    prompts = [PROMPTS[0], "a bomb", PROMPTS[1]]
    arguments = {"num_inference_steps": 2, **LENGTH}
    results = generate(fragile, prompts, tmp_path, num_workers=1, max_retries=0, progress=False, **arguments)
    drawn, bomb, also = results
    assert drawn.error is None and also.error is None
    assert bomb.error == "its worker died: out of memory?" and bomb.file is None
    assert set(entries(tmp_path)) == {INDEX, "000000.png", "000002.png"}
    assert parquet.read_table(tmp_path / INDEX).to_pylist() == [vars(result) for result in results]
    assert (drawn.full_calls, drawn.num_inference_steps, drawn.num_key_steps) == (None, 2, 2)


def jobs(prompts: list[str]) -> str:
    arguments = {"num_inference_steps": STEPS, **LENGTH}
    found = [Job(f"{n}", prompt, n, {"prompt": prompt, **arguments}, "here") for n, prompt in enumerate(prompts)]
    return json.dumps([vars(job) for job in found])


def test_prompts_of_one_call(tmp_path):
    """They are drawn together; where that fails, each by itself, and again."""
    folder = Folder(tmp_path)
    with folder.open():
        worker = Worker(fragile, SCHEDULE, folder, tries=3)
        together = {"jobs": jobs(PROMPTS[:3])}
        assert json.loads(worker(together)["errors"]) == {"0": "", "1": "", "2": ""}
        pictures = [pixels(tmp_path / f"{n}.png").astype(int) for n in range(3)]
        notes = [json.loads(read_note(tmp_path / f"{n}.png")) for n in range(3)]
        assert len({note["seconds"] for note in notes}) == 1 and notes[0]["full_calls"] == 4
        before = entries(tmp_path)
        assert json.loads(worker(together)["errors"]) == {"0": "", "1": "", "2": ""}
        assert entries(tmp_path) == before, "what is there was drawn again"
    for n in range(3):
        (tmp_path / f"{n}.png").unlink()
    with folder.open():
        fault = worker({"jobs": jobs([PROMPTS[0], "a dud", f"{PROMPTS[2]}, shy"])})
        assert json.loads(fault["errors"]) == {"0": "", "1": "ValueError: nothing can be drawn of it", "2": ""}
        assert len(folder.tries(Job("1", "", 1, {}, ""))) == 3
    # A larger batch rounds in another order.
    assert np.abs(pixels(tmp_path / "0.png").astype(int) - pictures[0]).max() <= 1
    assert is_whole(tmp_path / "2.png")


def test_a_worker_does_not_go_on_with_a_broken_device(tmp_path):
    """Its process ends, so that another takes its place; what happened is on record."""
    folder = Folder(tmp_path)
    with folder.open():
        worker = Worker(fragile, None, folder, tries=2)
        call = {"jobs": jobs(["a crash"])}
        child = os.fork()
        if not child:
            worker(call)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        (first,) = folder.tries(Job("0", "", 0, {}, ""))
        assert first.process == child
        assert first.error == "AcceleratorError: CUDA error: device-side assert triggered"


def test_a_picture_of_nothing_is_an_error(tmp_path):
    def broken() -> Any:
        pipeline = dpcache.load_pipeline("tiny-flux")
        pipeline.transformer.proj_out.weight.data.fill_(float("nan"))
        return pipeline

    folder = Folder(tmp_path)
    with folder.open():
        errors = json.loads(Worker(broken, None, folder, tries=1)({"jobs": jobs(PROMPTS[:1])})["errors"])
    assert "NaN" in errors["0"]
    assert not list(tmp_path.glob("*.png"))


def test_what_no_worker_can_do(cluster, tmp_path):
    folder = Folder(tmp_path / "pictures")
    assert "does not see" in Worker("tiny-flux", None, folder, 1)({"jobs": "[]"})["fault"]
    with folder.open():
        fault = Worker("tiny-flax", None, folder, 1)({"jobs": "[]"})["fault"]
        assert "could not set up the model: UnknownModelError: no pipeline named 'tiny-flax'" in fault
    with pytest.raises(GenerationError, match="no machine of the cluster has 2 GPUs"):
        generate("tiny-flux", PROMPTS, tmp_path, gpus_per_worker=2, address="local", progress=False)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        generate("tiny-flux", PROMPTS, tmp_path, batch_size=0)


def test_wrong_usage(run):
    assert "name one" in run("generate", "tiny-flux", "a ring", "--ray", "local")[2]
    code, _, err = run("generate", "tiny-flux", "a ring", "--workers", "2")
    assert code == 2 and "are for --ray" in err
    words = ("generate", "tiny-flux", "a ring", "--ray", "local", "-o", "rings")
    code, _, err = run(*words, "--calibration", "c.safetensors", "-k", "3")
    assert code == 2 and "--ray takes a --schedule" in err
    code, _, err = run(*words, "-s", "builtin:13")
    assert code == 1 and "no built-in schedules for tiny-flux" in err
    assert not Path("rings").exists()


def test_no_cluster(run, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the other tests' cluster is of no account
    for address in ("127.0.0.1:1", "nonsense"):
        code, _, err = run("generate", "tiny-flux", "a ring", "--ray", address, "-o", "rings")
        assert code == 1 and f"no Ray cluster at '{address}' (" in err and "start one with" in err


def test_without_ray_the_remedy_is_named(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "dpcache.integrations.ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("generate", "tiny-flux", "a ring", "--ray", "local", "-o", "rings")
    assert code == 1 and 'needs ray, which is not installed: pip install "dpcache[ray]"' in err
