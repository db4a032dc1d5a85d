"""What FSDP2 lays over a step: shards of the parameters, and whole ones while they are needed.

Every process keeps a shard of each parameter. Around the forward and the backward of a group (a
module that ``fully_shard`` was called on, less the groups within it) the whole parameters are
gathered, in the backward the next group's ahead of time; then its gradients are reduced to shards
(torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). These are no ops of the model, so that
they are inserted into the captured step, with what they allocate. Depends on the step's records.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType

from torch import nn

from memfit.planner.step_graph import Kind, Op, Phase, Saved, StepGraph, Storage


def with_fsdp2(
    step: StepGraph,
    model: nn.Module,
    layers: Sequence[str],
    world_size: int,
    *,
    reshard_after_forward: bool | None,
    keep_gradients: bool,
    stages: bool,
) -> StepGraph:
    """The step of one of ``world_size`` processes, whose groups are ``layers`` and the rest.

    ``reshard_after_forward`` is what ``fully_shard`` is told. ``keep_gradients``: the shards of
    gradients are there from earlier steps. ``stages``: collectives have buffers of their own, as
    those of gloo have.
    """
    groups = find_groups(model, layers, world_size)
    layout = _Layout(step, groups, world_size, reshard_after_forward, keep_gradients, stages)
    return layout.result()


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are gathered together."""

    module: str
    """FQN; empty for the model, which holds what no other group does."""
    sizes_bytes: Mapping[str, int] = field(hash=False)
    """Of each parameter by FQN, padded so that it can be cut into shards of one size."""
    trainable_bytes: int
    """Padded, of those that get a gradient."""

    @property
    def all_bytes(self) -> int:
        """Of all its parameters, padded."""
        return sum(self.sizes_bytes.values())


def find_groups(model: nn.Module, layers: Sequence[str], world_size: int) -> tuple[Group, ...]:
    """The model's own group and those of its layers."""
    owned: dict[str, dict[str, nn.Parameter]] = {name: {} for name in ("", *layers)}
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
        owned[owner][name] = parameter
    return tuple(_group(name, own, world_size) for name, own in owned.items() if own)


def _group(module: str, parameters: Mapping[str, nn.Parameter], world_size: int) -> Group:
    padded = {name: _padded_bytes(p, world_size) for name, p in parameters.items()}
    trainable = sum(size for name, size in padded.items() if parameters[name].requires_grad)
    return Group(module, MappingProxyType(padded), trainable)


def _padded_bytes(parameter: nn.Parameter, world_size: int) -> int:
    rows = -(-parameter.shape[0] // world_size) * world_size
    return rows * parameter[0].numel() * parameter.element_size()


@dataclass(frozen=True, slots=True)
class _Span:
    """A call of a group's module. Clocks of the first op and after the last."""

    group: Group
    start: int
    stop: int
    backward_start: int
    backward_stop: int
    call: int
    again: bool
    """Whether it is gathered again for the backward, or stays whole until then."""


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
        reshards: bool | None,
        keeps_gradients: bool,
        stages: bool,
    ) -> None:
        self._step = step
        self._groups = groups
        self._world_size = world_size
        self._reshards = reshards
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
        by_name = {group.module: group for group in self._groups}
        called = ((i, c.module) for i, c in enumerate(self._step.calls) if c.module in by_name)
        found = [self._span(by_name[module], index) for index, module in called]
        return sorted(found, key=lambda span: (span.start, -span.stop))

    def _span(self, group: Group, index: int) -> _Span:
        """The model's own group is whole until the backward ends, unless told otherwise."""
        end = self._backward_end
        if not group.module:
            again = self._reshards is True
            stop = self._forward_end if again else end
            return _Span(group, 0, stop, self._forward_end, end, index, again)
        call = self._step.calls[index]
        used = [s for i in call.saved if (s := self._step.saved[i]).unpacked is not None]
        start = min((s.unpacked for s in used if s.unpacked is not None), default=end)
        last = max((s.released for s in used), default=end)
        again = self._reshards is not False
        return _Span(group, call.start, call.stop if again else last, start, last, index, again)

    def _run(
        self, name: str, clock: int, phase: Phase, span: _Span, own_bytes: int = 0
    ) -> _Collective:
        self._collectives.append(_Collective(f"fsdp.{name}", clock, phase, span.call, own_bytes))
        return self._collectives[-1]

    def _gather(self, span: _Span, clock: int, phase: Phase) -> _Held:
        """Gathers the shards of a group into one buffer, from which they are copied out."""
        size = span.group.all_bytes
        gather = self._run("all_gather", clock, phase, span, size if self._stages else 0)
        return _Held(f"{span.group.module}.all_gather", size, gather)

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
            copied = self._copy_out(span, span.start, span.stop, Phase.FORWARD)
            if before is not None:
                self._lay(before, Kind.COLLECTIVE, copied)
            before = gathered
        if before is not None:
            self._lay(before, Kind.COLLECTIVE, self._forward_end)

    def _lay_backward(self, spans: Sequence[_Span]) -> None:
        """The next group is gathered ahead, once a group has been copied out."""
        run = [s for s in spans if s.backward_start < self._backward_end]
        run.sort(key=lambda span: span.backward_start)
        gathers = [span for span in run if span.again]
        following = dict(pairwise((*gathers, None)))
        ahead = self._gather(gathers[0], self._forward_end, Phase.BACKWARD) if gathers else None
        reduced: _Held | None = None
        for span in run:
            if ahead and span.again:
                start, gathered = span.backward_start, ahead
                self._copy_out(span, start, span.backward_stop, Phase.BACKWARD)
                if after := following[span]:
                    ahead = self._gather(after, start, Phase.BACKWARD)
                self._lay(gathered, Kind.COLLECTIVE, ahead.by if after else start)
            if span.group.module:
                reduced = self._reduce(span, reduced)
        for span in run:
            if not span.group.module:
                reduced = self._reduce(span, reduced)
        if reduced is not None:
            self._lay(reduced, Kind.COLLECTIVE, None)

    def _reduce(self, span: _Span, before: _Held | None) -> _Held | None:
        """Reduces the gradients of a group from a buffer, held until the next group's is there."""
        size, end = span.group.trainable_bytes, span.backward_stop
        if not size:
            return before
        copied = self._run("copy_in", end, Phase.BACKWARD, span)
        if before is not None:
            self._lay(before, Kind.COLLECTIVE, copied)
        shards = size // self._world_size
        own = (size if self._stages else 0) + (shards if self._keeps_gradients else 0)
        scatter = self._run("reduce_scatter", end, Phase.BACKWARD, span, own)
        if not self._keeps_gradients:
            held = _Held(f"{span.group.module}.gradient shards", shards, scatter)
            self._lay(held, Kind.GRADIENT, len(self._step.ops))
        self._reductions.append((span, scatter))
        return _Held(f"{span.group.module}.reduce_scatter", size, copied)

    # -- storages --------------------------------------------------------------------------------

    def _own(self, old: Storage, new: Storage, moved: "_Moved") -> Storage:
        """Parameters give way to shards, and gradients are gone once they are reduced."""
        if old.kind is Kind.PARAMETER or (old.kind is Kind.GRADIENT and old.born < 0):
            return replace(new, size_bytes=0)
        if old.kind is not Kind.GRADIENT:
            return new
        spans = ((s, c) for s, c in self._reductions
                 if s.backward_start <= old.born < s.backward_stop)  # fmt: skip
        _, scatter = next(spans, self._reductions[-1])
        return replace(new, released=moved.place(scatter))

    def _residents(self, moved: "_Moved") -> Iterator[Storage]:
        """Shards of the parameters and, if they are kept, of their gradients."""
        end = moved.place(len(self._step.ops))
        for group in self._groups:
            for name, size in group.sizes_bytes.items():
                yield Storage(size // self._world_size, Kind.PARAMETER, -1, end, name=name)
            if self._keeps_gradients and group.trainable_bytes:
                size = group.trainable_bytes // self._world_size
                name = f"{group.module}.gradient shards"
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
