"""Where memfit meets the world: applying plans to live models, models from configs, the command
line.

Depends on ``memfit.planner``. Names are imported when they are first asked for, so that the command
line can show its help and a plan without importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.integrations.applying import AppliedPlan, ApplyError, apply

__all__ = ["AppliedPlan", "ApplyError", "apply"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memfit.integrations import applying

    return getattr(applying, name)
