"""Leads: modules that can make a region's input again from what is there anyway.

An embedding needs ids and weights only, so that the first block of a decoder need not hold its
input: in its backward the embedding runs again. Such a module is no region, since it holds nothing
about which there is anything to decide; what it does is a part of the options of the region that it
leads to. Depends on segments, for what passes between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memfit.planner.options import RegionOption
from memfit.planner.recompute import Chain, Effect
from memfit.planner.regions import Region, find_lead
from memfit.planner.segments import passed, rerun_of
from memfit.planner.selective import Links, region_program, selective
from memfit.planner.step_graph import StepGraph


@dataclass(frozen=True, slots=True)
class Lead:
    """What makes the input of a region."""

    name: str
    """FQN of the module."""
    inputs: frozenset[int]
    """Storages of the step that it makes and the region is given."""
    names: tuple[str, ...]
    """Their names in the module."""
    chain: Chain

    @property
    def links(self) -> Links:
        """Of the region that it leads to."""
        return Links(self.inputs, frozenset())

    def option(self, step: StepGraph, option: RegionOption, effect: Effect) -> RegionOption | None:
        """``option`` without its input, given its effect with :attr:`links`; None if its backward
        never needs it."""
        assert effect.chain is not None
        if effect.chain.given_at < 0:
            return None
        rerun = rerun_of((self.chain, effect.chain))
        recomputations = sorted((rerun, *effect.recomputations), key=lambda r: r.at)
        effect = replace(effect, recomputations=tuple(recomputations), chain=None)
        return replace(
            option,
            source=effect,
            recompute_seconds=effect.seconds(step),
            recompute_input=self.names,
            lead=self.name,
        )


def leads_to(step: StepGraph, regions: Sequence[Region], r: int) -> Lead | None:
    """The lead of region ``r``, if it has one."""
    for storage in passed(step, regions, range(len(step.ops)), r):
        module = find_lead(step, regions, storage)
        if module is not None and (found := _lead(step, regions, r, module)):
            return found
    return None


def _lead(step: StepGraph, regions: Sequence[Region], r: int, module: Region) -> Lead | None:
    compiled = None if module.kept_because else region_program(step, module, step.nodes)
    inputs = passed(step, regions, range(module.start, module.stop), r)
    if compiled is None or compiled.program.droppable or not inputs:
        return None
    program, nothing = compiled.program, frozenset[int]()
    for storage in compiled.local(inputs):
        sources = program.sources(storage, nothing)
        needed = [step.storages[compiled.storages[s]] for s in sources.storages]
        if sources.random or not all(source.kind.resident for source in needed):
            return None
        if not program.can_remake(storage, nothing):
            return None
    links = Links(nothing, inputs)
    chain = selective(step, module, compiled, nothing, 0, links).chain
    assert chain is not None
    return Lead(module.name, inputs, compiled.output_names(inputs), chain)
