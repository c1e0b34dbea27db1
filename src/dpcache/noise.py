"""What other libraries say while they are imported: advice to their developers, of no use to who imports dpcache."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

#: Who says it: torchao and torchvision of extensions built for another torch, transformers of packages that it does
#: without, torch of what torchao registers. What they say beside it, of weights for instance, comes from elsewhere.
_LOGGERS = (
    "torchao",
    "torchvision",
    "torch.utils._pytree",
    "transformers.utils.import_utils",
    "diffusers.quantizers",
    "diffusers.utils.import_utils",
)
_MODULES = r"(torchao|torchvision|transformers|diffusers|accelerate|peft)(\.|$)"


@contextlib.contextmanager
def quietly(*others: str) -> Iterator[None]:
    """Within it these libraries say nothing of what they import, below an error.

    Args:
        *others: further loggers, by name.
    """
    loggers = [logging.getLogger(name) for name in (*_LOGGERS, *others)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_MODULES)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
