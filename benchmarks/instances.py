"""Problems to time solvers on: transformer blocks, alike or not, ResNet, U-nets, random graphs.

A region is a chain of ops with seconds and bytes, and its options are the sets of results worth
keeping. Sizes are those of Llama-3-8B's layers at 4,096 tokens in bfloat16, seconds a roofline's of
an A100. Depends on the solvers' records.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from memfit.solvers import Moment, Option, Problem, Region, Segment, SharedTensor, peak_bytes

MIB = 2**20
# Of one decoder layer, coarsely: seconds of the op, MiB of its result, whether autograd saves it.
LAYER = (
    ("input_norm", 0.27e-3, 32),
    ("qkv", 1.3e-3, 48),
    ("rope", 0.2e-3, 40),
    ("sdpa", 0.9e-3, 33),
    ("o_proj", 0.85e-3, 32),
    ("post_norm", 0.27e-3, 32),
    ("gate_up", 5.6e-3, 224),
    ("act_mul", 0.6e-3, 112),
)
# Of a bottleneck block of ResNet-50's first stage, a batch of 64 images.
BOTTLENECK = (
    ("conv1", 0.15e-3, 49),
    ("norm1", 0.07e-3, 49),
    ("conv2", 0.35e-3, 49),
    ("norm2", 0.07e-3, 49),
    ("conv3", 0.25e-3, 196),
    ("norm3", 0.26e-3, 196),
    ("add_relu", 0.26e-3, 196),
)
RESNET = ((3, 1.0), (4, 0.5), (6, 0.25), (3, 0.125))
"""Blocks of a stage, and their size beside those of the first."""
INPUT_MIB, GRADIENT_MIB, RESIDENT_MIB, LOSS_MIB = 32, 416, 2000, 2000
LONGEST_SEGMENT = 8
STEP_FACTOR = 3
"""A step takes so many times the seconds of its forward."""


Op = tuple[str, float, int]


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem without a budget, and the seconds of its step when nothing is recomputed."""

    name: str
    problem: Problem
    step_seconds: float
    ops: tuple[Op, ...] = ()
    """Of all layers of a chain."""

    def peaks(self) -> tuple[int, int]:
        """Peak with all kept, and the least that any single option reaches everywhere."""
        problem = self.problem.flat()
        keep = peak_bytes(problem, [0] * len(problem.regions))
        last = [len(region.options) - 1 for region in problem.regions]
        return keep, peak_bytes(problem, last)


def options_of(ops: Sequence[Op], count: int) -> tuple[Option, ...]:
    """``count`` Pareto options, from all kept to nothing, spread over the bytes stored."""
    everything = sum(size for _, _, size in ops)
    found = {_option(ops, kept, everything) for kept in _subsets(len(ops))}
    best: list[Option] = []
    for option in sorted(found, key=lambda o: (o.recompute_seconds, o.stored_bytes)):
        if all(option.stored_bytes < other.stored_bytes for other in best):
            best.append(option)
    picked = [best[round(i * (len(best) - 1) / (count - 1))] for i in range(count)]
    return tuple(dict.fromkeys(picked))


def _subsets(count: int) -> Iterator[frozenset[int]]:
    for size in range(count + 1):
        yield from map(frozenset, combinations(range(count), size))


def _option(ops: Sequence[Op], kept: frozenset[int], everything: int) -> Option:
    stored = INPUT_MIB + sum(ops[i][2] for i in kept)
    largest = max(size for _, _, size in ops)
    action = "keep" if len(kept) == len(ops) else "selective" if kept else "checkpoint"
    return Option(
        action,
        stored * MIB,
        (INPUT_MIB + everything) * MIB,
        (INPUT_MIB + everything + 2 * largest) * MIB,
        sum(seconds for i, (_, seconds, _) in enumerate(ops) if i not in kept),
        tuple(ops[i][0] for i in sorted(kept)),
    )


def _scaled(ops: Sequence[Op], factor: float) -> tuple[Op, ...]:
    return tuple((name, seconds * factor, round(size * factor)) for name, seconds, size in ops)


def transformer(layers: int, distinct: bool = False, options: int = 12, seed: int = 0) -> Instance:
    """Decoder layers, all alike or each of another width."""
    draw = random.Random(seed)
    factors = [draw.uniform(0.6, 1.4) if distinct else 1.0 for _ in range(layers)]
    menus = {factor: options_of(_scaled(LAYER, factor), options) for factor in {*factors}}
    kinds = {factor: kind for kind, factor in enumerate(menus)}
    regions = [Region(f"layers.{r}", menus[f], kinds[f]) for r, f in enumerate(factors)]
    name = f"{layers} {'distinct' if distinct else 'identical'} layers"
    seconds = STEP_FACTOR * sum(s for _, s, _ in LAYER) * sum(factors)
    ops = tuple(op for factor in factors for op in _scaled(LAYER, factor))
    return Instance(name, Problem(tuple(regions), _moments(regions), 0), seconds, ops)


def unet(depth: int, options: int = 12) -> Instance:
    """Blocks of an encoder, each half as large as the last, and their mirror images.

    What an encoder block hands across is alive until its decoder block's backward is done with it.
    """
    factors = [2.0**-k for k in range(depth)]
    factors += [2.0**-depth, *reversed(factors)]
    menus = {factor: options_of(_scaled(LAYER, factor), options) for factor in {*factors}}
    kinds = {factor: kind for kind, factor in enumerate(menus)}
    regions = [Region(f"blocks.{r}", menus[f], kinds[f]) for r, f in enumerate(factors)]
    moments = _moments(regions)
    shared = []
    for k in range(depth):
        reader = len(regions) - 1 - k
        holders = [(reader, o) for o in range(len(regions[reader].options))]
        holders += [
            (k, o) for o, option in enumerate(regions[k].options) if "o_proj" in option.keep
        ]
        late = (i for i, m in enumerate(moments) if m.phase == "backward" or m.stored > reader)
        size = round(INPUT_MIB * factors[k]) * MIB
        shared.append(SharedTensor(f"skip {k}", size, tuple(holders), tuple(late)))
    seconds = STEP_FACTOR * sum(s for _, s, _ in LAYER) * sum(factors)
    problem = Problem(tuple(regions), moments, 0, tuple(shared))
    return Instance(f"U-net of depth {depth}", problem, seconds)


def resnet(options: int = 12) -> Instance:
    """ResNet-50: stages of bottleneck blocks, each with half of the bytes of the one before."""
    factors = [factor for blocks, factor in RESNET for _ in range(blocks)]
    menus = {f: options_of(_scaled(BOTTLENECK, f), options) for f in factors}
    kinds = {factor: kind for kind, factor in enumerate(menus)}
    regions = [Region(f"blocks.{r}", menus[f], kinds[f]) for r, f in enumerate(factors)]
    seconds = STEP_FACTOR * sum(s for _, s, _ in BOTTLENECK) * sum(factors)
    ops = tuple(op for factor in factors for op in _scaled(BOTTLENECK, factor))
    return Instance("ResNet-50", Problem(tuple(regions), _moments(regions), 0), seconds, ops)


def nested(layers: int, options: int = 12) -> Instance:
    """Identical layers that may be chained, without parameters: their inputs take much."""
    plain = transformer(layers, options=options).problem.regions
    chained = tuple(
        replace(o, stored_bytes=o.stored_bytes - INPUT_MIB * MIB, chained=True)
        for o in plain[0].options[-1:]
    )
    regions = tuple(replace(r, options=(*r.options, *chained)) for r in plain)
    moments = tuple(replace(m, base_bytes=0) for m in _moments(regions) if m.region is not None)
    at = {m.region: i for i, m in enumerate(moments) if m.phase == "backward"}
    head = len(regions[0].options) - 2
    segments = []
    for first in range(layers):
        for stop in range(first + 2, min(first + LONGEST_SEGMENT, layers) + 1):
            # Of the inputs that were made again, those of the regions before are still held.
            held = tuple((at[r], INPUT_MIB * MIB * (r - first - 1)) for r in range(first + 1, stop))
            again = sum(seconds for _, seconds, _ in LAYER) * (stop - first - 1)
            choices = (head, *[head + 1] * (stop - first - 1))
            segments.append(Segment(first, choices, again, held))
    problem = Problem(regions, moments, 0, segments=tuple(segments))
    seconds = STEP_FACTOR * sum(s for _, s, _ in LAYER) * layers
    return Instance(f"{layers} chained layers", problem, seconds)


def random_graph(regions: int, options: int = 12, seed: int = 0) -> Instance:
    """Blocks of any size, and tensors that several of them hold."""
    plain = transformer(regions, distinct=True, options=options, seed=seed)
    draw = random.Random(seed + 1)
    problem = plain.problem
    shared = []
    for t in range(regions // 2):
        readers = sorted(draw.sample(range(regions), draw.randint(2, min(4, regions))))
        holders = tuple(
            (r, o)
            for r in readers
            for o in range(len(problem.regions[r].options))
            if draw.random() < 0.7
        )
        backward = tuple(i for i, m in enumerate(problem.moments) if m.phase == "backward")
        shared.append(SharedTensor(f"tensor {t}", draw.randint(8, 96) * MIB, holders, backward))
    made = Problem(problem.regions, problem.moments, 0, tuple(shared))
    return Instance(f"random graph of {regions}", made, plain.step_seconds)


def _moments(regions: Sequence[Region]) -> tuple[Moment, ...]:
    """Forwards, the loss, and backwards, where gradients of later regions have come to exist."""
    count = len(regions)
    base = RESIDENT_MIB * MIB
    forwards = [
        Moment(f"forward of {x.name}", base, r, r, "forward") for r, x in enumerate(regions)
    ]
    backwards = [
        Moment(
            f"backward of {x.name}",
            base + GRADIENT_MIB * MIB * (count - r),
            r,
            r,
            "backward",
        )
        for r, x in enumerate(regions)
    ]
    return (*forwards, Moment("loss", base + LOSS_MIB * MIB, count), *reversed(backwards))
