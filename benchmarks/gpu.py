"""The tables of truth.py and frontier.py on a CUDA device, with models of the size people train.

    python benchmarks/gpu.py [--part truth|frontier] [--models gpt2] [--shares 0.5] [--goals hf_1]

Needs torch, transformers, pulp and highspy, and no installation: memfit is imported from this
repository. Steps of ``truth`` end with AdamW's; those of ``frontier`` with the backward. Some
minutes for each part; 80 GiB are enough. With ``--deterministic`` the column ``equal`` tells of
plans, not of kernels that add in any order; memory is then not that of ordinary training. Exit code
1 as in those scripts, 2 where there is no CUDA device. ``--device cpu --tiny`` is a dry run.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / ".links"))

import torch

from benchmarks import frontier, processes, truth
from benchmarks.report import write_results
from benchmarks.training import Trainer
from benchmarks.workloads import GPU_MODELS, Workload

_PARTS: dict[str, Callable[[processes.Request], dict[str, Any]]] = {
    "truth": truth.measure,
    "frontier": frontier.measure,
}

SHARES = (1.0, 0.7, 0.5, 0.35)


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(_PARTS[arguments.part], arguments.alone)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no CUDA device here; nothing was measured (--device cpu --tiny is a dry run)."
        )
        return 2
    if arguments.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if arguments.device == "cuda":
        _warm_up()
    parts = (arguments.part,) if arguments.part else tuple(_PARTS)
    return max(_run(argparse.Namespace(**vars(arguments) | {"part": part})) for part in parts)


def _warm_up() -> None:
    """What is loaded in a first step holds on to that step's model for ever: to a small one."""
    workload = Workload(GPU_MODELS[0], size="tiny", device="cuda", optimizer="adamw")
    Trainer.of(workload).peak()


def _run(arguments: argparse.Namespace) -> int:
    begin = time.perf_counter()
    run = _run_truth if arguments.part == "truth" else _run_frontier
    code, records = run(arguments)
    if arguments.device == "cuda" and not arguments.tiny:
        seconds = time.perf_counter() - begin
        name = f"{arguments.part}-cuda" + "-deterministic" * arguments.deterministic
        write_results(name, "cuda", records, seconds)
    return code


def _run_truth(arguments: argparse.Namespace) -> tuple[int, list[dict[str, Any]]]:
    shares: Sequence[float] = truth.QUICK_BUDGETS if arguments.tiny else SHARES
    workloads = _workloads(arguments, optimizer="adamw")
    requests = truth.requests_for(workloads, arguments.shares or shares)
    rows, lost = truth.measure_all(requests, _runner(arguments), jobs=1)
    return truth.conclude(rows, lost), [truth.record(row) for row in rows]


def _run_frontier(arguments: argparse.Namespace) -> tuple[int, list[dict[str, Any]]]:
    goals: Sequence[str] = frontier.DEFAULT_GOALS
    rounds = frontier.ROUNDS
    if arguments.tiny:
        goals, rounds = ("hf_1", "half"), frontier.QUICK_ROUNDS
    rows, lost = frontier.measure_all(
        _workloads(arguments), arguments.goals or goals, rounds, _runner(arguments)
    )
    code = frontier.conclude(rows, lost, timed=not arguments.tiny)
    return code, [frontier.record(row) for row in rows]


def _workloads(arguments: argparse.Namespace, optimizer: str | None = None) -> list[Workload]:
    size = "tiny" if arguments.tiny else "large"
    # A CPU's bfloat16 convolutions make temporaries of their own.
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    return [
        Workload(m, size=size, dtype=dtype, device=arguments.device, optimizer=optimizer)
        for m in arguments.models
    ]


def _runner(arguments: argparse.Namespace) -> processes.Measure:
    """CUDA counts anew whenever it is asked to; only a CPU needs a process for each measurement."""
    measure = _PARTS[arguments.part]
    if arguments.device == "cuda":
        return partial(_in_this_process, measure)
    return partial(processes.alone, __file__, options=("--part", arguments.part))


def _in_this_process(measure: processes.Measure, request: processes.Request) -> dict[str, Any]:
    try:
        return measure(request)
    except torch.OutOfMemoryError as error:
        raise processes.MeasurementFailed(f"measuring {dict(request)} failed: {error}") from error
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=tuple(_PARTS), help="one of the tables only")
    parser.add_argument("--models", nargs="+", choices=GPU_MODELS, default=GPU_MODELS)
    parser.add_argument("--shares", nargs="+", type=float, help="of what the unplanned step adds")
    parser.add_argument("--goals", nargs="+", choices=frontier.GOALS, metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deterministic", action="store_true", help="kernels that repeat")
    parser.add_argument("--tiny", action="store_true", help="tiny models; times mean nothing")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
