"""What `dpcache.stats` tells."""

from dataclasses import dataclass


@dataclass
class Stats:
    """What happened since `enable`.

    Attributes:
        generations: sampling loops begun.
        computed_steps: steps of the latest generation whose denoiser calls all ran in full.
        predicted_steps: steps of the latest generation with at least one predicted call.
        full_calls: denoiser calls run in full, over all generations.
        predicted_calls: denoiser calls predicted, over all generations.
        cached_values: values held now.
        cached_bytes: bytes they take, on the device or, offloaded, in host memory.
        peak_cached_bytes: the most bytes that a generation held at any time.
    """

    generations: int = 0
    computed_steps: tuple[int, ...] = ()
    predicted_steps: tuple[int, ...] = ()
    full_calls: int = 0
    predicted_calls: int = 0
    cached_values: int = 0
    cached_bytes: int = 0
    peak_cached_bytes: int = 0
