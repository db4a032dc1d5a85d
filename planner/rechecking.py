"""Says whether a plan still holds: replays it in the step of the model as it is now.

Another version of a model, of transformers or of torch may run other ops; the plan's choice stays
what it was, and its peak is simulated anew. Nothing is solved, and no seconds are compared. Depends
on the rest of the planner but for ``planning``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from memfit.planner.batches import remake_batch
from memfit.planner.document import Plan, RegionPlan
from memfit.planner.errors import PlanError
from memfit.planner.fingerprint import differences, fingerprint
from memfit.planner.leads import leads_to
from memfit.planner.options import RegionOption
from memfit.planner.peak import describe_peak
from memfit.planner.preparing import Prepared, Progress, prepare
from memfit.planner.recompute import Effect, checkpoint, keep
from memfit.planner.regions import Region
from memfit.planner.segments import passed, passed_on, rerun_of
from memfit.planner.selective import Links, RegionProgram, region_programs, selective
from memfit.planner.simulate import simulate
from memfit.planner.solving import Task

_NOTHING = frozenset[int]()
_AGAIN = "make the plan again"


@dataclass(frozen=True, slots=True)
class Recheck:
    """What a plan's choice needs now, beside what the plan says."""

    peak_bytes: int
    peak_at: str
    planned_peak_bytes: int
    budget_bytes: int
    """The plan's own."""
    margin_bytes: int
    """What a plan for the step leaves free of its budget."""
    notes: tuple[str, ...] = ()
    """Assumptions, for people."""

    @property
    def keeps_budget(self) -> bool:
        """Whether ``plan()`` would still return such a plan."""
        return self.peak_bytes + self.margin_bytes <= self.budget_bytes


def prepare_again(plan: Plan, model: nn.Module, progress: Progress | None = None) -> Prepared:
    """The step that ``plan`` was made for, captured anew with ``model`` as it is now.

    The batch has the shapes and dtypes of the plan's. A plan has no values: those that decide what
    a model runs are made from the config, as for a batch that is only described, where they can be.
    Raises :class:`PlanError` for another model than the plan's, and what ``plan()`` raises.
    """
    _refuse_other_models(plan, fingerprint(model))
    workload = plan.workload
    batch, note = remake_batch(model, workload.batch)
    prepared = prepare(
        model,
        batch,
        optimizer=workload.optimizer,
        device=workload.device,
        costs="roofline",
        keep_outputs=workload.keep_outputs,
        keep_gradients=workload.keep_gradients,
        max_grad_norm=workload.max_grad_norm,
        autocast=workload.autocast,
        sharding=workload.sharding,
        world_size=workload.world_size,
        wrap=workload.wrap or None,
        reshard_after_forward=workload.reshard_after_forward,
        param_dtype=workload.param_dtype,
        reduce_dtype=workload.reduce_dtype,
        selective=False,  # the options are the plan's
        progress=progress,
    )
    notes = tuple(filter(None, (note, *prepared.workload.notes)))
    return replace(prepared, workload=replace(prepared.workload, notes=notes))


def recheck(plan: Plan, prepared: Prepared) -> Recheck:
    """Simulates the choice of ``plan`` in a step that :func:`prepare_again` made.

    Raises :class:`PlanError` that names the region or the tensor for which the step has no place.
    """
    _refuse_other_models(plan, prepared.model.fingerprint)
    task = prepared.task
    effects = _Replay(plan, task).effects()
    timeline = simulate(task.step, task.regions, effects, task.target.device.allocation_bytes)
    return Recheck(
        peak_bytes=timeline.peak_bytes,
        peak_at=describe_peak(task.step, task.regions, timeline).where,
        planned_peak_bytes=plan.predicted.peak_bytes,
        budget_bytes=plan.budget_bytes,
        margin_bytes=task.margin_bytes,
        notes=prepared.workload.notes,
    )


def _refuse_other_models(plan: Plan, found: str) -> None:
    if differing := differences(plan.model.fingerprint, found):
        raise PlanError(
            f"the plan was made for a {plan.model.class_} of {plan.model.dtype or 'some dtype'} "
            f"with {plan.model.parameters} parameters; this model has {', '.join(differing)}. "
            "Build the model of the plan, or make a plan for this one"
        )


@dataclass(frozen=True, slots=True)
class _Own:
    """What the plan says of a region, and which module beside the regions leads to it."""

    plan: RegionPlan
    lead: str = ""

    @property
    def is_chained(self) -> bool:
        """Whether the region before makes its input again."""
        return bool(self.plan.recompute_input) and not self.lead


class _Replay:
    """Finds what each region of a plan does in a step."""

    def __init__(self, plan: Plan, task: Task) -> None:
        self._step, self._regions = task.step, task.regions
        self._rng_state_bytes = task.target.rng_state_bytes
        self._programs = region_programs(task.step, task.regions)
        self._own = _matched(plan.regions, task.regions)

    def effects(self) -> list[Effect]:
        """An effect for each region, what segments run again among them."""
        effects = [self._effect(r) for r in range(len(self._own))]
        first = 0
        for r in range(1, len(effects) + 1):
            if r < len(effects) and self._own[r].is_chained:
                continue
            if r - first > 1:
                effects[r - 1] = self._with_rerun(effects[first:r])
            first = r
        return effects

    def _with_rerun(self, effects: Sequence[Effect]) -> Effect:
        """Of a segment's last region, before which the others run again."""
        chains = [effect.chain for effect in effects if effect.chain is not None]
        again = (rerun_of(chains), *effects[-1].recomputations)
        return replace(effects[-1], recomputations=again)

    def _effect(self, r: int) -> Effect:
        step, region, own = self._step, self._regions[r], self._own[r]
        if own.plan.action == "keep":
            return keep(step, region)
        if region.kept_because:
            raise _gone(region.name, f"can only be kept now ({region.kept_because})")
        if own.plan.action == "checkpoint":
            return checkpoint(step, region, self._rng_state_bytes)
        compiled = self._program(r)
        kept = _kept(compiled, own.plan)
        if own.lead:
            return self._led(r, compiled, kept)
        links = self._links(r, compiled, kept)
        return selective(step, region, compiled, kept, self._rng_state_bytes, links)

    def _program(self, r: int) -> RegionProgram:
        compiled = self._programs[r]
        if compiled is None:
            raise _gone(self._regions[r].name, "cannot be recomputed op by op now")
        return compiled

    def _led(self, r: int, compiled: RegionProgram, kept: frozenset[int]) -> Effect:
        """Without its input, which a module before it makes again."""
        step, region, own = self._step, self._regions[r], self._own[r]
        lead = leads_to(step, self._regions, r)
        if lead is None or (lead.name, lead.names) != (own.lead, own.plan.recompute_input):
            raise _gone(region.name, f"is not given its input by {own.lead} again")
        effect = selective(step, region, compiled, kept, self._rng_state_bytes, lead.links)
        option = lead.option(step, RegionOption("selective", effect, 0.0), effect)
        if option is None:
            raise _gone(region.name, "never needs its input in the backward now")
        return option.effect

    def _links(self, r: int, compiled: RegionProgram, kept: frozenset[int]) -> Links | None:
        """What passes to the region and on from it, as the options of segments have it."""
        own = self._own[r]
        is_followed = r + 1 < len(self._own) and self._own[r + 1].is_chained
        if not own.is_chained and not is_followed:
            return None
        inputs = self._inputs(r) if own.is_chained else _NOTHING
        outputs = passed_on(compiled, self._passed(r + 1), kept)
        if is_followed and not outputs:
            raise _gone(self._regions[r].name, "cannot make the input of the region after it again")
        return Links(inputs, outputs)

    def _inputs(self, r: int) -> frozenset[int]:
        inputs = self._passed(r)
        if self._program(r - 1).output_names(inputs) != self._own[r].plan.recompute_input:
            before = self._regions[r - 1].name
            raise _gone(self._regions[r].name, f"is given other inputs by {before} now")
        return inputs

    def _passed(self, r: int) -> frozenset[int]:
        if r >= len(self._regions) or None in (self._programs[r - 1], self._programs[r]):
            return _NOTHING
        before = self._regions[r - 1]
        return passed(self._step, self._regions, range(before.start, before.stop), r)


def _matched(planned: Sequence[RegionPlan], regions: Sequence[Region]) -> list[_Own]:
    """What the plan says of each region; a lead stands before the one that it leads to."""
    own: list[_Own] = []
    lead = ""
    for number, entry in enumerate(planned):
        follows = planned[number + 1 : number + 2]
        if len(own) < len(regions) and entry.name == regions[len(own)].name:
            own.append(_Own(entry, lead))
            lead = ""
        elif follows and follows[0].recompute_input and not entry.stored_bytes and not lead:
            lead = entry.name
        else:
            raise _gone(entry.name, "is no region of the step now")
    if len(own) < len(regions):
        raise PlanError(f"the plan says nothing of the region {regions[len(own)].name}; {_AGAIN}")
    return own


def _kept(compiled: RegionProgram, entry: RegionPlan) -> frozenset[int]:
    """Storages of the program that the plan keeps."""
    numbers = {compiled.program.names[s]: s for s in compiled.program.droppable}
    for name in (*entry.keep, *entry.recompute):
        if name not in numbers:
            raise _gone(entry.name, f"does not save {name} now")
    return frozenset(numbers[name] for name in entry.keep)


def _gone(region: str, what: str) -> PlanError:
    return PlanError(f"the plan does not fit the step: {region} {what}; {_AGAIN}")
