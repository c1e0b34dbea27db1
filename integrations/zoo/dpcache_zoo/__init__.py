"""Bundled models of dpcache that are not in its wheel: folders that `dpcache.load_pipeline` finds."""
