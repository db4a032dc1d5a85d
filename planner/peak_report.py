"""The tensors that are alive at a plan's peak, as a table for terminals and logs.

Everything in it comes from the plan's record. Depends on the plan document and on ``report``.
"""

from memfit.planner.budget import format_bytes
from memfit.planner.document import Plan
from memfit.planner.report import columns, format_tensor
from memfit.planner.timeline import AliveTensor


def format_peak(plan: Plan, count: int) -> str:
    """The ``count`` largest tensors at the peak; those that are alike share a row.

    Raises :class:`PlanError` for a plan that has no timeline.
    """
    tensors = plan.recorded_timeline().at_peak
    shown, rest = tensors[:count], tensors[count:]
    head, *rows = columns(
        [("kind", "tensor", "count", "each", "all"), *map(_cells, shown)],
        left=2,
    )
    number = sum(t.count for t in tensors)
    lines = [
        f"{format_bytes(plan.predicted.peak_bytes)} in {number:,} tensors are alive at the peak,",
        f"in the {plan.predicted.peak_at}",
        "",
        head,
    ]
    for tensor, row in zip(shown, rows, strict=True):
        lines += [row, f"  {tensor.path}"]
    if rest:
        total = format_bytes(sum(t.total_bytes for t in rest))
        lines += ["", f"others: {total} in all ({sum(t.count for t in rest):,} of them)"]
    return "\n".join(lines) + "\n"


def _cells(tensor: AliveTensor) -> tuple[str, ...]:
    return (
        tensor.kind,
        describe(tensor),
        str(tensor.count),
        format_bytes(tensor.size_bytes),
        format_bytes(tensor.total_bytes),
    )


def describe(tensor: AliveTensor) -> str:
    """Shape and dtype, or a dash where there is no one."""
    return format_tensor(tensor.shape, tensor.dtype) if tensor.dtype else "-"
