"""What long work says of the time it takes."""

import sys

from tqdm.auto import tqdm


def say_how_long(work: str, noun: str, full_run: float, whole: float) -> None:
    """Above a progress bar, after the first full run: what that took, and what the whole will take.

    Args:
        work: who says it.
        noun: what the whole is called.
        full_run: seconds.
        whole: seconds.
    """
    tqdm.write(f"{work}: {how_long(noun, full_run, whole)}", file=sys.stderr)


def how_long(noun: str, full_run: float, whole: float) -> str:
    """The sentence of `say_how_long`."""
    one = f"{full_run:.2g} s" if full_run < 10 else duration(full_run)
    return f"a full run takes {one}, the {noun} about {duration(whole)}."


def duration(seconds: float) -> str:
    """In words, about."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
