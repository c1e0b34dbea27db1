"""dpcache: diffusion transformers several times faster, without training."""

__version__ = "0.1.0"
