"""Plans a training step into a memory budget: capture, costs, regions, simulation, ``plan()``.

Depends on ``memfit.solvers`` and torch, and knows no live training. Names are imported when they
are first asked for, so that reading a plan does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.planner.batches import Batch
    from memfit.planner.document import Plan
    from memfit.planner.errors import InfeasibleBudget, MemfitError
    from memfit.planner.planning import plan

__all__ = ["Batch", "InfeasibleBudget", "MemfitError", "Plan", "plan"]

_HOME = {
    "Batch": "batches",
    "InfeasibleBudget": "errors",
    "MemfitError": "errors",
    "Plan": "document",
    "plan": "planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
