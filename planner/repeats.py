"""Records a repeated layer once: its later calls are one op each, to be filled in afterwards.

A call is not run when an equal layer, of the same list of modules, was called before in an equal
way: one tensor that a gradient flows through goes in and one comes out, and all else that it is
given is the same. What cannot be told from outside is watched: attributes in which layers differ
(their index) must not be read. :mod:`expansion` fills the calls in, checks what only the whole step
shows, and refuses; the step is then recorded in full. Depends on the recorder.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, pairwise
from typing import Any

import torch
from torch import nn

from memfit.planner._compat import another_fake, collects_outputs
from memfit.planner.recorder import Instant, Recorder, Value, layout_of
from memfit.planner.shadows import tensors_in

_FEWEST = 3
_KNOWN_VALUES = 4096
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}


class NotRepeatable(RuntimeError):
    """A layer cannot stand for its kin; the step has to be recorded in full."""


@dataclass(slots=True)
class Layer:
    """A call of a repeated layer, filled in as the step is recorded."""

    module: str
    tensors: tuple[torch.Tensor, ...]
    """Its parameters, buffers and other tensors."""
    call: int
    begin: Instant
    kept_gradients: tuple[int, ...]
    """Storages of the gradients of earlier steps, of its tensors."""
    given: Value
    """The tensor that goes in, then the one that comes out, and the gradients of the two."""
    end: Instant | None = None
    made: Value | None = None
    incoming: Value | None = None
    returned: Value | None = None
    backward_begin: Instant | None = None
    backward_end: Instant | None = None
    residents: tuple[int, ...] = ()
    """Storages of the tensors that it uses."""
    gradients: tuple[Value | None, ...] = ()
    """Of the tensors."""


@dataclass(slots=True)
class _Pattern:
    """A layer that was recorded in full, and what it returned."""

    layer: Layer
    index_reads: int
    result: Callable[[torch.Tensor], Any] | None = None


class Repeats:
    """Makes the repeated layers of a model stand-ins once one of them is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self.pairs: list[tuple[Layer, Layer]] = []
        """The layer that was recorded, and one that is like it."""
        self.forward_end = -1
        """Clock at which the model's forward is over."""
        self._recorder = recorder
        self._patterns: dict[Hashable, _Pattern] = {}
        self._index_reads = 0
        self._called: set[int] = set()

    def watch(self, model: nn.Module) -> None:
        """Takes over the forward of every repeated layer."""
        found = list(_repeated_layers(model))
        own = {id(module): _own_tensors(module) for module in model.modules()}
        owners = Counter(id(t) for tensors in own.values() for t in tensors)
        for _, layers in found:
            _hide_indices(layers, self._note_index)
        for names, layers in found:
            for name, layer in zip(names, layers, strict=True):
                tensors = tuple(t for m in layer.modules() for t in own[id(m)])
                if all(owners[id(t)] == 1 for t in tensors):
                    key = self._structure(layer, own)
                    layer.forward = partial(self._forward, name, layer, tensors, key, layer.forward)

    def _note_index(self) -> None:
        self._index_reads += 1

    def _structure(self, layer: nn.Module, own: Mapping[int, list[torch.Tensor]]) -> Hashable:
        known = self._recorder.shadows.get
        return tuple(
            (
                name,
                type(module),
                _attributes(module),
                tuple(_tensor_key(t, known(t)) for t in own[id(module)]),
            )
            for name, module in layer.named_modules()
        )

    def forward_ends(self) -> None:
        """The model's forward is over."""
        self.forward_end = self._recorder.now().ops

    def finish(self) -> None:
        """At the end of the step: where the layers' tensors and their gradients are."""
        patterns = {id(pattern): pattern for pattern, _ in self.pairs}.values()
        for pattern, layer in (*((own, own) for own in patterns), *self.pairs):
            used = [hasattr(t, "_memfit_node") for t in pattern.tensors]
            grads = [t.grad for t in layer.tensors]
            layer.residents = tuple(map(self._recorder.storage_of, compress(layer.tensors, used)))
            layer.gradients = tuple(
                None if g is None or self._recorder.is_resident(g) else self._recorder.value(g)
                for g in grads
            )

    # -- calls -----------------------------------------------------------------------------------

    def _forward(
        self,
        name: str,
        module: nn.Module,
        tensors: tuple[torch.Tensor, ...],
        structure: Hashable,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = _Arguments(self._recorder)
        inputs = call.describe((args, kwargs))
        if not call.allows_repeats or id(module) in self._called or _has_hooks(module):
            return forward(*args, **kwargs)
        self._called.add(id(module))
        given = call.given[0]
        key = structure, inputs, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        recorder = self._recorder
        kept = tuple(recorder.storage_of(t.grad) for t in tensors if t.grad is not None)
        now, here = recorder.now(), recorder.current_call()
        layer = Layer(name, tensors, here, now, kept, recorder.value(given))
        pattern = self._patterns.get(key)
        if pattern is None:
            return self._record(key, layer, given, partial(forward, *args, **kwargs))
        if pattern.result is None:
            return forward(*args, **kwargs)
        self.pairs.append((pattern.layer, layer))
        made = _StandIn.apply(given, recorder, pattern.layer, layer)  # type: ignore[no-untyped-call]
        layer.end = recorder.now()
        return pattern.result(made)

    def _record(
        self, key: Hashable, layer: Layer, given: torch.Tensor, forward: Callable[[], Any]
    ) -> Any:
        """Runs the layer, as the pattern of those that follow where it can be one."""
        recorder = self._recorder
        pattern = self._patterns[key] = _Pattern(layer, self._index_reads)
        result = forward()
        layer.end = recorder.now()
        made = [t for t in tensors_in(result) if t.requires_grad]
        if self._index_reads > pattern.index_reads or len(made) != 1 or made[0].grad_fn is None:
            return result
        pattern.result = _result_of(result, made[0])
        if pattern.result is None or given.grad_fn is None or made[0] is given:
            pattern.result = None
            return result
        layer.made = recorder.value(made[0])
        position, back = made[0].output_nr, given.output_nr

        def begins(gradients: Sequence[torch.Tensor]) -> None:
            layer.backward_begin = recorder.now()
            layer.incoming = recorder.value(gradients[position])

        def ends(gradients: Sequence[torch.Tensor]) -> None:
            layer.backward_end = recorder.now()
            layer.returned = recorder.value(gradients[back])

        made[0].grad_fn.register_prehook(begins)
        given.grad_fn.register_prehook(ends)
        return result


class _StandIn(torch.autograd.Function):
    """A layer that is known from another one: one op forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, given: torch.Tensor, recorder: Recorder, pattern: Layer, layer: Layer
    ) -> torch.Tensor:
        assert pattern.made is not None
        shape, stride, _, dtype = pattern.made.layout
        (made,) = recorder.stand_in(
            lambda: [torch.empty_strided(shape, stride, dtype=dtype, device=given.device)]
        )
        layer.made = recorder.value(made)
        ctx.recorder, ctx.layer = recorder, layer
        ctx.given = given.shape, given.dtype
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        recorder, layer = ctx.recorder, ctx.layer
        shape, dtype = ctx.given
        layer.backward_begin = recorder.now()
        layer.incoming = recorder.value(gradient)
        trained = [t for t in layer.tensors if t.requires_grad]
        kept = [t.grad for t in trained if t.grad is not None]
        if not all(map(recorder.is_resident, kept)):
            raise NotRepeatable(f"{layer.module} is called twice")
        trained = [t for t in trained if t.grad is None]

        def make() -> list[torch.Tensor]:
            like = gradient if gradient.shape == shape else torch.empty(shape)
            # Residual connections pass gradients on as they are laid out.
            returned = torch.empty_like(like, dtype=dtype)
            return [returned, *map(another_fake, trained)]

        returned, *gradients = recorder.stand_in(make)
        for tensor, own in zip(trained, gradients, strict=True):
            tensor.grad = own
        layer.backward_end = recorder.now()
        layer.returned = recorder.value(returned)
        return returned, None, None, None


def _result_of(result: Any, made: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
    """What makes an equal result of another tensor; None where it holds more than that."""
    if result is made:
        return lambda tensor: tensor
    if type(result) not in (tuple, list):
        return None
    if any(item is not made and not isinstance(item, _PLAIN) for item in result):
        return None
    kind, places = type(result), [item is made for item in result]
    rest = [None if item is made else item for item in result]  # the tensor itself has to die
    return lambda tensor: kind(
        tensor if is_it else item for is_it, item in zip(places, rest, strict=True)
    )


@dataclass(slots=True)
class _Arguments:
    """What a call is given, and whether an equal one could stand for it."""

    recorder: Recorder
    given: list[torch.Tensor] = field(default_factory=list)
    strange: bool = False

    @property
    def allows_repeats(self) -> bool:
        return len(self.given) == 1 and not self.strange

    def describe(self, value: Any) -> Hashable:
        """Equal for equal arguments: a tensor without a gradient has to be the same one."""
        if isinstance(value, torch.Tensor):
            layout = layout_of(value)
            if not value.requires_grad:
                return "same", self.recorder.storage_of(value), layout
            if not any(value is t for t in self.given):
                self.given.append(value)
            return "given", layout
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self.describe(v) for v in value)
        if isinstance(value, dict):
            return dict, tuple((key, self.describe(v)) for key, v in value.items())
        self.strange = self.strange or not isinstance(value, _PLAIN)
        return type(value), value if isinstance(value, _PLAIN) else id(value)


# -- structure -----------------------------------------------------------------------------------


def _repeated_layers(model: nn.Module) -> Iterator[tuple[list[str], list[nn.Module]]]:
    """The outermost lists of modules in which one type comes often enough."""
    covered: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(c) for c in covered):
            continue
        kinds: dict[tuple[Any, ...], list[tuple[str, nn.Module]]] = {}
        for position, layer in module.named_children():
            shapes = tuple((n, tuple(p.shape)) for n, p in layer.named_parameters())
            path = f"{name}.{position}" if name else position
            kinds.setdefault((type(layer), shapes), []).append((path, layer))
        for (_, shapes), layers in kinds.items():
            if len(layers) >= _FEWEST and shapes:
                covered += [f"{path}." for path, _ in layers]
                yield [path for path, _ in layers], [layer for _, layer in layers]


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and plain attributes of one module."""
    return list({id(t): t for t in tensors_in(dict(vars(module)))}.values())


def _tensor_key(tensor: torch.Tensor, known: torch.Tensor | None) -> tuple[Hashable, ...]:
    value = None
    if known is not None and known.numel() <= _KNOWN_VALUES:
        value = known.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, value


def _attributes(module: nn.Module) -> Hashable:
    return tuple(
        (name, _attribute(value))
        for name, value in vars(module).items()
        if name not in _MODULE_STATE and not isinstance(value, torch.Tensor)
    )


def _attribute(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _Index):
        return _Index
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_attribute(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, partial):
        return partial, _attribute(value.func), _attribute(value.args), _attribute(value.keywords)
    if isinstance(value, dict):
        return dict, tuple((key, _attribute(v)) for key, v in value.items())
    return id(value)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether anybody but the capture, which has one of each on each module, looks inside."""
    return collects_outputs() or any(
        len(m._forward_pre_hooks) > 1
        or len([h for h in m._forward_hooks.values() if not _only_collects(h)]) > 1
        or m._backward_hooks
        or m._backward_pre_hooks
        for m in layer.modules()
    )


def _only_collects(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class _Index:
    """Stands for a layer's own number and tells when it is read."""

    def __init__(self, value: int, read: Callable[[], None]) -> None:
        self._value = value
        self._read = read

    def _get(self) -> int:
        self._read()
        return self._value


def _reading(name: str) -> Callable[..., Any]:
    def method(self: _Index, *others: Any) -> Any:
        values = [o._get() if isinstance(o, _Index) else o for o in others]
        return getattr(self._get(), name)(*values)

    return method


_READS = (
    "index int float bool hash str repr format eq ne lt le gt ge add radd sub rsub mul rmul "
    "floordiv rfloordiv truediv rtruediv mod rmod pow rpow neg and rand or ror"
)
for _name in _READS.split():
    setattr(_Index, f"__{_name}__", _reading(f"__{_name}__"))


def _hide_indices(layers: Sequence[nn.Module], read: Callable[[], None]) -> None:
    """Puts an :class:`_Index` where whole numbers count the layers."""
    members = [dict(layer.named_modules()) for layer in layers]
    for path, first in members[0].items():
        modules = [m[path] for m in members if path in m]
        if len(modules) != len(layers):
            continue
        for name in list(vars(first)):
            values = [vars(m).get(name) for m in modules]
            if _INDEX_NAME.search(name) and all(type(v) is int for v in values) and _counts(values):
                for module, value in zip(modules, values, strict=True):
                    vars(module)[name] = _Index(value, read)


_INDEX_NAME = re.compile(r"idx|index|(layer|block|_)(id|num|number|no)$")


def _counts(values: Sequence[Any]) -> bool:
    steps = [b - a for a, b in pairwise(values)]
    return bool(steps) and all(s > 0 for s in steps)
