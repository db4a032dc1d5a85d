"""Problems to time solvers on: transformer blocks, alike or not, U-nets and random graphs.

A region is a chain of ops with seconds and bytes, and its options are the sets of results worth
keeping. Sizes are those of Llama-3-8B's layers at 4,096 tokens in bfloat16, seconds a roofline's of
an A100. Depends on the solvers' records.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from memfit.solvers import Moment, Option, Problem, Region, SharedTensor, peak_bytes

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
INPUT_MIB, GRADIENT_MIB, RESIDENT_MIB, LOSS_MIB = 32, 416, 2000, 2000
STEP_FACTOR = 3
"""A step takes so many times the seconds of its forward."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A problem without a budget, and the seconds of its step when nothing is recomputed."""

    name: str
    problem: Problem
    step_seconds: float

    def peaks(self) -> tuple[int, int]:
        """Peak with all kept, and the least that any single option reaches everywhere."""
        regions = self.problem.regions
        keep = peak_bytes(self.problem, [0] * len(regions))
        last = [len(region.options) - 1 for region in regions]
        return keep, peak_bytes(self.problem, last)


Op = tuple[str, float, int]


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
    return Instance(name, Problem(tuple(regions), _moments(regions), 0), seconds)


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
