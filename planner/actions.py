"""The options of every region: keep, checkpoint, and the selective ones that are worth offering.

Which tensors may be kept is worked out once for regions that run the same program. Depends on the
effects of the actions.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from memfit.planner import recompute
from memfit.planner.kept_sets import KeptSet, kept_sets, lean_sets
from memfit.planner.leads import Lead, leads_to
from memfit.planner.moving import likeness, move_between
from memfit.planner.options import RegionOption
from memfit.planner.regions import Region
from memfit.planner.selective import RegionProgram, region_programs, selective
from memfit.planner.step_graph import StepGraph

# Selective options of a region: fewer where there are many regions, since these mix.
_FEWEST, _MOST, _IN_ALL = 8, 60, 960


def find_options(
    step: StepGraph,
    regions: Sequence[Region],
    rng_state_bytes: int,
    *,
    offer_selective: bool = True,
    gathered: Sequence[str] = (),
) -> tuple[tuple[RegionOption, ...], ...]:
    """For each region: keep first, then checkpoint and the selective options if it may recompute.

    ``rng_state_bytes`` is the size of a saved generator state. Options of which the solver's
    smallest budget is made (``lean``) come before others. What lies in modules of ``gathered`` does
    not run in the backward of others.
    """
    limit = max(_FEWEST, min(_MOST, _IN_ALL // max(1, len(regions))))
    programs: list[RegionProgram | None] = [None] * len(regions)
    if offer_selective:
        programs = region_programs(step, regions)
    known: dict[object, dict[KeptSet, bool]] = {}
    first: dict[Hashable, int] = {}
    found: list[tuple[RegionOption, ...]] = []
    for r, (region, compiled) in enumerate(zip(regions, programs, strict=True)):
        lead = None
        if compiled is not None:
            lead = leads_to(step, regions, r)
            if lead and any(f"{lead.name}.".startswith(f"{name}.") for name in gathered):
                lead = None
            key = None if lead else likeness(step, region, compiled)
            like = r if key is None else first.setdefault(key, r)
            if (own := programs[like]) is not None and like != r:
                move = move_between(step, (regions[like], own), (region, compiled))
                found.append(tuple(replace(option, move=move) for option in found[like]))
                continue
        options = [RegionOption("keep", recompute.keep(step, region), 0.0)]
        if not region.kept_because:
            effect = recompute.checkpoint(step, region, rng_state_bytes)
            options.append(RegionOption("checkpoint", effect, effect.seconds(step)))
        if compiled is not None:
            if compiled.program not in known:
                known[compiled.program] = _sets(step, region, compiled, rng_state_bytes, limit)
            for kept, lean in known[compiled.program].items():
                options += _selective(step, region, compiled, kept, rng_state_bytes, lean, lead)
        found.append(tuple(options))
    return tuple(found)


def _sets(
    step: StepGraph, region: Region, compiled: RegionProgram, rng_state_bytes: int, limit: int
) -> dict[KeptSet, bool]:
    """The sets worth offering, and whether they are lean."""
    lean = dict.fromkeys(lean_sets(step, region, compiled, rng_state_bytes), True)
    others = kept_sets(step, region, compiled, rng_state_bytes, limit)
    return lean | {kept: False for kept in others if kept not in lean}


def _selective(
    step: StepGraph,
    region: Region,
    compiled: RegionProgram,
    kept: KeptSet,
    rng_state_bytes: int,
    lean: bool,
    lead: Lead | None,
) -> Iterator[RegionOption]:
    """The option that keeps ``kept``, and the same without its input if a lead can make that."""
    effect = selective(step, region, compiled, kept, rng_state_bytes)
    option = RegionOption(
        "selective",
        effect,
        effect.seconds(step),
        compiled.names(kept),
        compiled.names(frozenset(compiled.program.droppable) - kept),
        lean,
    )
    yield option
    if lead is not None:
        effect = selective(step, region, compiled, kept, rng_state_bytes, lead.links)
        if led := lead.option(step, option, effect):
            yield led
