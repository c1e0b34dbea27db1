"""What a command or an import costs before anything is computed."""

import subprocess
import sys
import time

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
