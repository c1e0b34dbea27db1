"""The report: one HTML page, complete in itself, that shows what caching did to a model's pictures and its speed."""

try:
    import jinja2
    import matplotlib
except ImportError as error:
    raise ImportError(
        f'the report needs {error.name}, which is not installed: pip install "dpcache[report]"', name=error.name
    ) from error

from .page import write_report

__all__ = ["write_report"]
del jinja2, matplotlib
