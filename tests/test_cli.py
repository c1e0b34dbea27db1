"""The command line, as a user types it."""

import sys
from pathlib import Path

import pytest
from PIL import Image

import dpcache
from dpcache import cli

STEPS = "12"
RING = "a small red ring on a black background, top"
STAR = "a large blue star on a grey background, right"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Types a command in a fresh folder; returns exit code, standard output and error output in one line each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def type_in(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpcache", *words])
        monkeypatch.setattr(cli, "out", cli.Console(width=200))
        monkeypatch.setattr(cli, "err", cli.Console(stderr=True, width=200))
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return type_in


def test_calibrate_plan_generate_compare_show(run):
    code, out, _ = run("calibrate", "tiny-flux", RING, STAR, "-o", "c.safetensors", "-t", STEPS)
    assert code == 0
    assert "wrote c.safetensors: 2 inputs, 12 steps" in out
    code, out, _ = run("plan", "c.safetensors", "-k", "5", "-o", "s.json")
    assert code == 0
    schedule = dpcache.Schedule.load("s.json")
    assert schedule.num_key_steps == 5
    code, out, _ = run("generate", "tiny-flux", RING, "-s", "s.json", "-o", "ring.png", "--seed", "3")
    assert code == 0
    assert Image.open("ring.png").size == (32, 32)
    code, _, _ = run("generate", "tiny-flux", "a red ring", "a blue star", "-s", "s.json", "--set", "guidance_scale=2")
    assert code == 0
    assert {path.name for path in Path().glob("image*.png")} == {"image-0.png", "image-1.png"}
    Path("prompts.txt").write_text("a small red ring\n\na large blue star\n")
    code, out, _ = run("compare", "tiny-flux", "--prompts", "prompts.txt", "-s", "s.json", "--report", "r.html")
    assert code == 0
    assert "5 of 12" in out and "PSNR" in out
    assert "a large blue star" in Path("r.html").read_text()
    code, out, _ = run("show", "s.json")
    assert code == 0
    assert "5 of 12 steps in full" in out
    code, out, _ = run("show", "c.safetensors", "-s", "s.json")
    assert code == 0
    assert "FluxTransformer2DModel" in out and f"5 key steps: {' '.join(map(str, schedule.key_steps))}" in out
    (chosen,) = [line for line in out.splitlines() if "→" in line]
    assert " 5 " in chosen and "2.40" in chosen


def test_measured_calibration_goes_on_and_tells_errors(run):
    command = ("calibrate", "tiny-flux", RING, "-t", STEPS, "--sensitivity", "measured", "--checkpoint", "kept")
    assert run(*command, "-o", "one.safetensors")[0] == 0
    assert run(*command, "-o", "two.safetensors")[0] == 0
    one, two = (dpcache.Calibration.load(f"{name}.safetensors") for name in ("one", "two"))
    assert one.facts == two.facts
    assert one.tried_error.tolist() == two.tried_error.tolist()
    code, out, _ = run("plan", "one.safetensors", "--max-error", "0.02")
    assert code == 0
    assert "expected error" in out
    code, out, _ = run("show", "one.safetensors", "-k", "3")
    assert code == 0
    assert "expected error" in out and "%" in out
    code, _, err = run("plan", "one.safetensors", "--max-error", "0.02", "-k", "3")
    assert code == 2
    assert "give one of" in err


def test_optimize(run):
    code, out, _ = run("optimize", "tiny-flux", RING, STAR, "-k", "4", "-t", STEPS, "-o", "s.json", "--polish", "2")
    assert code == 0
    assert "wrote s.json: 4 of 12 steps in full" in out and "error" in out
    assert dpcache.Schedule.load("s.json").num_key_steps == 4


def test_demo_writes_everything(run):
    code, out, _ = run("demo", "-o", "demo", "--inputs", "2")
    assert code == 0
    assert "13 of 50" in out and "9 of 50" in out
    assert {
        "calibration.safetensors",
        "schedule-13.json",
        "schedule-9.json",
        "report.html",
        "00-full.png",
        "01-9-key-steps.png",
    } <= {path.name for path in Path("demo").iterdir()}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "missing.safetensors", "-k", "5"], 1, "missing.safetensors"),
        (["show", "broken.json"], 1, "Make it anew"),
        (["show", "broken.safetensors"], 1, "Make it anew"),
        (["calibrate", "tiny-flax", "a ring"], 1, "Bundled models: tiny-flux"),
        (["calibrate", "some/model"], 2, "give prompts"),
        (["generate", "tiny-flux", "a ring", "--set", "guidance"], 2, "NAME=VALUE"),
        (["compare", "tiny-flux"], 2, "--schedule"),
        (["plan", "c.safetensors"], 2, "--key-steps"),
        (["nonsense"], 2, "nonsense"),
        (["demo", "--model", "other"], 1, "tiny-flux"),
    ],
)
def test_wrong_usage(run, words, code, message):
    Path("broken.json").write_text('{"format": "dpcache.sch')
    Path("broken.safetensors").write_bytes(b"\x10\0\0")
    got, out, err = run(*words)
    assert got == code
    assert message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", ["", "demo", "optimize", "calibrate", "plan", "generate", "compare", "show", "ui"])
def test_help_shows_an_example(run, command):
    code, out, _ = run(*([command] if command else []), "--help")
    assert code == 0
    if command:
        assert f"dpcache {command}" in out and "Example" in out
