"""What a command or an import costs before anything is computed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

HELP = "import sys; sys.argv = ['dpcache', '--help']; from dpcache.apps.cli import main; main()"


def seconds(code: str) -> float:
    """The best of several: other tests may run on the same machine."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_takes_less_than_300_ms() -> None:
    assert seconds("import dpcache") - seconds("pass") < 0.3


def test_help_takes_less_than_a_second() -> None:
    pytest.importorskip("typer")
    assert seconds(HELP) < 1


@pytest.mark.parametrize("code", ["import dpcache", "import dpcache; dpcache.plan", HELP])
def test_torch_is_not_imported_for_nothing(code: str) -> None:
    check = "import sys, atexit; atexit.register(lambda: print(sorted({'torch', 'diffusers'} & set(sys.modules))));"
    done = subprocess.run([sys.executable, "-c", check + code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


EVERYTHING = """
import dpcache
for name in dpcache.__all__: getattr(dpcache, name)
pipe = dpcache.load_pipeline("MODEL")
pipe.set_progress_bar_config(disable=True)
with dpcache.enabled(pipe, num_key_steps=3):
    pipe(INPUT, num_inference_steps=5)
"""


@pytest.mark.parametrize(("model", "words"), [("tiny-flux", "'a red ring'"), ("tiny-dit", "[3]")])
def test_other_libraries_say_nothing(model: str, words: str) -> None:
    """Of what they do without, and of extensions that do not fit, when dpcache imports them."""
    pytest.importorskip("torchao", reason="it says the most")
    pytest.importorskip("transformers")
    code = EVERYTHING.replace("MODEL", model).replace("INPUT", words)
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = [line for line in told.stderr.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    assert [line for line in lines if not line.startswith("Loading ")] == []  # the bars of diffusers
    assert told.stdout == ""


def test_what_they_say_later_is_heard() -> None:
    code = """
import logging, warnings
levels = {name: logging.getLogger(name).level for name in ("torchao", "transformers", "diffusers.pipelines")}
import dpcache
dpcache.load_pipeline("tiny-flux")
logging.getLogger("torchao").warning("of torchao")
logging.getLogger("diffusers.pipelines.flux").warning("of diffusers")
warnings.warn("of the user's own")
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert all(words in told for words in ("of torchao", "of diffusers", "of the user's own"))


@pytest.mark.parametrize("command", ["generate tiny-flux ring -k 3 -t 5 -o ring.png", "bench tiny-dit -t 5 --count 1"])
def test_commands_say_nothing_but_their_own(command: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="it says the most")
    pytest.importorskip("typer")
    program = [sys.executable, "-m", "dpcache", *command.split()]
    told = subprocess.run(program, check=True, capture_output=True, text=True, cwd=tmp_path).stderr
    assert all(line.startswith(("loading ", "drawing ", "bench: ")) for line in told.splitlines()), told
