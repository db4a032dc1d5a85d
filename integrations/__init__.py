"""Where memfit meets the world: applying plans to live models, models from configs, the command
line.

Depends on ``memfit.planner``. Names are imported when they are first asked for, so that the command
line can show its help and a plan without importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.integrations.applying import AppliedPlan, ApplyError, apply
    from memfit.integrations.trainer import MemfitCallback

__all__ = ["AppliedPlan", "ApplyError", "MemfitCallback", "apply"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "trainer" if name == "MemfitCallback" else "applying"
    return getattr(import_module(f"memfit.integrations.{module}"), name)
