"""What planning can refuse. Messages say what, why and the way out."""


class MemfitError(Exception):
    """Base of all errors that memfit raises on purpose."""


def first_line(error: Exception) -> str:
    """What another library's error says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


class CaptureError(MemfitError, RuntimeError):
    """The training step of a model could not be recorded."""


class PlanError(MemfitError, ValueError):
    """A plan cannot be read, or was not made for the model at hand."""


class SolverError(MemfitError, ValueError):
    """A solver that is not known, not here, or cannot take the problem."""


class InfeasibleBudget(MemfitError, ValueError):
    """No plan keeps the budget; :attr:`minimum_bytes` is the smallest one that has a plan."""

    def __init__(self, message: str, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes


class ShardingError(MemfitError, ValueError):
    """A way to train in several processes that cannot be planned for."""
