"""Train a bundled model from nothing: `python -m training.train tiny-flux`."""

import argparse
import importlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dpcache.zoo import BUNDLED
from training.stages import Interrupted

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train a bundled model and save it in diffusers format. Stopped with Ctrl-C, it resumes when the "
        "same command is given again.",
        epilog="example: python -m training.train tiny-flux --out runs/tiny-flux",
    )
    parser.add_argument("model", choices=list(BUNDLED), help="which model")
    parser.add_argument("--out", type=Path, help="directory for checkpoints and the result [runs/MODEL]")
    parser.add_argument("--device", help="where to train [CUDA if available, else the CPU]")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and noise [0]")
    parser.add_argument("--restart", action="store_true", help="discard the checkpoints in --out and start afresh")
    return parser.parse_args(arguments)


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[int], bool]]:
    """Ctrl-C asks the training to stop between two steps; a second one stops it at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda step: asked
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    options = _parse(arguments)
    out: Path = options.out or Path("runs") / options.model
    checkpoints = out / "checkpoints"
    if options.restart and checkpoints.exists():
        shutil.rmtree(checkpoints)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = importlib.import_module(f"training.{options.model.replace('-', '_')}")
    try:
        with _stop_on_interrupt() as should_stop:
            recipe.train(checkpoints, out / "pipeline", device=device, seed=options.seed, should_stop=should_stop)
    except Interrupted as stopped:
        print(f"{stopped}; give the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    judge = f"judge {options.model} --path {out}/pipeline"
    if options.model.startswith("hard"):
        judge = f"hardness {out}/pipeline --as {options.model}"
    print(f"saved {out / 'pipeline'}; judge it with: python -m training.{judge}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
