"""Schedules of dpcache inside cache-dit, and in the engines that embed it: they predict as the schedule says.

The engines call `register` by their entry points; it reads the schedules that DPCACHE_SCHEDULES names. With cache-dit
itself or xDiT, call it before the cache is enabled:

    import dpcache_engines
    dpcache_engines.register("flux-13.json")
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(num_inference_steps=50))
"""

from .plugin import VARIABLE, register, unregister
from .schedules import EngineError, Schedule

__all__ = ["VARIABLE", "EngineError", "Schedule", "register", "unregister"]
