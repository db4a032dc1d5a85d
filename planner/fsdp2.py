"""What FSDP2 lays over a step: shards of the parameters, and whole ones while they are needed.

Every process keeps a shard of each parameter. Around the forward and the backward of a group (what
``fully_shard`` was called on, a module or several, less the groups within it) the whole parameters
are gathered, in the backward the next group's ahead of time; then its gradients are reduced to
shards (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). These are no ops of the model, so
that they are inserted into the captured step, with what they allocate. Depends on the step's
records.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import nn

from memfit.planner.mixed_precision import Precision
from memfit.planner.step_graph import Kind, Op, Phase, Saved, StepGraph, Storage


@dataclass(frozen=True, slots=True)
class Unit:
    """What ``fully_shard`` is called on once."""

    modules: tuple[str, ...]
    """FQNs: one, or those of a list; an empty one is the model itself."""
    reshards: bool
    """Whether its parameters are gathered again for the backward, or stay whole until then."""


def with_fsdp2(
    step: StepGraph,
    model: nn.Module,
    units: Sequence[Unit],
    world_size: int,
    precision: Precision,
    *,
    keep_gradients: bool,
    stages: bool,
) -> StepGraph:
    """The step of one of ``world_size`` processes.

    ``precision`` is what ``step`` was captured with. ``keep_gradients``: the shards of gradients
    are there from earlier steps. ``stages``: collectives have buffers of their own, as those of
    gloo have.
    """
    groups = find_groups(model, units, world_size, precision)
    return _Layout(step, groups, world_size, keep_gradients, stages).result()


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are gathered together: those of a unit that no inner one holds."""

    unit: Unit
    sizes_bytes: Mapping[str, int] = field(hash=False)
    """Of each gathered parameter by FQN, padded so that it is as long as all its shards."""
    shards_bytes: Mapping[str, int] = field(hash=False)
    """Of the shards that one process holds."""
    cast_bytes: int
    """Of those of its shards that are cast before they are gathered, in their new dtype."""
    reduced_bytes: int
    """Of all gradients, padded, as they are reduced."""
    gradient_shards_bytes: int
    """Of the shards of gradients that one process holds."""

    @property
    def name(self) -> str:
        """Of its modules."""
        return ", ".join(self.unit.modules)

    @property
    def all_bytes(self) -> int:
        """Of all its parameters, padded."""
        return sum(self.sizes_bytes.values())


def find_groups(
    model: nn.Module, units: Sequence[Unit], world_size: int, precision: Precision
) -> tuple[Group, ...]:
    """Of the units that hold parameters of their own, in the order of the model's modules."""
    by_module = {module: unit for unit in units for module in unit.modules}
    owned: dict[Unit, dict[str, nn.Parameter]] = {
        by_module[name]: {} for name, _ in model.named_modules() if name in by_module
    }
    for name, parameter in model.named_parameters():
        owner = name
        while owner not in by_module:
            owner = owner.rpartition(".")[0]
        owned[by_module[owner]][name] = parameter
    return tuple(_group(unit, own, world_size, precision) for unit, own in owned.items() if own)


def _group(
    unit: Unit, named: Mapping[str, nn.Parameter], world_size: int, precision: Precision
) -> Group:
    def bytes_of(parameter: nn.Parameter, dtype: torch.dtype) -> int:
        rows = -(-parameter.shape[0] // world_size)
        return rows * parameter[0].numel() * dtype.itemsize

    gathered = {n: bytes_of(p, precision.gathered(p.dtype)) for n, p in named.items()}
    shards = {n: bytes_of(p, p.dtype) for n, p in named.items()}
    trained = [p for p in named.values() if p.requires_grad]
    return Group(
        unit,
        MappingProxyType({n: size * world_size for n, size in gathered.items()}),
        MappingProxyType(shards),
        sum(gathered[n] for n, p in named.items() if precision.gathered(p.dtype) != p.dtype),
        sum(bytes_of(p, precision.reduced(p.dtype)) for p in trained) * world_size,
        sum(bytes_of(p, p.dtype) for p in trained),
    )


@dataclass(frozen=True, slots=True)
class _Span:
    """Calls of all modules of a group. Clocks of the first op and after the last."""

    group: Group
    start: int
    stop: int
    backward_start: int
    backward_stop: int
    call: int


@dataclass(frozen=True, slots=True)
class _Collective:
    """An op of FSDP2's own, which runs at a clock of the step."""

    name: str
    clock: int
    phase: Phase
    call: int
    workspace_bytes: int = 0

    def as_op(self) -> Op:
        """It has none of the model's storages, and its seconds are not counted."""
        return Op(
            name=self.name,
            phase=self.phase,
            call=self.call,
            signature=self.name,
            inputs=(),
            outputs=(),
            written=(),
            random=False,
            dtype="",
            flops=0,
            moved_bytes=0,
            workspace_bytes=self.workspace_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """An allocation of FSDP2's, and what makes it."""

    name: str
    size_bytes: int
    by: _Collective


class _Layout:
    """Lays what FSDP2 does over the step of one process alone."""

    def __init__(
        self,
        step: StepGraph,
        groups: Sequence[Group],
        world_size: int,
        keeps_gradients: bool,
        stages: bool,
    ) -> None:
        self._step = step
        self._groups = groups
        self._world_size = world_size
        self._keeps_gradients = keeps_gradients
        self._stages = stages
        phases = [op.phase for op in step.ops]
        self._forward_end = phases.index(Phase.BACKWARD)
        self._backward_end = len(phases) - phases[::-1].index(Phase.BACKWARD)
        self._collectives: list[_Collective] = []
        self._laid: list[tuple[_Held, Kind, _Collective | int | None]] = []
        """And what frees it before it begins, a clock, before all that begins there, or the end of
        the backward, after all of it."""
        self._reductions: list[tuple[_Span, _Collective]] = []

    def result(self) -> StepGraph:
        """The step with shards for parameters, and whole ones while they are gathered."""
        spans = self._spans()
        self._lay_forward(spans)
        self._lay_backward(spans)
        moved = _Moved(self._step, sorted(self._collectives, key=lambda c: c.clock))
        own = [self._own(old, new, moved) for old, new in zip(
            self._step.storages, moved.storages(), strict=True)]  # fmt: skip
        laid = [
            Storage(
                held.size_bytes,
                kind,
                moved.place(held.by),
                moved.op(self._backward_end) if until is None else moved.place(until),
                name=held.name,
            )
            for held, kind, until in self._laid
        ]
        return replace(moved.step(), storages=(*own, *self._residents(moved), *laid))

    # -- when groups are whole -------------------------------------------------------------------

    def _spans(self) -> list[_Span]:
        """In forward order, the model's own group first."""
        spans = []
        for group in self._groups:
            modules = group.unit.modules
            calls = [i for i, c in enumerate(self._step.calls) if c.module in modules]
            spans += [
                self._span(group, calls[i : i + len(modules)])
                for i in range(0, len(calls), len(modules))
            ]
        return sorted(spans, key=lambda span: (span.start, -span.stop))

    def _span(self, group: Group, indices: Sequence[int]) -> _Span:
        """What is given no gradient to pass on, as the model itself, is done with at the end."""
        end = self._backward_end
        calls = [self._step.calls[index] for index in indices]
        if not calls[0].module:
            return _Span(group, 0, self._forward_end, self._forward_end, end, indices[0])
        saved = (self._step.saved[i] for call in calls for i in call.saved)
        used = [s for s in saved if s.unpacked is not None]
        start = min((s.unpacked for s in used if s.unpacked is not None), default=end)
        last = max((s.released for s in used), default=end)
        inputs = (self._step.storages[i].dtype for i in calls[0].inputs)
        if all(dtype.startswith(("int", "uint", "bool")) for dtype in inputs):
            last = end
        return _Span(group, calls[0].start, calls[-1].stop, start, last, indices[0])

    def _run(
        self, name: str, clock: int, phase: Phase, span: _Span, own_bytes: int = 0
    ) -> _Collective:
        self._collectives.append(_Collective(f"fsdp.{name}", clock, phase, span.call, own_bytes))
        return self._collectives[-1]

    def _gather(self, span: _Span, clock: int, phase: Phase) -> _Held:
        """Gathers the shards of a group into one buffer, from which they are copied out."""
        size = span.group.all_bytes
        own = span.group.cast_bytes + (size if self._stages else 0)
        gather = self._run("all_gather", clock, phase, span, own)
        return _Held(f"{span.group.name}.all_gather", size, gather)

    def _copy_out(self, span: _Span, clock: int, until: int, phase: Phase) -> _Collective:
        copied = self._run("copy_out", clock, phase, span)
        for name, size in span.group.sizes_bytes.items():
            self._lay(_Held(name, size, copied), Kind.WHOLE_PARAMETER, until)
        return copied

    def _lay(self, held: _Held, kind: Kind, until: _Collective | int | None) -> None:
        self._laid.append((held, kind, until))

    def _lay_forward(self, spans: Sequence[_Span]) -> None:
        """What a group is gathered into is freed when the next one has been gathered."""
        before: _Held | None = None
        for span in spans:
            gathered = self._gather(span, span.start, Phase.FORWARD)
            until = span.stop if span.group.unit.reshards else span.backward_stop
            copied = self._copy_out(span, span.start, until, Phase.FORWARD)
            if before is not None:
                self._lay(before, Kind.COLLECTIVE, copied)
            before = gathered
        if before is not None:
            self._lay(before, Kind.COLLECTIVE, self._forward_end)

    def _lay_backward(self, spans: Sequence[_Span]) -> None:
        """When a group has been copied out, the one called before it is gathered ahead."""
        ended = sorted(spans, key=lambda span: span.stop)
        before = dict(zip(ended[1:], ended, strict=False))
        run = [s for s in reversed(ended) if s.backward_start < self._backward_end]
        run.sort(key=lambda span: span.backward_start)
        ahead: dict[_Span, _Held] = {}
        for span in run:
            start = span.backward_start
            own = ahead.pop(span, None)
            if span.group.unit.reshards:
                own = own or self._gather(span, start, Phase.BACKWARD)
                self._copy_out(span, start, span.backward_stop, Phase.BACKWARD)
            following = before.get(span)
            if following and following.group.unit.reshards:
                ahead[following] = self._gather(following, start, Phase.BACKWARD)
            if own:
                after = ahead.get(following) if following else None
                self._lay(own, Kind.COLLECTIVE, after.by if after else start)
        for held in ahead.values():  # of what is not run backward after all
            self._lay(held, Kind.COLLECTIVE, None)
        self._lay_reductions(run)

    def _lay_reductions(self, run: Sequence[_Span]) -> None:
        reduced: _Held | None = None
        last = [span for span in run if span.backward_stop == self._backward_end]
        for span in (s for s in run if s not in last):
            reduced = self._reduce(span, reduced)
        for span in sorted(last, key=lambda span: self._groups.index(span.group)):
            reduced = self._reduce(span, reduced)
        if reduced is not None:
            self._lay(reduced, Kind.COLLECTIVE, None)

    def _reduce(self, span: _Span, before: _Held | None) -> _Held | None:
        """Reduces the gradients of a group from a buffer, held until the next group's is there."""
        size, end = span.group.reduced_bytes, span.backward_stop
        if not size:
            return before
        copied = self._run("copy_in", end, Phase.BACKWARD, span)
        if before is not None:
            self._lay(before, Kind.COLLECTIVE, copied)
        shards, reduced = span.group.gradient_shards_bytes, size // self._world_size
        staged = size if self._stages else 0
        if reduced == shards:
            own = staged + (shards if self._keeps_gradients else 0)
        else:  # and then cast to the dtype of the shards
            own = max(staged + reduced - (0 if self._keeps_gradients else shards), reduced)
        scatter = self._run("reduce_scatter", end, Phase.BACKWARD, span, own)
        if not self._keeps_gradients:
            held = _Held(f"{span.group.name}.gradient shards", shards, scatter)
            self._lay(held, Kind.GRADIENT, len(self._step.ops))
        self._reductions.append((span, scatter))
        return _Held(f"{span.group.name}.reduce_scatter", size, copied)

    # -- storages --------------------------------------------------------------------------------

    def _own(self, old: Storage, new: Storage, moved: "_Moved") -> Storage:
        """Parameters give way to shards, and gradients are gone once they are reduced."""
        if old.kind is Kind.PARAMETER or (old.kind is Kind.GRADIENT and old.born < 0):
            return replace(new, size_bytes=0)
        if old.kind is not Kind.GRADIENT:
            return new
        own = [
            (s, c) for s, c in self._reductions if s.backward_start <= old.born < s.backward_stop
        ]
        _, scatter = max(own, key=lambda r: r[0].backward_start, default=self._reductions[-1])
        return replace(new, released=moved.place(scatter))

    def _residents(self, moved: "_Moved") -> Iterator[Storage]:
        """Shards of the parameters and, if they are kept, of their gradients."""
        end = moved.place(len(self._step.ops))
        for group in self._groups:
            for name, size in group.shards_bytes.items():
                yield Storage(size, Kind.PARAMETER, -1, end, name=name)
            if self._keeps_gradients and (size := group.gradient_shards_bytes):
                name = f"{group.name}.gradient shards"
                yield Storage(size, Kind.KEPT_GRADIENT, -1, end, name=name)


class _Moved:
    """A step whose ops make room for collectives, which are given in the order of their clocks."""

    def __init__(self, step: StepGraph, collectives: Sequence[_Collective]) -> None:
        self._step = step
        self._collectives = collectives
        self._clocks = [c.clock for c in collectives]
        self._places = {id(c): c.clock + i for i, c in enumerate(collectives)}

    def place(self, what: _Collective | int) -> int:
        """The op that a collective is, or where a clock is now: before the collectives at it."""
        if isinstance(what, int):
            return what + bisect_left(self._clocks, what)
        return self._places[id(what)]

    def op(self, op: int) -> int:
        """Where an op is now: after the collectives at its clock."""
        return op + bisect_right(self._clocks, op) if op >= 0 else op

    def storages(self) -> Iterator[Storage]:
        for s in self._step.storages:
            yield replace(s, born=self.op(s.born), released=self.place(s.released))

    def step(self) -> StepGraph:
        """All of it, but for the storages."""
        step = self._step
        placed = {self.op(i): op for i, op in enumerate(step.ops)}
        placed |= {self.place(collective): collective.as_op() for collective in self._collectives}
        return replace(
            step,
            nodes={self.op(i): node for i, node in step.nodes.items()},
            ops=tuple(placed[i] for i in range(len(placed))),
            saved=tuple(map(self._saved, step.saved)),
            calls=tuple(
                replace(c, start=self.op(c.start), stop=self.place(c.stop)) for c in step.calls
            ),
        )

    def _saved(self, saved: Saved) -> Saved:
        unpacked = None if saved.unpacked is None else self.op(saved.unpacked)
        return replace(
            saved,
            packed=self.place(saved.packed),
            released=self.place(saved.released),
            unpacked=unpacked,
            used_until=self.place(saved.used_until),
        )
