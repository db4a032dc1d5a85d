"""Captures a training step: one eager forward and backward (and optimizer step) on fake tensors.

The model is copied with every parameter and buffer replaced by a fake twin, so nothing is allocated
and the model passed in is not touched. Running the step eagerly is what reports the tensors that
eager autograd saves; tracers and joint graphs report others. Depends on the recorder.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import nn

from memfit.planner._compat import (
    CacheTooSmall,
    FakeOps,
    FakeTensor,
    FakeTensorMode,
    autocast_off,
    fake_tensors_look_real,
    forward_autocast,
    function_caches_apart,
    make_parameter,
    modules_stay_where_they_are,
    new_fake,
    without_compiler,
)
from memfit.planner.caching import caching_modules, without_cache
from memfit.planner.checkpointing import SWITCH_OFF, checkpointed_module, is_planned
from memfit.planner.errors import CaptureError, first_line
from memfit.planner.expansion import expand
from memfit.planner.losses import loss_of
from memfit.planner.mixed_precision import Casts
from memfit.planner.optimizers import OptimizerFactory
from memfit.planner.recorder import Recorder
from memfit.planner.repeats import NotRepeatable, Repeats
from memfit.planner.shadows import ReadsOfValues, UnknownValue, tensors_in
from memfit.planner.step_graph import Kind, Phase, StepGraph

# A step that was captured on assumptions is another one in reality: tokens flock to some experts.
ASSUMED_MARGIN = 0.03

BatchArguments = Mapping[str, Any] | Sequence[Any]


def capture(
    model: nn.Module,
    batch: BatchArguments,
    *,
    optimizer: OptimizerFactory | None = None,
    keep_outputs: bool = False,
    keep_gradients: bool = False,
    autocast: torch.dtype | None = None,
    modes: Callable[[], Sequence[Any]] = tuple,
    shards: int = 1,
    casts: Casts | None = None,
    repeats: bool = True,
) -> StepGraph:
    """Records one training step of ``model`` on ``batch`` (a dict or a tuple of arguments).

    ``optimizer`` makes the optimizer of the fake parameters; ``keep_outputs`` holds the model's
    outputs until the end of the step as a caller who keeps them in a variable does; with
    ``keep_gradients`` those of earlier steps are there and are added to; the forward runs under
    ``torch.autocast`` with the dtype ``autocast``; ``modes`` makes contexts to enter around the
    step (kernels of another device): of what dispatch modes do, the result is recorded; ``shards``
    is how many processes share the parameters, of which the optimizer updates one; ``casts`` are
    those of FSDP2's mixed precision; ``repeats`` records layers that are alike once, which gives
    the same graph sooner.

    Raises :class:`CaptureError` when the model refuses the batch or reads values that a run on fake
    tensors cannot know.
    """
    _refuse_checkpointing(model)
    step = partial(
        _Step, model, batch, optimizer, keep_outputs, keep_gradients, autocast, modes, shards, casts
    )
    if repeats:
        with suppress(NotRepeatable):
            return step(repeats=True).record()
    return step(repeats=False).record()


@dataclass(frozen=True, slots=True)
class _Step:
    """What is captured, and how."""

    model: nn.Module
    batch: BatchArguments
    optimizer: OptimizerFactory | None
    keep_outputs: bool
    keep_gradients: bool
    autocast: torch.dtype | None
    modes: Callable[[], Sequence[Any]]
    shards: int
    casts: Casts | None
    repeats: bool
    small_caches: set[Callable[..., Any]] = field(default_factory=set)
    """Functions whose caches hold less than a step asks for, as far as is known."""

    def record(self) -> StepGraph:
        model = self.model
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        recorder = Recorder(mode)
        generators = random.getstate(), numpy.random.get_state()
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.inference_mode(False),
                torch.enable_grad(),
                autocast_off(),
                fake_tensors_look_real(),
                modules_stay_where_they_are(),
                without_compiler(),
                function_caches_apart(model, recorder.shadows.adopt, self.small_caches),
            ):
                twin = _fake_twin(model, mode, recorder, self.casts)
                arguments = _fake_batch(self.batch, mode, recorder)
                _follow_calls(twin, recorder)
                repeats = Repeats(recorder)
                if self.repeats:
                    repeats.watch(twin)
                forward = partial(_forward, twin, arguments, self.autocast)
                note = self._run(twin, forward, mode, recorder, repeats)
        except CacheTooSmall:  # noted in ``small_caches``
            return self.record()
        except UnknownValue as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: {error.module or 'the model'} reads a "
                f"value that depends on activations ({error}); pass a batch of real tensors, or "
                "replace the data-dependent branch"
            ) from error
        except NotImplementedError as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: {first_line(error)}; tensors without "
                "a storage (sparse ones, such as gradients of Embedding(sparse=True)) cannot be "
                "planned"
            ) from error
        finally:
            random.setstate(generators[0])
            numpy.random.set_state(generators[1])
        assumed = recorder.shadows.notes
        recorded = recorder.finish((*filter(None, (note,)), *assumed))
        step = expand(recorded, repeats.pairs, repeats.forward_end)
        return replace(step, margin=ASSUMED_MARGIN if assumed else 0.0)

    def _run(
        self,
        twin: nn.Module,
        forward: Callable[[], Any],
        mode: FakeTensorMode,
        recorder: Recorder,
        repeats: Repeats,
    ) -> str:
        """Runs the step; returns what was assumed about its loss."""
        parameters = {n: p for n, p in twin.named_parameters() if p.requires_grad}
        with ExitStack() as stack:
            stack.enter_context(mode)
            updated = dict(twin.named_parameters(remove_duplicate=False))
            if self.shards > 1:
                dtypes = {p: self.model.get_parameter(name).dtype for name, p in updated.items()}
                updated = _first_shards(updated, dtypes, self.shards, recorder)
            update = self.optimizer.ready(updated, recorder) if self.optimizer else None
            if update and self.shards > 1:
                _give_gradients(updated, recorder, Kind.GRADIENT)
            if self.keep_gradients:
                _give_gradients(parameters, recorder, Kind.KEPT_GRADIENT)
            for context in (*self.modes(), recorder, ReadsOfValues(recorder.shadows)):
                stack.enter_context(context)
            hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack)
            with hooks:
                outputs = forward()
                repeats.forward_ends()
                loss, note = loss_of(outputs, twin)
            if not self.keep_outputs:
                del outputs
            recorder.phase = Phase.BACKWARD
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                if parameter.grad is not None and not self.keep_gradients:
                    recorder.set_kind(parameter.grad, Kind.GRADIENT, name)
            repeats.finish()
            if self.optimizer and update:
                recorder.phase = Phase.OPTIMIZER
                self.optimizer.run(update)
        return note


def _give_gradients(parameters: Mapping[str, torch.Tensor], recorder: Recorder, kind: Kind) -> None:
    with FakeOps():  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                recorder.add_resident(parameter.grad, kind, name)


def _first_shards(
    named: Mapping[str, nn.Parameter],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    shards: int,
    recorder: Recorder,
) -> dict[str, nn.Parameter]:
    """What the first of several processes holds of each parameter: no other one holds more."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    with FakeOps():  # type: ignore[no-untyped-call]
        for name, whole in named.items():
            if whole not in made:
                rows = -(-whole.shape[0] // shards)
                shape = rows, *whole.shape[1:]
                shard = whole.detach().new_empty(shape, dtype=dtypes[whole])
                made[whole] = nn.Parameter(shard, requires_grad=whole.requires_grad)
                recorder.add_resident(made[whole], Kind.PARAMETER, name)
    return {name: made[whole] for name, whole in named.items()}


def _fake_twin(
    model: nn.Module, mode: FakeTensorMode, recorder: Recorder, casts: Casts | None
) -> nn.Module:
    """A deep copy of the module tree on fake tensors; tied tensors stay tied."""
    memo: dict[int, Any] = {}
    for name, tensor, kind in _tensors_of(model):
        if id(tensor) in memo:
            continue
        fake = _fake(tensor.detach(), mode)
        if isinstance(tensor, nn.Parameter):
            fake = casts.cast(fake) if casts else fake
            make_parameter(fake, tensor.requires_grad)
        else:
            recorder.shadows.set(fake, tensor)
        memo[id(tensor)] = fake
        recorder.add_resident(fake, kind, name)
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied for planning: {error}; take what cannot be "
            "copied out of its attributes"
        ) from error
    if casts:
        casts.cast_inputs(twin)
    return twin if model.training else twin.train()


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, Kind]]:
    for prefix, module in model.named_modules():
        own = (
            (module._parameters.items(), Kind.PARAMETER),
            (module._buffers.items(), Kind.BUFFER),
            (vars(module).items(), Kind.BUFFER),
        )
        for attributes, kind in own:
            for attribute, value in attributes:
                for tensor in tensors_in(value):
                    yield f"{prefix}.{attribute}" if prefix else attribute, tensor, kind


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    if tensor.device.type == "meta":
        return new_fake(mode, tensor, torch.device("cpu"))
    return mode.from_tensor(tensor)


def _fake_batch(batch: BatchArguments, mode: FakeTensorMode, recorder: Recorder) -> BatchArguments:
    memo: dict[int, Any] = {}
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    for name, tensor in ((name, t) for name, value in named for t in tensors_in(value)):
        if id(tensor) not in memo:
            fake = _fake(tensor.detach(), mode).requires_grad_(tensor.requires_grad)
            if not fake.requires_grad:
                recorder.shadows.set(fake, tensor)
            memo[id(tensor)] = fake
            recorder.add_resident(fake, Kind.BATCH, str(name))
    plain = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
    return copy.deepcopy(plain, memo)


def _follow_calls(twin: nn.Module, recorder: Recorder) -> None:
    """Tells the recorder of every module call. The model itself is the outermost one."""
    for module in caching_modules(twin):
        module.register_forward_pre_hook(without_cache, with_kwargs=True)
    for name, module in twin.named_modules():
        type_name, watch = type(module).__name__, _Watch(module)

        def enter(
            _: nn.Module,
            args: Any,
            kwargs: Any,
            name: str = name,
            type_name: str = type_name,
            watch: _Watch = watch,
        ) -> None:
            watch.begin()
            recorder.enter_call(name, type_name, args, kwargs)

        def leave(module: nn.Module, *_: Any, watch: _Watch = watch) -> None:
            recorder.exit_call(vars(module).values(), watch.changed())

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, prepend=True, always_call=True)


class _Watch:
    """Notices what a forward leaves behind that no tensor shows, so that it would not repeat."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[tuple[Any, ...]] = []

    def begin(self) -> None:
        self._before.append(self._state())

    def changed(self) -> str:
        """What differs since the matching :meth:`begin`, in words."""
        generators, attributes = self._before.pop()
        if generators != self._state()[0]:
            return "draws from the generator of Python or NumPy"
        cls = type(self._module)
        names = [
            name
            for name, value in self._state()[1].items()
            if attributes.get(name, getattr(cls, name, value)) != value
        ]
        return f"changes its attribute {names[0]!r}" if names else ""

    def _state(self) -> tuple[Any, ...]:
        state: Any = numpy.random.get_state(legacy=True)
        plain = {k: v for k, v in vars(self._module).items() if type(v) in (int, float, bool, str)}
        return (hash(random.getstate()), int(state[2]), int(state[1][0])), plain


def _forward(twin: nn.Module, batch: BatchArguments, autocast: torch.dtype | None) -> Any:
    kind = next(twin.parameters()).device.type
    try:
        with forward_autocast(kind, autocast):
            return twin(**batch) if isinstance(batch, Mapping) else twin(*batch)
    except (UnknownValue, CacheTooSmall):
        raise
    except Exception as error:
        named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        shapes = [
            f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for name, value in named
            for t in tensors_in(value)
        ]
        raise CaptureError(
            f"{type(twin).__name__} refused the batch ({', '.join(shapes)}): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _refuse_checkpointing(model: nn.Module) -> None:
    if is_planned(model):
        raise CaptureError(
            f"{type(model).__name__} carries a plan already; call remove() on the handle that "
            "apply() returned before planning again"
        )
    if (name := checkpointed_module(model)) is not None:
        raise CaptureError(
            f"activation checkpointing is switched on in {name}; {SWITCH_OFF} before planning"
        )
