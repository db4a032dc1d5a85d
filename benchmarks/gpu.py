"""What memfit states for CUDA, measured on a CUDA device with models of the size people train.

    python benchmarks/gpu.py [--part truth|frontier|costs|overhead] [--models gpt2] [--minutes 8]

``truth``: peaks, budgets, gradients (gpu_truth.py). ``costs``: seconds of steps and of ops
(costs.py). ``overhead``: what the machinery costs the host (overhead.py), and a step that is bound
by launching its ops. ``frontier``: step time against what people do by hand (frontier.py).

Needs torch, transformers, pulp and highspy, and no installation: memfit is imported from this
repository. 80 GiB are enough. Once the minutes are over, no new row is begun; the same command then
goes on where it stopped, for rows are remembered in ``measured.jsonl`` beside the results. Exit
code 1 if a row fails or is missing, 2 where there is no CUDA device. With ``--deterministic``,
torch takes kernels that repeat themselves to the bit, or raises. ``--device cpu --tiny`` is a dry
run.
"""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / ".links"))

import torch

from benchmarks import costs, frontier, gpu_truth, overhead, processes, truth
from benchmarks.report import RESULTS, write_results
from benchmarks.resuming import Remembered
from benchmarks.training import Trainer, forget_shared
from benchmarks.workloads import GPU_MODELS, Workload

_MEASURES: dict[str, processes.Measure] = {
    "truth": gpu_truth.measure,
    "costs": costs.measure,
    "overhead": overhead.measure,
    "frontier": frontier.measure,
}
ROUNDS = 5
_REMEMBERED = "measured.jsonl"
_LAUNCH_GOALS = ("hf_1", "hf_2", frontier.HALF)

Result = tuple[int, list[dict[str, Any]]]
"""An exit code, and rows for the results file."""


def main() -> int:
    arguments = _parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no CUDA device here; nothing was measured (--device cpu --tiny is a dry run)."
        )
        return 2
    if arguments.deterministic:
        _be_deterministic()
    if arguments.device == "cuda":
        _warm_up()
    until_seconds = time.monotonic() + 60 * arguments.minutes
    kind = {"deterministic": True} if arguments.deterministic else {}
    run = _asking(kind, _runner(arguments, until_seconds))
    parts = (arguments.part,) if arguments.part else tuple(_PARTS)
    return max([_run(part, arguments, run) for part in parts])


def _be_deterministic() -> None:
    """Kernels that repeat themselves; what has none raises. cuDNN's attention has none."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _warm_up() -> None:
    """Loads what a first step loads, so that no measured one does."""
    trainer = Trainer.of(Workload("gpt2", size="tiny", device="cuda", optimizer="adamw"))
    trainer.plan(2**60)
    trainer.peak()


def _run(part: str, arguments: argparse.Namespace, run: processes.Measure) -> int:
    print(f"\n== {part}\n", flush=True)
    begin = time.perf_counter()
    code, records = _PARTS[part](arguments, run)
    if arguments.device == "cuda" and not arguments.tiny:
        name = f"{part}-cuda" + "-deterministic" * arguments.deterministic
        seconds = time.perf_counter() - begin
        write_results(name, "cuda", records, seconds, arguments.to)
    return code


def _truth(arguments: argparse.Namespace, run: processes.Measure) -> Result:
    shares = arguments.shares or (truth.QUICK_BUDGETS if arguments.tiny else gpu_truth.SHARES)
    # What runs deterministically is not what a plan that is made apart knows of.
    made = (gpu_truth.HERE,) if arguments.deterministic else tuple(gpu_truth.TOLERANCES)
    workloads = _workloads(arguments, optimizer="adamw")
    requests = gpu_truth.requests_for(workloads, sorted(shares, reverse=True), made)
    rows, lost = gpu_truth.measure_all(requests, _asking({"measure": "truth"}, run))
    return gpu_truth.conclude(rows, lost), [gpu_truth.record(row) for row in rows]


def _costs(arguments: argparse.Namespace, run: processes.Measure) -> Result:
    workloads = _workloads(arguments, optimizer="adamw")
    requests = costs.requests_for(workloads, ROUNDS)
    rows, kinds, lost = costs.measure_all(requests, _asking({"measure": "costs"}, run))
    code = costs.conclude(rows, lost, timed=not arguments.tiny)
    return code, [*map(costs.record, rows), *map(costs.record, kinds)]


def _overhead(arguments: argparse.Namespace, run: processes.Measure) -> Result:
    request = overhead.request_for(arguments.tiny, arguments.device)
    result = processes.attempt(_asking({"measure": "overhead"}, run), request)
    if isinstance(result, processes.MeasurementFailed):
        print(result)
        return 1, []
    chains = overhead.show(result, request)
    code = overhead.conclude(chains, timed=not arguments.tiny)
    size = "tiny" if arguments.tiny else "launch"
    print(f"\nA step that is bound by launching its ops ({size}):")
    workload = _workload(arguments, "gpt2", size)
    goals = _LAUNCH_GOALS[-1:] if arguments.tiny else _LAUNCH_GOALS
    pairs = [(workload, goal) for goal in goals]
    rows, lost = frontier.measure_all(pairs, ROUNDS, _asking({"measure": "frontier"}, run))
    code = max(code, frontier.conclude(rows, lost, timed=not arguments.tiny))
    return code, [*map(overhead.record, chains), *map(frontier.record, rows)]


def _frontier(arguments: argparse.Namespace, run: processes.Measure) -> Result:
    goals = ("hf_1", "half") if arguments.tiny else frontier.GOALS
    pairs = [(w, g) for w in _workloads(arguments) for g in arguments.goals or goals]
    pairs.sort(key=lambda pair: pair[1] in frontier.COMPILED_GOALS)  # what takes minutes comes last
    rows, lost = frontier.measure_all(pairs, ROUNDS, _asking({"measure": "frontier"}, run))
    code = frontier.conclude(rows, lost, timed=not arguments.tiny)
    return code, [frontier.record(row) for row in rows]


_PARTS: dict[str, Callable[[argparse.Namespace, processes.Measure], Result]] = {
    "truth": _truth,
    "costs": _costs,
    "overhead": _overhead,
    "frontier": _frontier,
}


def _workloads(arguments: argparse.Namespace, optimizer: str | None = None) -> list[Workload]:
    size = "tiny" if arguments.tiny else "large"
    return [_workload(arguments, model, size, optimizer) for model in arguments.models]


def _workload(
    arguments: argparse.Namespace, model: str, size: str, optimizer: str | None = None
) -> Workload:
    device = arguments.device
    # A CPU's bfloat16 convolutions make temporaries of their own.
    dtype = "bfloat16" if device == "cuda" else "float32"
    return Workload(model, size=size, dtype=dtype, device=device, optimizer=optimizer)


def _runner(arguments: argparse.Namespace, until_seconds: float) -> processes.Measure:
    """CUDA counts anew whenever it is asked to; only a CPU needs a process for each measurement."""
    on_gpu = arguments.device == "cuda"
    measure = _in_this_process if on_gpu else partial(processes.fork, _measure)
    arguments.to.mkdir(exist_ok=True, parents=True)
    return Remembered(arguments.to / _REMEMBERED, measure, arguments.device, until_seconds)


def _asking(more: dict[str, Any], run: processes.Measure) -> processes.Measure:
    """Adds to requests which measurement they are for, or how it is made."""
    return lambda request: run({**request, **more})


def _measure(request: processes.Request) -> dict[str, Any]:
    return _MEASURES[request["measure"]](request)


def _in_this_process(request: processes.Request) -> dict[str, Any]:
    """The next measurement is to begin whatever became of this one, and to find the GPU empty."""
    told = ""
    try:
        return _measure(request)
    except Exception as error:
        told = "".join(traceback.format_exception(error, limit=-3))
        forget_shared()
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    # Not raised from the error, whose traceback would hold the model.
    raise processes.MeasurementFailed(f"measuring {dict(request)} failed: {told}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=tuple(_PARTS), help="one of the tables only")
    parser.add_argument("--models", nargs="+", choices=GPU_MODELS, default=GPU_MODELS)
    parser.add_argument("--shares", nargs="+", type=float, help="of what the unplanned step adds")
    parser.add_argument("--goals", nargs="+", choices=frontier.GOALS, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8.0, help="to begin rows in")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder for what was measured")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deterministic", action="store_true", help="kernels that repeat")
    parser.add_argument("--tiny", action="store_true", help="tiny models; times mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
