"""Which steps to compute: schedules, predictors, costs and the planner. Numbers in, numbers out; no torch.

`dpcache.plan(cost, num_key_steps)` is public and has the name of this package. So the package can be called.
"""

import sys
import types
from typing import Any


class _Room(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `dpcache.plan.planner.plan`."""
        from .planner import plan

        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
