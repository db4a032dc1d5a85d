"""What the machinery costs the host: its microseconds for each op of a chain of tiny ones.

    python benchmarks/overhead.py [--ops 300] [--rounds 60] [--quick]

Autograd saves a tensor at every op, and the ops are so small that only the machinery is seen. All
mechanisms take turns in one process with one thread; figures are medians. Exit code 1 if memfit
costs more than 2 us an op over the plain chain where it keeps everything, or more than 5 where it
keeps nothing, the recomputed op included: on a machine that takes 4.6 us for an op of the plain
chain, as the one did that these limits come from, and on others in proportion.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from benchmarks import processes
from benchmarks.report import print_rows, write_results
from memfit.integrations import apply
from memfit.integrations.selective import SelectiveForward
from memfit.planner import plan

OPS, ROUNDS, WARMUP = 300, 60, 5
QUICK_OPS, QUICK_ROUNDS = 20, 3
ELEMENTS = 16
PLAIN, KEEP = "plain", "memfit keep"
ALL_KEPT, HALF_KEPT, NONE_KEPT = (f"memfit selective, {kept} kept" for kept in ("all", "half", "0"))
ALLOWED = {ALL_KEPT: 2.0, NONE_KEPT: 5.0}
"""Microseconds for each op over the plain chain, which takes ``PLAIN_MICROSECONDS``."""
PLAIN_MICROSECONDS = 4.6
HEADERS = ("mechanism".rjust(27), "forward us", "backward us", "total us", "over plain", "allowed")

Run = Callable[[], torch.Tensor]


class Chain(nn.Module):
    """Sines of sines: autograd saves the input of each."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.ops):
            x = x.sin()
        return x

    def saved(self) -> tuple[str, ...]:
        """The chain's own saved tensors, by the names that plans use; the input is not one."""
        return tuple("sin" if i == 1 else f"sin#{i}" for i in range(1, self.ops))


class Trained(nn.Module):
    """A model of one chain, which can be planned: it has a parameter and returns a loss."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((ELEMENTS,), 0.5))
        self.chain = Chain(ops)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.chain(x * self.weight)
        return out.sum()


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one mechanism, for each op of the chain."""

    mechanism: str
    forward_seconds: float
    backward_seconds: float
    total_seconds: float
    over_plain_seconds: float
    """Median over the rounds of what it takes more than the plain chain does next to it."""
    allowed_seconds: float | None

    @property
    def passes(self) -> bool:
        return self.allowed_seconds is None or self.over_plain_seconds <= self.allowed_seconds

    def cells(self) -> list[str]:
        """What the table shows."""
        times = (
            self.forward_seconds,
            self.backward_seconds,
            self.total_seconds,
            self.over_plain_seconds,
        )
        allowed = "" if self.allowed_seconds is None else _micro(self.allowed_seconds)
        return [self.mechanism, *map(_micro, times), allowed if self.passes else f"> {allowed}"]


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"


def mechanisms(ops: int, device: str = "cpu") -> dict[str, Run]:
    """For each mechanism a forward on the device; all return a loss."""
    x = torch.linspace(0.1, 1.0, ELEMENTS, device=device)

    def run(model: Trained) -> torch.Tensor:
        loss: torch.Tensor = model(x)
        return loss

    def wrapped(around: Callable[[Run], torch.Tensor]) -> Run:
        model = Trained(ops).to(device)
        own = model.chain.forward
        model.chain.__dict__["forward"] = lambda h: around(partial(own, h))
        return partial(run, model)

    saved = Chain(ops).saved()
    kept = {ALL_KEPT: saved, HALF_KEPT: saved[::2], NONE_KEPT: ()}
    runs: dict[str, Run] = {
        PLAIN: partial(run, Trained(ops).to(device)),
        KEEP: partial(run, _planned(ops, x)),
        "identity hooks": wrapped(_under_identity_hooks),
        "torch checkpoint": wrapped(partial(checkpoint, use_reentrant=False)),
        "torch SAC, all saved": wrapped(partial(_under_sac, save=True)),
        "torch SAC, 0 saved": wrapped(partial(_under_sac, save=False)),
    }
    return runs | {name: partial(run, _selective(ops, keep, device)) for name, keep in kept.items()}


def _planned(ops: int, x: torch.Tensor) -> Trained:
    """With a plan that has memory enough, so that nothing is wrapped.

    It is made for a short chain, which looks the same to a plan and takes no time to plan.
    """
    model = Trained(ops).to(x.device)
    apply(plan(Trained(QUICK_OPS).to(x.device), 2**60, {"x": x}), model)
    return model


def _selective(ops: int, keep: tuple[str, ...], device: str) -> Trained:
    model = Trained(ops).to(device)
    model.chain.__dict__["forward"] = SelectiveForward(model.chain, None, keep)
    return model


def _under_identity_hooks(forward: Run) -> torch.Tensor:
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return forward()


def _under_sac(forward: Run, save: bool) -> torch.Tensor:
    def policy(_: SelectiveCheckpointContext, *__: Any, **___: Any) -> bool:
        return save

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out: torch.Tensor = checkpoint(forward, use_reentrant=False, context_fn=contexts)
    return out


Times = Sequence[tuple[float, float]]
"""Forward and backward seconds, round by round."""


def time_all(runs: Mapping[str, Run], rounds: int) -> dict[str, Times]:
    """The mechanisms take turns, each round beginning with another one."""
    names = list(runs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-WARMUP, rounds):
        gc.collect()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _time(runs[name])  # what ran before it is out of the caches then
            taken = _time(runs[name])
            if turn >= 0:
                times[name].append(taken)
    return dict(times)


def _time(run: Run) -> tuple[float, float]:
    """Seconds of the host, which does not wait for what it launches on a GPU."""
    begin = time.process_time()
    loss = run()
    middle = time.process_time()
    loss.backward()  # type: ignore[no-untyped-call]
    end = time.process_time()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return middle - begin, end - middle


def rows_of(times: Mapping[str, Times], ops: int) -> list[Row]:
    """Medians for each op."""
    plain = [sum(both) for both in times[PLAIN]]
    slowness = statistics.median(plain) / ops * 1e6 / PLAIN_MICROSECONDS
    rows = []
    for name, taken in times.items():
        totals = [sum(both) for both in taken]
        over = [own - other for own, other in zip(totals, plain, strict=True)]
        forwards, backwards = zip(*taken, strict=True)
        forward, backward, total, more = (
            statistics.median(each) / ops for each in (forwards, backwards, totals, over)
        )
        allowed = ALLOWED[name] * slowness / 1e6 if name in ALLOWED else None
        rows.append(Row(name, forward, backward, total, more, allowed))
    return rows


def measure(request: processes.Request) -> dict[str, Any]:
    """The rows of all mechanisms, in this process."""
    ops, rounds, device = request["ops"], request["rounds"], request["device"]
    rows = rows_of(time_all(mechanisms(ops, device), rounds), ops)
    return {"rows": [asdict(row) for row in rows]}


def show(result: dict[str, Any], request: processes.Request) -> list[Row]:
    """Prints the rows of a measurement, and returns them."""
    ops, rounds = request["ops"], request["rounds"]
    print(f"Microseconds of the host for each of {ops} ops, medians of {rounds} rounds.\n")
    rows, _ = print_rows(HEADERS, (Row(**row) for row in result["rows"]))
    return rows


def conclude(rows: Sequence[Row], timed: bool) -> int:
    """Says how many mechanisms cost more than they may; the exit code."""
    failed = sum(not row.passes for row in rows) if timed else 0
    print(f"\nOver what is allowed: {failed} of {len(ALLOWED)}.")
    return 1 if failed else 0


def record(row: Row) -> dict[str, Any]:
    """The row for the results file."""
    return asdict(row) | {"passes": row.passes}


def request_for(quick: bool, device: str) -> dict[str, Any]:
    """What :func:`measure` is asked for."""
    ops, rounds = (QUICK_OPS, QUICK_ROUNDS) if quick else (OPS, ROUNDS)
    return {"ops": ops, "rounds": rounds, "device": device}


def main() -> int:
    arguments = _parse()
    given = {"ops": arguments.ops, "rounds": arguments.rounds}
    request = request_for(arguments.quick, "cpu") | {k: v for k, v in given.items() if v}
    torch.set_num_threads(1)
    begin = time.perf_counter()
    rows = show(measure(request), request)
    if not arguments.quick and request["ops"] == OPS:
        records = [record(row) for row in rows]
        write_results("overhead-cpu", "cpu", records, time.perf_counter() - begin)
    return conclude(rows, timed=not arguments.quick)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", type=int, help="length of the chain")
    parser.add_argument("--rounds", type=int, help="of all mechanisms in turns")
    parser.add_argument("--quick", action="store_true", help="a short chain; times are not judged")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
