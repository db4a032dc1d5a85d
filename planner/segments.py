"""Segments: neighbouring regions of which only the first holds its input.

For budgets below what the inputs of all regions take. When the backward comes to the last region of
a segment, the ones before it run again, one after the other, to make each other's inputs; a region
then holds its input until its own backward. Which regions can be chained, what they then do, and
what a segment runs again is decided here; depends on the effects of the action ``selective``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

from memfit.planner.options import RegionOption, SegmentOption
from memfit.planner.recompute import Chain, Copy, Effect, Recomputation
from memfit.planner.regions import Region
from memfit.planner.selective import Links, RegionProgram, region_programs, selective
from memfit.planner.step_graph import Kind, Phase, StepGraph

# Sets of kept tensors that are offered, those that store least.
_KEPT_SETS = 4

Options = tuple[tuple[RegionOption, ...], ...]


def find_segments(
    step: StepGraph, regions: Sequence[Region], options: Options, rng_state_bytes: int
) -> tuple[Options, tuple[SegmentOption, ...]]:
    """The options with those that only segments may choose at their end, and the segments."""
    return _Finder(step, regions, options, rng_state_bytes).find()


def with_reruns(effects: Sequence[Effect], segments: Sequence[SegmentOption]) -> list[Effect]:
    """The effects of a choice, what the chosen segments run again among them."""
    out = list(effects)
    for segment in segments:
        last = out[segment.last]
        out[segment.last] = replace(last, recomputations=(segment.rerun, *last.recomputations))
    return out


def passed(step: StepGraph, regions: Sequence[Region], before: range, r: int) -> frozenset[int]:
    """Storages that the ops ``before`` make, and that region ``r`` is given and no other one."""
    made = {
        s
        for s in step.calls[regions[r].call].inputs
        if step.storages[s].born in before and step.storages[s].kind is Kind.ACTIVATION
    }
    for other in regions:
        if other is not regions[r]:
            made.difference_update(step.calls[other.call].inputs)
    for op in step.ops[before.stop :]:
        if op.phase is not Phase.FORWARD:
            break
        made.difference_update(op.written)
    return frozenset(made)


def passed_on(
    compiled: RegionProgram, outputs: frozenset[int], kept: frozenset[int]
) -> frozenset[int]:
    """What a region that keeps ``kept`` can make again of ``outputs``: all of them or nothing."""
    can = all(
        s not in kept and compiled.program.can_remake(s, kept) for s in compiled.local(outputs)
    )
    return outputs if can else frozenset()


def rerun_of(chains: Sequence[Chain]) -> Recomputation:
    """What neighbours run again, one after the other, when the last needs what it is given."""
    ops: list[int] = []
    copies: list[Copy] = []
    for chain, following in pairwise(chains):
        assert chain.rerun is not None
        start, stop = len(ops), len(ops) + len(chain.rerun.ops)
        needed = stop
        if following.rerun is not None and following is not chains[-1]:
            # The next one runs again from what this one makes.
            needed += len(following.rerun.ops)
        for copy in chain.rerun.copies:
            last, until = start + copy.last, 0
            if copy.storage in following.inputs:
                last = max(last, needed)
                until = following.given.get(copy.storage, 0)
            copies.append(replace(copy, first=start + copy.first, last=last, until=until))
        ops += chain.rerun.ops
    return Recomputation(chains[-1].given_at, tuple(ops), tuple(copies))


class _Finder:
    """Follows what passes from each region to the next."""

    def __init__(
        self, step: StepGraph, regions: Sequence[Region], options: Options, rng_state_bytes: int
    ) -> None:
        self._step = step
        self._regions = regions
        self._options = [list(own) for own in options]
        self._rng_state_bytes = rng_state_bytes
        self._programs = self._find_programs()
        self._passed = [frozenset[int](), *map(self._find_passed, range(1, len(regions)))]

    def find(self) -> tuple[Options, tuple[SegmentOption, ...]]:
        heads, inner = self._add_options()
        longest = math.ceil(math.sqrt(len(self._regions))) + 2
        segments = []
        for first, number in product(range(len(self._regions)), range(_KEPT_SETS)):
            if (head := heads[first].get(number)) is None:
                continue
            choices = [head]
            for r in range(first + 1, min(first + longest, len(self._regions))):
                # The regions of a segment keep the same.
                if number not in inner[r] or self._chain(r - 1, choices[-1]).rerun is None:
                    break
                choices.append(inner[r][number])
                if self._chain(r, choices[-1]).given_at >= 0:
                    segments.append(self._segment(first, tuple(choices)))
        return tuple(map(tuple, self._options)), tuple(segments)

    # -- what passes -----------------------------------------------------------------------------

    def _find_programs(self) -> list[RegionProgram | None]:
        programs = region_programs(self._step, self._regions)
        offered = (any(o.action == "selective" for o in own) for own in self._options)
        return [own if is_ else None for own, is_ in zip(programs, offered, strict=True)]

    def _find_passed(self, r: int) -> frozenset[int]:
        if self._programs[r - 1] is None or self._programs[r] is None:
            return frozenset()
        before = self._regions[r - 1]
        return passed(self._step, self._regions, range(before.start, before.stop), r)

    def _passed_on(self, r: int, kept: frozenset[int]) -> frozenset[int]:
        """What region ``r`` can make again for the next when it keeps ``kept``."""
        compiled = self._programs[r]
        outputs = self._passed[r + 1] if r + 1 < len(self._passed) else frozenset()
        assert compiled is not None
        return passed_on(compiled, outputs, kept)

    # -- options ---------------------------------------------------------------------------------

    def _add_options(self) -> tuple[list[dict[int, int]], list[dict[int, int]]]:
        """Adds the options that segments are made of; their indices by the number of the kept set:
        of those that begin a segment, and of those that are chained, which come last."""
        heads: list[dict[int, int]] = []
        inner: list[dict[int, int]] = []
        for r, own in enumerate(self._options):
            heads.append({})
            inner.append({})
            sets = self._kept_sets(r)
            for number, kept in enumerate(sets):
                if outputs := self._passed_on(r, kept):
                    heads[r][number] = len(own)
                    own.append(self._option(r, kept, Links(frozenset(), outputs)))
            for number, kept in enumerate(sets if self._passed[r] else ()):
                inner[r][number] = len(own)
                links = Links(self._passed[r], self._passed_on(r, kept))
                own.append(self._option(r, kept, links))
        return heads, inner

    def _kept_sets(self, r: int) -> list[frozenset[int]]:
        """Of the selective options, what those keep that store least."""
        compiled, region = self._programs[r], self._regions[r]
        if compiled is None:
            return []
        numbers = {name: s for s, name in compiled.program.names.items()}
        options = [o for o in self._options[r] if o.action == "selective" and not o.lead]

        def stored(option: RegionOption) -> int:
            held = (s for s, until in option.holds.items() if until > region.stop)
            return sum(self._step.storages[s].size_bytes for s in held)

        return [
            frozenset(numbers[name] for name in option.keep)
            for option in sorted(options, key=stored)[:_KEPT_SETS]
        ]

    def _option(self, r: int, kept: frozenset[int], links: Links) -> RegionOption:
        compiled, region = self._programs[r], self._regions[r]
        assert compiled is not None
        effect = selective(self._step, region, compiled, kept, self._rng_state_bytes, links)
        dropped = frozenset(compiled.program.droppable) - kept
        return RegionOption(
            "selective",
            effect,
            effect.seconds(self._step),
            compiled.names(kept),
            compiled.names(dropped),
            recompute_input=self._names(r - 1, links.inputs),
        )

    def _names(self, r: int, storages: frozenset[int]) -> tuple[str, ...]:
        compiled = self._programs[r]
        return () if compiled is None else compiled.output_names(storages)

    # -- segments --------------------------------------------------------------------------------

    def _chain(self, r: int, choice: int) -> Chain:
        chain = self._options[r][choice].effect.chain
        assert chain is not None
        return chain

    def _segment(self, first: int, choices: tuple[int, ...]) -> SegmentOption:
        chains = [self._chain(r, o) for r, o in enumerate(choices, first)]
        seconds = (
            sum(self._step.ops[i].seconds for i in chain.rerun.ops) if chain.rerun else 0.0
            for chain in chains[:-1]
        )
        return SegmentOption(first, choices, rerun_of(chains), (*seconds, 0.0))
