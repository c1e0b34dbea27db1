"""dpcache: diffusion transformers several times faster, without training."""

from .costs import paper_cost
from .errors import InfeasibleBudgetError
from .planner import Plan, plan, plan_all

__version__ = "0.1.0"
