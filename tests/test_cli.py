"""The command line, as a user types it."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import dpcache
from dpcache.apps import cli
from dpcache.apps.commands import show, terminal
from dpcache.apps.commands.failures import failure
from dpcache.measure.fingerprint import fingerprint
from dpcache.plan.planner import Plan
from dpcache.plan.schedule import listed
from tests.conftest import type_in

STEPS = "12"
RING = "a small red ring on a black background, top"
STAR = "a large blue star on a grey background, right"
PROGRAM = [sys.executable, "-c", "from dpcache.apps.cli import main; main()"]
COMMANDS = list(typer.main.get_command(cli.app).commands)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Types a command in a fresh folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    return partial(type_in, monkeypatch, capsys)


@pytest.fixture
def ask(run):
    """Types a command that must succeed, with --json; returns the one document on standard output."""

    def type_in(*words: str) -> dict:
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    return type_in


def test_calibrate_plan_generate_compare_show(run):
    code, out, err = run("calibrate", "tiny-flux", RING, STAR, "-o", "c.safetensors", "-t", STEPS)
    assert (code, out) == (0, "wrote c.safetensors: 2 inputs, 12 steps\n")
    assert "next: dpcache plan c.safetensors -k 3" in err
    assert [path.name for path in Path().iterdir()] == ["c.safetensors"]
    code, out, _ = run("plan", "c.safetensors", "-k", "5", "-o", "s.json")
    assert code == 0
    schedule = dpcache.Schedule.load("s.json")
    assert schedule.num_key_steps == 5
    code, out, err = run("generate", "tiny-flux", RING, "-s", "s.json", "-o", "ring.png", "--seed", "3", "--quiet")
    assert (code, err) == (0, "")
    assert Image.open("ring.png").size == (32, 32)
    code, _, _ = run("generate", "tiny-flux", "a red ring", "a star", "-s", "s.json", "-o", "image.webp")
    assert code == 0
    assert {path.name: Image.open(path).format for path in Path().glob("image*")} == {
        "image-0.webp": "WEBP",
        "image-1.webp": "WEBP",
    }
    code, out, _ = run("show", "s.json")
    assert code == 0
    assert "5 of 12 steps in full" in out
    code, out, _ = run("show", "c.safetensors", "-s", "s.json")
    assert code == 0
    assert "FluxTransformer2DModel" in out and f"5 key steps: {listed(schedule.key_steps)}" in out
    (chosen,) = [line for line in out.splitlines() if "→" in line]
    assert " 5 " in chosen and "2.40" in chosen
    Path("prompts.txt").write_text("a small red ring\n\na large blue star\n")
    command = ("compare", "tiny-flux", "--prompts", "prompts.txt", "--report", "r.html")
    code, out, _ = run(*command, "-s", "s.json", "--calibration", "c.safetensors", "-k", "3")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[:4] for row in rows if "of" in row] == [["s.json", "5", "of", "12"], ["c.safetensors", "-k", "3", "3"]]
    assert "a large blue star" in Path("r.html").read_text()


def test_json(ask):
    found = ask("calibrate", "tiny-flux", RING, STAR, "-o", "c.safetensors", "-t", STEPS)
    assert (found["output"], found["num_inputs"], found["num_inference_steps"]) == ("c.safetensors", 2, 12)
    plan = ask("plan", "c.safetensors", "-k", "4", "--steps", "10", "-o", "s.json")
    schedule = dpcache.Schedule.load("s.json")
    assert (plan["num_inference_steps"], tuple(plan["key_steps"])) == (10, schedule.key_steps)
    assert plan["cost"] == schedule.cost and plan["error"] is None
    assert ask("show", "s.json")["key_steps"] == plan["key_steps"]
    shown = ask("show", "c.safetensors", "-k", "4")
    assert shown["chosen"] == 4 and [p["num_key_steps"] for p in shown["plans"]] == [1, 2, 3, 4, 5, 6]
    # What a calibration plans for the number of steps at hand, as `enable` does and as `compare` says.
    drawn = ask("generate", "tiny-flux", RING, "--calibration", "c.safetensors", "-k", "4", "-t", "10", "-o", "a.png")
    (picture,) = drawn["pictures"]
    assert (picture["file"], picture["input"], drawn["calibration"]) == ("a.png", RING, "c.safetensors")
    found = ask(
        "compare",
        "tiny-flux",
        RING,
        "--calibration",
        "c.safetensors",
        "-k",
        "4",
        "-k",
        "10",
        "-t",
        "10",
        "-s",
        "s.json",
    )
    by_file, planned, full = found["comparisons"]
    assert planned["key_steps"] == picture["computed_steps"]
    assert (by_file["schedule"], by_file["calibration"]) == ("s.json", None)
    assert (planned["schedule"], planned["calibration"]) == (None, "c.safetensors")
    assert 20 < planned["psnr_mean"] < 60
    assert full["psnr_mean"] is None and full["ssim_mean"] == 1  # equal to the full run: infinite, which JSON is not


def test_prompts_in_lines_of_json(run, ask):
    """Every command that takes prompts draws what a line says; `generate` from the noise of its seed."""
    lines = [{"id": "ring", "prompt": RING, "seed": 3}, {"prompt": STAR, "guidance_scale": 2.0}]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("tiny-flux", "--prompts", "prompts.jsonl")
    assert ask("calibrate", *words, "-o", "c.safetensors", "-t", STEPS)["num_inputs"] == 2
    calls = dpcache.Calibration.load("c.safetensors").facts.calls
    assert [(call["prompt"], call.get("guidance_scale")) for call in calls] == [(RING, None), (STAR, 2.0)]
    assert ask("plan", "c.safetensors", "-k", "4", "-o", "s.json")["corrected_steps"]
    drawn = ask("generate", *words, "-s", "s.json", "-o", "a.png")["pictures"]
    assert [(picture["input"], picture["seed"]) for picture in drawn] == [(RING, 3), (STAR, 1)]
    ask("generate", "tiny-flux", RING, "-s", "s.json", "-o", "b.png", "--seed", "3")
    assert Image.open("a-0.png").tobytes() == Image.open("b.png").tobytes()
    (found,) = ask("compare", *words, "-s", "s.json")["comparisons"]
    assert [sample["input"] for sample in found["samples"]] == [RING, STAR]
    Path("prompts.jsonl").write_text('{"promt": "a ring"}')
    for command in (("calibrate", *words), ("generate", *words), ("compare", *words, "-s", "s.json")):
        code, _, err = run(*command)
        assert code == 2 and "takes no argument 'promt': did you mean prompt" in err


def test_plans_can_be_told_apart_at_60_columns(run, monkeypatch):
    assert run("calibrate", "tiny-flux", RING, "-o", "c.safetensors", "-t", "50")[0] == 0
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = run("show", "c.safetensors", "-k", "13")
    assert code == 0
    assert "…" not in out and max(len(line) for line in out.splitlines() if "key steps:" not in line) <= 60
    rows = [line.replace("→", "").split() for line in out.splitlines() if "·" in line]
    assert [int(row[0]) for row in rows] == list(range(1, 26))
    strips = [row[-1] for row in rows]
    assert len(set(strips)) == 25 == len(strips[0])
    count = {"█": 2, "▌": 1, "▐": 1, "·": 0}
    assert [sum(count[cell] for cell in strip) for strip in strips] == list(range(1, 26))
    code, out, _ = run("plan", "c.safetensors", "-k", "50")
    assert code == 0 and "50 of 50 steps in full (0 to 49)" in out


@pytest.mark.parametrize("steps", [100, 200, 1000])
def test_long_loops_fit_into_60_columns(capsys, monkeypatch, steps):
    monkeypatch.setenv("COLUMNS", "60")
    spread = {k: tuple(sorted({number * steps // k for number in range(k)})) for k in range(1, steps // 2 + 1)}
    plans = {k: Plan(keys, cost=k**-3.0) for k, keys in spread.items()}
    terminal.result({}, *show._trade_off(plans, {}, steps, "sampler", 13), show._strip(spread[20], steps))
    out = capsys.readouterr().out
    assert "…" not in out and max(len(line) for line in out.splitlines() if "key steps:" not in line) <= 60
    rows = [line for line in out.splitlines() if "░" in line]
    assert 20 < len(rows) <= 31 and any(row.startswith("→  13") for row in rows)
    whole = "".join(line.split()[-1] for line in out.splitlines()[-steps // 50 :])
    assert [step for step, cell in enumerate(whole) if cell == "█"] == list(spread[20])


def test_measured_calibration_goes_on_and_tells_errors(run):
    command = ("calibrate", "tiny-flux", RING, "-t", STEPS, "--sensitivity", "measured", "--checkpoint", "kept")
    assert run(*command, "-o", "one.safetensors")[0] == 0
    code, _, err = run(*command, "-o", "two.safetensors")
    assert code == 0 and "going on from kept: 1 input measured already" in err
    one, two = (dpcache.Calibration.load(f"{name}.safetensors") for name in ("one", "two"))
    assert one.facts == two.facts
    assert one.tried_error.tolist() == two.tried_error.tolist()
    code, out, _ = run("plan", "one.safetensors", "--max-error", "0.02")
    assert code == 0
    assert "expected error" in out
    code, out, _ = run("show", "one.safetensors", "-k", "3")
    assert code == 0
    assert "expected error" in out and "%" in out


def test_ctrl_c_in_a_terminal_then_the_same_command_goes_on(run, tmp_path):
    # So many that it is still at work when the signal comes, also on a busy machine.
    shapes, colours = ("ring", "star", "heart", "cross", "circle"), ("red", "blue", "green", "pink", "orange")
    prompts = [f"a {colour} {shape}" for colour in colours for shape in shapes]
    Path("prompts.txt").write_text("\n".join(prompts))
    words = ["calibrate", "tiny-flux", "--prompts", "prompts.txt", "-o", "c.safetensors", "-t", "20"]
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 100))
    # As in a terminal: whoever runs the tests in the background has the signal ignored, and so would the program.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=terminal, text=True, preexec_fn=heed)
    os.close(terminal)
    kept = Path("c.safetensors.partial")
    while not list(kept.glob("input-1-*")):
        assert started.poll() is None
        time.sleep(0.005)
    started.send_signal(signal.SIGINT)
    out, seen = started.communicate()[0], read_all(screen)
    assert (started.returncode, out) == (130, "")
    assert "/500 [" in seen  # the bar
    assert "calibrate: a full run takes" in seen and "the whole about" in seen
    assert "is kept in c.safetensors.partial, the same command goes on from there." in " ".join(seen.split())
    assert "Traceback" not in seen
    measured = len(list(kept.glob("input-*")))
    assert 2 <= measured < len(prompts)

    code, _, err = run(*words, "-t", "30")
    assert code == 1
    assert "with other --steps" in err and "--restart" in err

    code, out, err = run(*words)
    assert (code, out) == (0, "wrote c.safetensors: 25 inputs, 20 steps\n")
    assert f"{measured} inputs measured already" in err
    assert not kept.exists()
    whole = dpcache.calibrate(
        dpcache.load_pipeline("tiny-flux"), prompts, num_inference_steps=20, max_sequence_length=32, progress=False
    )
    resumed = dpcache.Calibration.load("c.safetensors")
    assert resumed.facts == whole.facts
    np.testing.assert_allclose(resumed.gram, whole.gram, rtol=1e-4)


def read_all(screen: int) -> str:
    """What was written to a terminal whose other side is closed."""
    seen = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # how Linux says that there is no more
            part = b""
        if not part:
            os.close(screen)
            return seen.decode()
        seen += part


def test_optimize(ask):
    found = ask("optimize", "tiny-flux", RING, STAR, "-k", "4", "-t", STEPS, "-o", "s.json", "--budget", "5")
    schedule = dpcache.Schedule.load("s.json")
    assert (found["num_key_steps"], found["error"]) == (4, schedule.error)
    assert schedule.num_key_steps == 4
    assert [path.name for path in Path().iterdir()] == ["s.json"]
    several = ask(
        "optimize", "tiny-flux", RING, STAR, "-k", "4,3", "-t", STEPS, "--budget", "6", "--objective", "worst"
    )
    assert [one["num_key_steps"] for one in several["schedules"]] == [3, 4]
    assert dpcache.Schedule.load("schedule-3.json").num_key_steps == 3


def test_demo_writes_everything(run):
    code, out, _ = run("demo", "-o", "demo", "--inputs", "2", "--steps", "12")
    assert code == 0
    assert "3 of 12" in out and "2 of 12" in out
    assert {
        "calibration.safetensors",
        "schedule-3.json",
        "schedule-2.json",
        "report.html",
        "00-full.png",
        "01-2-key-steps.png",
    } <= {path.name for path in Path("demo").iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad files to be wrong with."""
    folder = tmp_path_factory.mktemp("files")
    flux = dpcache.load_pipeline("tiny-flux")
    calibration = dpcache.calibrate(flux, [RING], num_inference_steps=6, max_sequence_length=32, progress=False)
    calibration.save(folder / "c.safetensors")
    calibration.plan(3).save(folder / "s.json")
    calibration.plan(2, num_inference_steps=5).save(folder / "five.json")
    (folder / "broken.json").write_text('{"format": "dpcache.sch')
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0")
    (folder / "words.json").write_text("words")
    (folder / "empty.txt").write_text("\n")
    calibration.plan(2, num_inference_steps=5).save(folder / "held" / "five.json")
    return folder


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("plan missing.safetensors -k 5", 1, "missing.safetensors. A calibration is made by"),
        ("plan s.json -k 5", 2, "s.json looks like a schedule, not a calibration"),
        ("plan builtin:13 -k 5", 2, "builtin:13 looks like a schedule, not a calibration"),
        ("plan c.safetensors", 2, "give one of --key-steps"),
        ("plan c.safetensors -k 3 --max-error 0.02", 2, "give one of --key-steps"),
        ("plan c.safetensors -k 7", 1, "--key-steps must be from 1 to the number of steps (6), got 7"),
        ("plan c.safetensors --max-error 0.1", 1, "calibrate with --sensitivity measured"),
        ("plan c.safetensors -k 3 --methd paper", 2, "--method"),
        ("plan c.safetensors -k 3 -o s.txt", 2, "call it s.json"),
        ("plan c.safetensors -k 3 -o s.json/s.json", 1, "cannot write to s.json (Not a directory)"),
        ("show broken.json", 1, "Make it anew"),
        ("show broken.safetensors", 1, "Make it anew"),
        ("show s.json -k 3", 2, "point at plans of a calibration"),
        ("show c.safetensors -k 7", 2, "--key-steps 7 is more than --steps 6"),
        ("show empty.txt", 2, "neither a schedule (.json) nor a calibration (.safetensors)"),
        ("show builtin:13", 1, "say builtin:NAME:K"),
        ("show held/five.json -s held", 2, "point at plans of a calibration"),
        ("show held", 1, "it holds five.json: name one behind a slash"),
        ("export builtin:flux1-dev:99 --to sglang", 1, "have 5 to 25 key steps, not 99"),
        ("calibrate tiny-flax ring", 1, "did you mean tiny-flux?"),
        ("calibrate some/model", 2, "give prompts"),
        ("calibrate tiny-flux --prompts missing.txt", 1, "missing.txt: No such file or directory: check the name."),
        ("calibrate tiny-flux --prompts empty.txt", 2, "empty.txt holds no prompts"),
        ("calibrate tiny-flux -t 2", 2, "--order 2 needs more than 2 --steps"),
        ("calibrate tiny-flux ring --set height=tall", 1, "TypeError"),
        ("calibrate tiny-flux -o c.json", 2, "call it c.safetensors"),
        ("generate tiny-flux ring --set guidance", 2, "NAME=VALUE"),
        ("generate tiny-flux ring --set guidence_scale=2", 2, "did you mean guidance_scale"),
        ("generate tiny-flux ring --set num_inference_steps=2", 2, "use --steps"),
        ("generate tiny-flux ring --set height=tall", 1, "Perhaps the pipeline does not take --set height=tall."),
        ("generate tiny-flux ring --image .", 1, ".: Is a directory: name a file in it."),
        ("generate tiny-flux ring --seed -3", 2, "--seed"),
        ("generate tiny-flux ring -k 51", 2, "--key-steps 51 is more than --steps 50"),
        ("generate tiny-flux ring -s words.json", 1, "words.json is not a whole JSON file. Make it anew"),
        ("compare tiny-flux -k 7 --calibration c.safetensors", 2, "--key-steps 7 is more than --steps 6"),
        ("bench tiny-flux -k 7 --calibration c.safetensors", 2, "--key-steps 7 is more than --steps 6"),
        ("optimize tiny-flux -k 50", 2, "nothing is skipped"),
        ("generate tiny-flux ring -o ring.tiff", 2, "call it ring.png"),
        ("generate tiny-flux ring -o .", 1, "is a folder"),
        ("generate tiny-flux ring -s s.json -t 5", 2, "s.json is for 6 steps, not 5"),
        ("generate tiny-flux ring -s c.safetensors", 2, "give it as --calibration c.safetensors"),
        ("generate tiny-flux ring -s builtin:13", 1, "no built-in schedules for tiny-flux"),
        ("generate tiny-flux ring -s builtin:flux1-dev:13 -t 5", 2, "builtin:flux1-dev:13 is for 50 steps, not 5"),
        ("compare tiny-flux -s builtin:flux1-dev:13", 1, "builtin:flux1-dev:13: the schedule was made for Flux"),
        ("generate tiny-flux ring -k 3 -s s.json", 2, "leave out -k"),
        ("generate tiny-dit 5 -s s.json", 1, "s.json: the schedule was made for FluxTransformer2DModel"),
        ("generate tiny-dit ring", 2, "draws classes, and 'ring' is none"),
        ("compare tiny-flux", 2, "--schedule"),
        ("compare tiny-flux -s s.json -s five.json", 2, "s.json has 6, five.json has 5"),
        ("compare tiny-flux -s s.json --report r.pdf", 2, "call it r.html"),
        ("compare tiny-dit --calibration c.safetensors -k 3", 1, "c.safetensors: the schedule was made for Flux"),
        ("optimize tiny-flux -k 9 -t 8", 2, "--key-steps 9 is more than --steps 8"),
        ("optimize tiny-flux -k 9;4", 2, "--key-steps 9;4 is neither a number nor several like 9,13"),
        ("optimize tiny-flux --budget soon", 2, 'or a time like "15 min"'),
        ("ui nosuch", 1, "no pipeline named 'nosuch'"),
        ("generate ./no/folder -k 5", 1, "no pipeline named './no/folder'"),
        ("ui tiny-flux --port 99999", 2, "less than or equal to 65535"),
        ("demo --model other", 1, "tiny-flux"),
        ("demo --inputs 100000", 1, "held-out inputs"),
        ("nonsense", 2, "nonsense"),
        ("", 2, ""),
        ("--quiet", 2, "name a command"),
    ],
)
def test_wrong_usage(run, monkeypatch, files, words, code, message):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    got, out, err = run(*words.split())
    assert got == code
    assert message in err
    *notes, last = err.splitlines() or [""]
    assert last.startswith("error: ") or not message
    assert not [note for note in notes if not note.startswith(("loading ", "drawing ", "calibrating "))]
    assert "Traceback" not in out + err
    assert sorted(files.iterdir()) == before
    got, out, err = run(*words.split(), "--json")
    if message:
        assert (got, out) == (code, "")
        document = json.loads(err.splitlines()[-1])
        assert document["exit_code"] == code and message in document["error"]


def test_a_package_that_does_not_fit_is_told_by_what_it_raised():
    error = ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'.")
    error.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    told = failure(error)
    assert told.message == f"{error} RuntimeError: operator torchvision::nms does not exist."


def test_debug_shows_where(run):
    code, _, err = run("generate", "tiny-flux", "a ring", "--set", "height=tall", "--debug")
    assert code == 1
    assert "Traceback" in err and "diffusers" in err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example(run, command):
    code, out, _ = run(*([command] if command else []), "--help")
    assert code == 0
    assert f"Example: dpcache {command}" in out
    assert all(option in out for option in ("--json", "--quiet", "--debug"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c"], {"calibrate", "compare"}),
        (["generate", "tiny-f"], {"tiny-flux"}),
        (["compare", "tiny-flux", "--cal"], {"--calibration"}),
        (["plan", "c.saf"], set()),  # the shell completes files
    ],
)
def test_completion(words, expected):
    environment = {
        **os.environ,
        "COMP_WORDS": " ".join(["dpcache", *words]),
        "COMP_CWORD": str(len(words)),
        "_DPCACHE_COMPLETE": "complete_bash",
    }
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True)
    assert set(done.stdout.split()) == expected


class Calls:
    """Counts what a model computes, and is interrupted at some point, as by Ctrl-C."""

    def __init__(self, monkeypatch, pipe):
        self.count, self.stop = 0, None
        monkeypatch.setattr("dpcache.zoo.load_pipeline", lambda *model, **how: pipe)
        self.handle = pipe.transformer.register_forward_pre_hook(self.add)

    def add(self, *call):
        self.count += 1
        if self.count == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def calls(monkeypatch, flux):
    counted = Calls(monkeypatch, flux)
    yield counted
    counted.handle.remove()


def test_generate_keeps_what_is_there(run, ask, calls):
    """After Ctrl-C, and whenever the same command is given again; what was drawn from something else is drawn anew."""
    words = ("generate", "tiny-flux", RING, STAR, "-o", "a.png", "-t", "4")
    calls.stop = 6
    code, _, err = run(*words)
    assert code == 130
    assert "interrupted: 1 picture written, the same command goes on from there." in err
    calls.count, calls.stop = 0, None
    found = ask(*words)["pictures"]
    assert ([picture["kept"] for picture in found], calls.count) == ([True, False], 4)
    before = Path("a-0.png").read_bytes()
    code, out, _ = run(*words)
    assert (code, out.count("kept a-"), calls.count) == (0, 2, 4)
    assert Path("a-0.png").read_bytes() == before
    Path("a-1.png").write_bytes(Path("a-1.png").read_bytes()[:-4])  # cut short
    assert [picture["kept"] for picture in ask(*words)["pictures"]] == [True, False]
    for other in (("--seed", "5"), ("--set", "guidance_scale=2.0"), ("-t", "5")):
        assert not any(picture["kept"] for picture in ask(*words, *other)["pictures"])
    several = ("generate", "tiny-flux", RING, "-o", "b.png", "-t", "2", "--set", "num_images_per_prompt=2")
    for kept in (False, True):
        found = ask(*several)["pictures"]
        assert [(p["file"], p["kept"]) for p in found] == [("b-0.png", kept), ("b-1.png", kept)]
    assert not ask("generate", "tiny-flux", RING, "-o", "c.webp", "-t", "2")["pictures"][0]["kept"]


def test_an_interrupted_comparison_is_of_the_inputs_that_are_done(run, calls, tmp_path):
    dpcache.Schedule.uniform(2, 4).save(tmp_path / "s.json")
    words = ("compare", "tiny-flux", RING, STAR, RING, "-s", "s.json", "--report", "r.html")
    per_input = 4 + 4  # the denoiser is called at skipped steps, too
    calls.stop = 4 + per_input + 5  # within the second
    code, out, err = run(*words, "--json")
    assert code == 130
    document = json.loads(out)
    assert document["num_inputs"] == 1 == len(document["comparisons"][0]["samples"])
    assert "interrupted: the table and the report are of 1 of 3 inputs" in json.loads(err.splitlines()[-1])["error"]
    assert RING in Path("r.html").read_text(encoding="utf-8")
    calls.count, calls.stop = 0, 4 + 2 * per_input + 3
    code, out, err = run(*words[:-2])
    assert (code, "s.json" in out) == (130, True)
    assert "interrupted: the table is of 2 of 3 inputs." in err
    calls.count, calls.stop = 0, 6  # within the first: nothing to tell
    code, out, err = run(*words[:-2])
    assert (code, out) == (130, "")


def test_without_its_extra_it_names_the_remedy():
    code = "import sys; sys.modules['typer'] = None; import dpcache.apps.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'error: the command line needs typer, which is not installed: pip install "dpcache[cli]"\n'


def test_what_is_kept_is_of_these_weights(flux):
    """Two models of one name and configuration, a model before and after training for instance, are not mixed."""
    before = fingerprint(flux)
    assert fingerprint(dpcache.load_pipeline("tiny-flux", device="cpu")) == before
    weights = flux.text_encoder.get_parameter(next(name for name, _ in flux.text_encoder.named_parameters()))
    kept = weights.detach().clone()
    try:
        weights.data.mul_(1.001)
        assert fingerprint(flux) != before
    finally:
        weights.data.copy_(kept)
    assert fingerprint(flux) == before
