"""A training step of a few decoder layers in eight ops each, small enough for the best schedule of
any kind: once as the planner's records, once as the graph of the general problem.

Sizes are those of Llama-3-8B's layers at 4,096 tokens in bfloat16, seconds a roofline's of an A100.
A backward op makes the gradients of all that its forward op read. Depends on the planner's records
and the solvers'.
"""

from dataclasses import dataclass

import torch
from torch import fx

from memfit.planner.step_graph import Call, Kind, Op, Phase, Saved, StepGraph, Storage
from memfit.solvers.general import Graph, Node

MIB = 2**20
# Of a layer: name, seconds forward and backward, MiB of the result, what it reads and what its
# backward reads, counted from the layer's input 0.
_LAYER = (
    ("norm1", 0.179e-3, 0.268e-3, 32, (0,), (0,)),
    ("qkv", 1.335e-3, 2.535e-3, 48, (1,), (1,)),
    ("attention", 1.041e-3, 2.603e-3, 32, (2,), (2, 3)),
    ("o_add", 0.868e-3, 1.602e-3, 32, (3, 0), (3,)),
    ("norm2", 0.179e-3, 0.268e-3, 32, (4,), (4,)),
    ("gate_up", 5.606e-3, 11.212e-3, 224, (5,), (5,)),
    ("act", 0.391e-3, 0.626e-3, 112, (6,), (6,)),
    ("down_add", 2.870e-3, 5.606e-3, 32, (7, 4), (7,)),
)
_INPUT_MIB = 32


@dataclass(frozen=True, slots=True)
class _Forward:
    name: str
    seconds: float
    backward_seconds: float
    size_bytes: int
    reads: tuple[int, ...]
    saves: tuple[int, ...]


def _forwards(layers: int) -> list[_Forward]:
    found = [_Forward("embed", 0.045e-3, 0.045e-3, _INPUT_MIB * MIB, (), ())]
    for layer in range(layers):
        places = [len(found) - 1]
        for name, seconds, backward_seconds, size, reads, saves in _LAYER:
            places.append(len(found))
            found.append(
                _Forward(
                    f"{layer}.{name}",
                    seconds,
                    backward_seconds,
                    size * MIB,
                    tuple(places[p] for p in reads),
                    tuple(places[p] for p in saves),
                )
            )
    return found


def _readers(forwards: list[_Forward], index: int) -> list[int]:
    return [i for i, forward in enumerate(forwards) if index in forward.reads]


def _gradient_bytes(forwards: list[_Forward], index: int) -> int:
    return sum(forwards[i].size_bytes for i in forwards[index].reads) or MIB


def general_graph(layers: int) -> Graph:
    """The step as nodes that may be computed in any order, any number of times."""
    forwards = _forwards(layers)
    count = len(forwards)
    nodes = [Node(f.name, f.seconds, f.size_bytes, f.reads) for f in forwards]
    for index in reversed(range(count)):
        gradients = {2 * count - 1 - reader for reader in _readers(forwards, index)}
        needs = tuple(sorted(gradients | {*forwards[index].saves}))
        size = _gradient_bytes(forwards, index)
        name, seconds = f"backward of {forwards[index].name}", forwards[index].backward_seconds
        nodes.append(Node(name, seconds, size, needs))
    return Graph(tuple(nodes))


def step_graph(layers: int) -> StepGraph:
    """The step as it would have been captured: result i in storage i, a call for the embedding
    and for each layer."""
    forwards = _forwards(layers)
    count = len(forwards)
    ops, storages, saved = [], [], []
    for i, forward in enumerate(forwards):
        last = max(_readers(forwards, i), default=i)
        storages.append(Storage(forward.size_bytes, Kind.ACTIVATION, i, last + 1))
        ops.append(_op(forward.name, Phase.FORWARD, forward.seconds, forward.reads, i))
        backward = 2 * count - 1 - i
        for order, s in enumerate(forward.saves):
            packed = i + (s == i)
            saved.append(Saved(s, packed, backward + 1, backward, backward + 1, order, 0))
    for i in reversed(range(count)):
        at = 2 * count - 1 - i
        last = max((2 * count - 1 - p for p in forwards[i].reads), default=at)
        storages.append(Storage(_gradient_bytes(forwards, i), Kind.ACTIVATION, at, last + 1))
        reads = (*(2 * count - 1 - r for r in _readers(forwards, i)), *forwards[i].saves)
        name = f"backward of {forwards[i].name}"
        ops.append(_op(name, Phase.BACKWARD, forwards[i].backward_seconds, reads, at))
    return StepGraph(
        _nodes(len(ops)), tuple(ops), tuple(storages), tuple(saved), _calls(forwards, layers)
    )


def _op(name: str, phase: Phase, seconds: float, reads: tuple[int, ...], at: int) -> Op:
    call = -1
    if phase is Phase.FORWARD:
        call = 2 + int(name.split(".")[0]) if "." in name else 1
    moved = round(seconds * 1e12)
    return Op(name, phase, call, name, reads, (at,), (), False, "", 0, moved, seconds)


def _calls(forwards: list[_Forward], layers: int) -> tuple[Call, ...]:
    starts = [1 + layer * len(_LAYER) for layer in range(layers + 1)]
    places = [sum(len(f.saves) for f in forwards[:start]) for start in starts]
    calls = [
        Call("", "Model", -1, 0, len(forwards), range(places[-1]), ()),
        Call("embed", "Embedding", 0, 0, 1, range(0), ()),
    ]
    for layer in range(layers):
        start, stop = starts[layer : layer + 2]
        own = range(*places[layer : layer + 2])
        calls.append(Call(f"layers.{layer}", "Layer", 0, start, stop, own, (start - 1,)))
    return tuple(calls)


def _nodes(count: int) -> dict[int, fx.Node]:
    """Any op of torch that can be run again stands for each."""
    graph = fx.Graph()
    return {index: graph.call_function(torch.ops.aten.mm.default) for index in range(count)}
