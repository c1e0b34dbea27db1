"""The report: one HTML page, complete in itself, that shows what caching did to a model's pictures and its speed."""

from dpcache.errors import missing_extra

try:
    import jinja2
    import matplotlib
except ImportError as error:
    raise missing_extra("the report", error, "dpcache[report]") from error

from .page import write_report

__all__ = ["write_report"]
del jinja2, matplotlib
