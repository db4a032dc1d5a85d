"""Problems that the tests of the solvers share: random ones, and chains counted by hand."""

from dataclasses import replace

from hypothesis import strategies as st

from memfit.solvers import (
    Limits,
    Moment,
    Option,
    Phase,
    Problem,
    Region,
    Segment,
    SharedTensor,
    brute_force,
)

PHASES: tuple[Phase, ...] = ("forward", "backward")
EXACT = Limits(gap=0.0)


@st.composite
def options(draw: st.DrawFn, unit: int) -> Option:
    stored, forward, backward = (draw(st.integers(0, most)) * unit for most in (20, 30, 40))
    # Whole milliseconds, so that choices often tie and otherwise differ by more than rounding.
    return Option("selective", stored, forward, backward, draw(st.integers(0, 6)) / 1000)


@st.composite
def moments(draw: st.DrawFn, regions: int, unit: int) -> tuple[Moment, ...]:
    """The forward and backward of each region, and some moments of any other shape."""
    base = st.integers(0, 30)
    rows = [
        Moment(f"{phase} {r}", draw(base) * unit, r, r, phase)
        for r in range(regions)
        for phase in PHASES
    ]
    place = st.integers(0, regions - 1)
    for index in range(draw(st.integers(0, 3))):
        region = draw(st.none() | place)
        stored = draw(st.integers(0, regions))
        phase = draw(st.sampled_from(PHASES))
        rows.append(Moment(f"other {index}", draw(base) * unit, stored, region, phase))
    return tuple(rows)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A problem with a budget around what its choices take."""
    unit = draw(st.sampled_from((1, 512, 3_000_000_007)))
    count = draw(st.integers(1, 6))
    regions = tuple(
        Region(f"layers.{r}", tuple(draw(st.lists(options(unit), min_size=1, max_size=4))), r)
        for r in range(count)
    )
    rows = draw(moments(count, unit))
    holders = [(r, o) for r, region in enumerate(regions) for o in range(len(region.options))]
    shared = tuple(
        SharedTensor(
            f"shared {t}",
            draw(st.integers(1, 20)) * unit,
            tuple(draw(st.lists(st.sampled_from(holders), min_size=1, unique=True))),
            tuple(draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))),
        )
        for t in range(draw(st.integers(0, 3)))
    )
    problem = Problem(regions, rows, 0, shared)
    lowest = brute_force.minimise_peak(problem).peak_bytes
    budget = lowest + draw(st.integers(-2, 40)) * unit + draw(st.integers(-1, 1))
    return replace(problem, budget_bytes=budget)


def chain(regions: tuple[Region, ...], budget: int = 0, base: int = 0) -> Problem:
    """Regions one after the other, with a row for each forward and backward."""
    rows = [
        Moment(f"{phase} of {region.name}", base, r, r, phase)
        for r, region in enumerate(regions)
        for phase in PHASES
    ]
    return Problem(regions, (*rows, Moment("loss", base, len(regions))), budget)


def layers(count: int, *others: Option) -> tuple[Region, ...]:
    keep = Option("keep", 100, 110, 150, 0.0)
    choices = (keep, Option("checkpoint", 10, 100, 160, 0.25), *others)
    return tuple(Region(f"layers.{r}", choices, kind=0) for r in range(count))


@st.composite
def runs(draw: st.DrawFn) -> Problem:
    """A problem with a run of identical regions, whose bases rise or fall evenly."""
    unit = draw(st.sampled_from((1, 512, 3_000_000_007)))
    kinds = [tuple(draw(st.lists(options(unit), min_size=1, max_size=4))) for _ in range(2)]
    count, tail = draw(st.integers(3, 6)), draw(st.integers(0, 1))
    regions = tuple(
        Region(f"layers.{r}", kinds[r >= count], int(r >= count)) for r in range(count + tail)
    )
    rows = [Moment("loss", draw(st.integers(0, 60)) * unit, len(regions))]
    for phase, rise in (("forward", 3), ("backward", 8), ("after", 3)):
        base, step = draw(st.integers(40, 60)), draw(st.integers(-rise, rise))
        if phase == "after" and draw(st.booleans()):
            continue
        for r in range(len(regions)):
            size = max(0, base + step * r) * unit
            if phase == "after":
                rows.append(Moment(f"after {r}", size, r + 1))
            else:
                rows.append(Moment(f"{phase} {r}", size, r, r, phase))  # type: ignore[arg-type]
    shared = held(draw, regions, rows, unit)
    return at_some_budget(draw, Problem(regions, tuple(rows), 0, shared))


@st.composite
def alternating(draw: st.DrawFn) -> Problem:
    """Regions in turns, that differ in their options or in the mask that they hold."""
    unit = draw(st.sampled_from((1, 512, 3_000_000_007)))
    count, period = draw(st.integers(3, 6)), draw(st.integers(2, 3))
    menus = [tuple(draw(st.lists(options(unit), min_size=1, max_size=4))) for _ in range(2)]
    of_turn = [draw(st.integers(0, 1)) for _ in range(period)]
    kinds = [of_turn[r % period] for r in range(count)]
    regions = tuple(Region(f"layers.{r}", menus[kind], kind) for r, kind in enumerate(kinds))
    rows = [Moment("loss", draw(st.integers(0, 60)) * unit, count)]
    steps = {phase: draw(st.integers(-8, 8)) for phase in PHASES}
    rows += [
        Moment(f"{phase} {r}", (48 + steps[phase] * r) * unit, r, r, phase)
        for r in range(count)
        for phase in PHASES
    ]
    late = tuple(i for i, m in enumerate(rows) if m.region is None or m.phase == "backward")
    shared = []
    for turn in range(period):
        size = draw(st.integers(1, 20)) * unit
        own = [o for o in range(len(menus[of_turn[turn]])) if draw(st.booleans())]
        holders = tuple((r, o) for r in range(turn, count, period) for o in own)
        if holders:
            shared.append(SharedTensor(f"mask {turn}", size, holders, late))
    return at_some_budget(draw, Problem(regions, tuple(rows), 0, tuple(shared)))


def held(
    draw: st.DrawFn, regions: tuple[Region, ...], rows: list[Moment], unit: int
) -> tuple[SharedTensor, ...]:
    """Tensors that the same options of all regions of the first kind hold, as masks are."""
    shared = []
    count = sum(region.kind == regions[0].kind for region in regions)
    for t in range(draw(st.integers(0, 2))):
        numbers = st.integers(0, len(regions[0].options) - 1)
        own = draw(st.lists(numbers, min_size=1, unique=True))
        phases = draw(st.sampled_from((("backward",), PHASES)))
        moments = [i for i, m in enumerate(rows) if m.region is not None and m.phase in phases]
        holders = tuple((r, o) for r in range(count) for o in own)
        size = draw(st.integers(1, 20)) * unit
        shared.append(SharedTensor(f"mask {t}", size, holders, tuple(moments)))
    return tuple(shared)


def at_some_budget(draw: st.DrawFn, problem: Problem) -> Problem:
    """The problem with a budget around what its choices take."""
    lowest = brute_force.minimise_peak(problem).peak_bytes
    unit = max(1, lowest // 40)
    budget = lowest + draw(st.integers(-1, 12)) * unit + draw(st.integers(-1, 1))
    return replace(problem, budget_bytes=max(0, budget))


@st.composite
def nested(draw: st.DrawFn) -> Problem:
    """A problem with segments."""
    problem = draw(runs() | problems())
    count = len(problem.regions)
    unit = max(1, problem.budget_bytes // 40)
    kinds: dict[int, Region] = {}
    for region in problem.regions:
        chained = draw(st.lists(options(unit), max_size=2))
        own = (*region.options, *(replace(option, chained=True) for option in chained))
        kinds.setdefault(region.kind, replace(region, options=own[:5]))
    regions = tuple(replace(kinds[r.kind], name=r.name) for r in problem.regions)
    segments = {}
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, count - 1))
        choices: list[int] = []
        for r in range(first, draw(st.integers(first, count))):
            numbers = [o for o, x in enumerate(regions[r].options) if x.chained is (r > first)]
            if not numbers:
                break
            choices.append(draw(st.sampled_from(numbers)))
        if len(choices) < 2:
            continue
        inside = [
            i for i, m in enumerate(problem.moments) if first <= m.place < first + len(choices)
        ]
        held = {i: draw(st.integers(0, 9)) for i in inside if draw(st.booleans())}
        segments[first, tuple(choices)] = Segment(
            first,
            tuple(choices),
            draw(st.integers(0, 6)) / 1000,
            tuple((index, size * unit) for index, size in held.items()),
        )
    return at_some_budget(
        draw, replace(problem, regions=regions, segments=tuple(segments.values()))
    )
