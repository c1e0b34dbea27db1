"""How far apart the paper's cost tensor lets key steps be: a limit of its own, which no other method has."""

#: Of the T steps, how far apart a key step and the one before it may be in the paper's tensor.
ANCHOR_LIMIT = 0.3
#: Gaps of good schedules, in mean gaps: the 64 best of FLUX.1-dev with 9 key steps of 50 have one of 2.3 to 3.1
#: (docs/golden.md).
LONGEST_GAP = 3.0


def farthest_anchor(num_steps: int, anchor_limit: float = ANCHOR_LIMIT) -> int:
    """How many steps before a key step the one before it may be."""
    return int(anchor_limit * num_steps + 1e-9)


def forbids_good_gaps(num_key_steps: int, num_steps: int, anchor_limit: float = ANCHOR_LIMIT) -> bool:
    """Whether the limit is shorter than the longest gap that a good schedule with so few key steps may have.

    That is three times the mean gap, or all that there is. With the paper's 0.3 it holds up to 10 key steps.
    """
    if num_key_steps < 2:
        return False
    mean, longest_possible = (num_steps - 1) / (num_key_steps - 1), num_steps - num_key_steps + 1
    return farthest_anchor(num_steps, anchor_limit) < min(LONGEST_GAP * mean, longest_possible)
