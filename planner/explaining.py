"""Why a plan is what it is: what each decision frees and pays, and what another budget would do.

Everything comes from the plan's record, so that a plan can be explained where torch is not
installed. Depends on the plan document and on the layout of the report.
"""

import difflib
from dataclasses import dataclass

from memfit.planner.budget import format_bytes
from memfit.planner.document import Plan, RegionPlan, Sensitivity
from memfit.planner.errors import PlanError
from memfit.planner.report import (
    columns,
    format_seconds,
    group_label,
    grouped,
    percent,
    wrapped,
)

# At the peak: what a smaller batch makes smaller. Other kinds are the model's.
_OF_THE_BATCH = frozenset(
    {"activation", "batch", "generator states and samples", "Python number", "workspace"}
)
# Recomputing more hardly helps where this share of the budget is alive whatever is recomputed.
_NEARLY = 0.95
_GIB = 2**30
_NOTHING = "-"
_UNKNOWN = (
    "the plan does not say what other budgets would do; make it again with this version of memfit"
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with neighbouring regions that are treated alike."""

    regions: str
    action: str
    freed_bytes: int
    recompute_seconds: float
    seconds_per_gib: float | None
    """Paid for each GiB that it frees; null where it frees nothing."""


@dataclass(frozen=True, slots=True)
class OtherBudget:
    """What a plan for another budget would recompute."""

    budget_bytes: int
    recompute_seconds: float | None
    """Null where that is not known."""
    overhead: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan's decisions, its neighbours, and what would help most."""

    decisions: tuple[Decision, ...]
    budgets: tuple[OtherBudget, ...]
    """In order, the plan's own among them; empty for a plan that does not say."""
    saved_seconds_per_gib: float | None
    """What a step saves for each further GiB of budget, near the plan's own."""
    added_seconds_per_gib: float | None
    """What it takes longer for each GiB less."""
    advice: tuple[str, ...]
    """Sentences, what helps most first."""


def explain(plan: Plan) -> Explanation:
    """Explains ``plan``, as far as its record goes."""
    decisions = tuple(_decision(group) for group in grouped(plan.regions))
    sensitivity = plan.sensitivity
    if sensitivity is None:
        return Explanation(decisions, (), None, None, (*_advice_on_peak(plan), _UNKNOWN))
    budgets = _budgets(plan, sensitivity)
    own = next(i for i, budget in enumerate(budgets) if budget.budget_bytes == _own_bytes(plan))
    advice = (*_advice_on_budget(plan, sensitivity), *_advice_on_peak(plan))
    return Explanation(
        decisions,
        budgets,
        _seconds_per_gib(budgets[own], next(iter(budgets[own + 1 :]), None)),
        _seconds_per_gib(next(iter(budgets[:own][::-1]), None), budgets[own]),
        advice,
    )


def regions_named(plan: Plan, name: str) -> tuple[RegionPlan, ...]:
    """The region ``name``, once for each call of its module; :class:`PlanError` if there is none.

    It may also be several that the tables show as one, such as ``h.0-9``.
    """
    found = tuple(region for region in plan.regions if region.name == name)
    if found:
        return found
    for group in grouped(plan.regions):
        if group_label(group) == name:
            return tuple(group)
    names = list(dict.fromkeys(region.name for region in plan.regions))
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    known = f"the nearest are {', '.join(nearest)}" if nearest else "it has none"
    raise PlanError(f"{name!r} is no region of the plan; {known}")


def _decision(group: list[RegionPlan]) -> Decision:
    freed_bytes = sum(region.freed_bytes for region in group)
    seconds = sum(region.recompute_seconds for region in group)
    price = seconds * _GIB / freed_bytes if freed_bytes else None
    return Decision(group_label(group), group[0].action, freed_bytes, seconds, price)


# -- other budgets -------------------------------------------------------------------------------


def _own_bytes(plan: Plan) -> int:
    """The plan's budget, or what of it the step can use."""
    assert plan.sensitivity is not None
    return min(plan.budget_bytes, plan.sensitivity.free_budget_bytes)


def _budgets(plan: Plan, sensitivity: Sensitivity) -> tuple[OtherBudget, ...]:
    own, free = _own_bytes(plan), sensitivity.free_budget_bytes
    rows = [
        _budget(plan, near.budget_bytes, near.recompute_seconds, "at most")
        for near in sensitivity.nearby
    ]
    seconds = plan.predicted.recompute_seconds
    rows.append(_budget(plan, own, seconds, "this plan"))
    if free > own:
        rows.append(_budget(plan, free, 0.0, "nothing is recomputed"))
    return tuple(sorted(rows, key=lambda row: row.budget_bytes))


def _budget(plan: Plan, budget_bytes: int, seconds: float | None, note: str) -> OtherBudget:
    if seconds is None:
        return OtherBudget(budget_bytes, None, None, "no single changes lead there")
    unplanned = plan.predicted.unplanned_step_seconds
    return OtherBudget(budget_bytes, seconds, seconds / unplanned if unplanned else 0.0, note)


def _seconds_per_gib(smaller: OtherBudget | None, larger: OtherBudget | None) -> float | None:
    """The slope between two budgets."""
    if smaller is None or larger is None:
        return None
    if smaller.recompute_seconds is None or larger.recompute_seconds is None:
        return None
    saved = smaller.recompute_seconds - larger.recompute_seconds
    return saved * _GIB / (larger.budget_bytes - smaller.budget_bytes)


# -- what would help -----------------------------------------------------------------------------


def _advice_on_budget(plan: Plan, sensitivity: Sensitivity) -> list[str]:
    predicted, free = plan.predicted, sensitivity.free_budget_bytes
    advice = []
    if predicted.recompute_seconds:
        more = percent(free / plan.budget_bytes - 1)
        advice.append(f"a budget of {_typed(free)}, {more} more, would need no recomputation")
    else:
        advice.append(f"nothing is recomputed, down to a budget of {_typed(free)}")
    if sensitivity.unavoidable_bytes >= _NEARLY * _own_bytes(plan):
        advice.insert(
            0,
            "recomputing more buys next to nothing: "
            f"{format_bytes(sensitivity.unavoidable_bytes)} are alive at once whatever is "
            "recomputed",
        )
    return advice


def _typed(budget_bytes: int) -> str:
    """A budget rounded up, so that it can be given to ``memfit plan`` as it stands."""
    return f"{-(-budget_bytes // 2**20)} MiB"


def _advice_on_peak(plan: Plan) -> list[str]:
    predicted = plan.predicted
    own = [size for k, size in predicted.alive_at_peak.items() if k in _OF_THE_BATCH]
    total = sum(predicted.alive_at_peak.values())
    share = sum(own) / max(1, total)
    if share >= 0.5:
        what = "belong to the batch: a smaller or shorter one lowers it most"
    else:
        share = 1 - share
        what = (
            "are parameters, gradients, optimizer state and the like, which no batch makes "
            "smaller: train fewer parameters, or in fewer bits, or shard the model"
        )
    return [f"the peak is in the {predicted.peak_at}; {percent(share)} of it {what}"]


# -- for people ----------------------------------------------------------------------------------


def format_explanation(plan: Plan, explanation: Explanation) -> str:
    """``explanation`` as tables and sentences."""
    blocks = (
        _decision_table(explanation),
        _budget_table(plan, explanation),
        "\n".join(wrapped("- ", sentence) for sentence in explanation.advice),
    )
    return "\n\n".join(block for block in blocks if block) + "\n"


def _decision_table(explanation: Explanation) -> str:
    if not explanation.decisions:
        return "no regions: nothing in this step can be recomputed"
    rows = [("region", "action", "frees", "pays", "per GiB")]
    for d in explanation.decisions:
        price = _NOTHING if d.seconds_per_gib is None else format_seconds(d.seconds_per_gib)
        seconds = format_seconds(d.recompute_seconds) if d.recompute_seconds else _NOTHING
        freed = format_bytes(d.freed_bytes) if d.freed_bytes else _NOTHING
        rows.append((d.regions, d.action, freed, seconds, price))
    return "\n".join(columns(rows, left=2))


def _budget_table(plan: Plan, explanation: Explanation) -> str:
    if not explanation.budgets:
        return ""
    rows: list[tuple[str, ...]] = [("budget", "", "recompute", "overhead", "")]
    for b in explanation.budgets:
        change = b.budget_bytes / _own_bytes(plan) - 1
        seconds = _NOTHING if b.recompute_seconds is None else format_seconds(b.recompute_seconds)
        overhead = _NOTHING if b.overhead is None else percent(b.overhead)
        rows.append(
            (
                format_bytes(b.budget_bytes),
                f"{100 * change:+.1f} %" if change else "",
                seconds,
                overhead,
                b.note,
            )
        )
    lines = _flush_notes(rows)
    assert plan.sensitivity is not None
    least = format_bytes(plan.sensitivity.unavoidable_bytes)
    prices = [
        f"one GiB {word} about {format_seconds(seconds)} a step"
        for word, seconds in (
            ("more saves", explanation.saved_seconds_per_gib),
            ("less costs", explanation.added_seconds_per_gib),
        )
        if seconds
    ]
    said = "; ".join([*prices, f"no budget below {least} has a plan"])
    return "\n".join([*lines, wrapped("", said)])


def _flush_notes(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows as columns, the last one flush left."""
    lines = columns([row[:-1] for row in rows], left=0)
    return [f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True)]


def format_regions(plan: Plan, regions: tuple[RegionPlan, ...]) -> str:
    """All that ``plan`` says of some of its regions."""
    return "\n\n".join(_region(plan, region) for region in regions) + "\n"


def _region(plan: Plan, region: RegionPlan) -> str:
    decision = _decision([region])
    pays = f"for {format_seconds(region.recompute_seconds)} in each step"
    if decision.seconds_per_gib is not None:
        pays += f", {format_seconds(decision.seconds_per_gib)} for each GiB that it frees"
    if total := plan.predicted.recompute_seconds:
        pays += f"; {percent(region.recompute_seconds / total)} of all recomputation"
    facts = {
        "region": f"{region.name}: {region.action}",
        "kept": region.kept_because,
        "stored": f"{format_bytes(region.stored_bytes)} from its forward to its backward",
        "freed": f"{format_bytes(region.freed_bytes)} that it would hold more if it were kept",
        "recomputes": pays if region.recompute_seconds else "",
        "keep": ", ".join(region.keep),
        "recompute": ", ".join(region.recompute),
        "input": ", ".join(region.recompute_input)
        and f"made again by the region before ({', '.join(region.recompute_input)})",
    }
    return "\n".join(wrapped(f"{name:{12}}", text) for name, text in facts.items() if text)
