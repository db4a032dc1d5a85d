"""What planning costs on one core: models that people ask about, on ``meta``, for a GPU elsewhere.

    python benchmarks/scale.py [--models llama-3-8b t5-11b] [--no-rival]

Every row is the command ``memfit plan config.json`` in a process of its own, on one thread, once
everything is imported: a step in bfloat16 with AdamW for an H100, into its 80 GiB and into the
middle of what plans can do. Seconds are CPU time, memory is that of the process. Beside them, on a
Llama of 8, 32 and 80 layers, stands what torch's min-cut partitioner takes for half of the
activations (``aot_eager_decomp_partition``, ``activation_memory_budget=0.5``). Depends on torch,
transformers and the command line.
"""

import argparse
import contextlib
import io
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import processes
from benchmarks.report import Table, write_results
from memfit.integrations import cli
from memfit.integrations.models import build_model
from memfit.planner import Batch, InfeasibleBudget, Plan, plan

CARD, MIDDLE = "80GiB", "middle"
RIVAL_LAYERS = (8, 32, 80)
_STEP = ("--device", "h100", "--dtype", "bfloat16", "--optimizer", "adamw")


@dataclass(frozen=True, slots=True)
class Size:
    """A model by its published config, and the batch of a step."""

    model_type: str
    task: str
    batch: Batch
    config: Mapping[str, Any]


def _llama(layers: int, **more: Any) -> Size:
    config = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "num_hidden_layers": layers,
    }  # fmt: skip
    return Size("llama", "causal-lm", Batch(1, 4096), config | more)


def _llama_70b(layers: int) -> Size:
    return _llama(layers, hidden_size=8192, intermediate_size=28672, num_attention_heads=64)


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "llama-3-8b": _llama(32),
        "llama-3-70b, 16 layers": _llama_70b(16),
        "llama-3-70b": _llama_70b(80),
        "mixtral-8x7b": Size("mixtral", "causal-lm", Batch(1, 4096), {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8,
            "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        }),
        "qwen3-30b-a3b": Size("qwen3_moe", "causal-lm", Batch(1, 4096), {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8,
            "vocab_size": 151936, "max_position_embeddings": 40960,
        }),
        "gemma-2-9b": Size("gemma2", "causal-lm", Batch(1, 4096), {
            "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
            "num_hidden_layers": 42, "vocab_size": 256000, "sliding_window": 4096,
        }),
        "whisper-large-v3": Size("whisper", "speech-seq2seq", Batch(8, 448), {
            "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32,
            "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120, "num_mel_bins": 128, "vocab_size": 51866,
        }),
        "vit-huge": Size("vit", "image-classification", Batch(64), {
            "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16,
            "num_hidden_layers": 32, "patch_size": 14, "image_size": 224,
        }),
        "t5-11b": Size("t5", "seq2seq-lm", Batch(1, 512), {
            "d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_heads": 128, "num_layers": 24,
            "num_decoder_layers": 24, "vocab_size": 32128, "decoder_start_token_id": 0,
        }),
    }
)  # fmt: skip
PARTS = ("building", "capturing", "pricing", "finding", "solving", "simulating")
HEADERS = (f"{'model':<22}", "into", *PARTS, "all", "RAM GiB", f"{'result':<38}")
RIVAL_HEADERS = ("layers", "partitioner", "memfit", "ratio")


@dataclass(frozen=True, slots=True)
class Row:
    """One command: CPU seconds of its parts, peak memory of its process, and what came out."""

    model: str
    into: str
    seconds: Mapping[str, float]
    """Of each part, by the first word of what it is called."""
    all_seconds: float
    resident_set_bytes: int
    result: str

    def cells(self) -> list[str]:
        """What the table shows."""
        parts = (self.seconds.get(part, 0.0) for part in PARTS)
        return [
            self.model,
            self.into,
            *(f"{seconds:.2f}" for seconds in (*parts, self.all_seconds)),
            f"{self.resident_set_bytes / 2**30:.2f}",
            self.result,
        ]


def measure(request: processes.Request) -> dict[str, Any]:
    """Runs one command in this process."""
    torch.set_num_threads(1)
    size = SIZES[request["model"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"model_type": size.model_type, **size.config}))
        _import_all(size, str(path))
        budget = CARD if request["into"] == CARD else str(_middle(size, str(path)))
        begin = time.process_time()
        said = _run([*_command(size, path), "--budget", budget, "--timings"])
        all_seconds = time.process_time() - begin
        result = _result(said, path.with_name("plan.json"))
    parts = re.findall(r"([\d.]+) s of CPU  (\w+)", said)
    return asdict(
        Row(
            model=request["model"],
            into=request["into"],
            seconds={word: float(seconds) for seconds, word in parts if word in PARTS},
            all_seconds=all_seconds,
            resident_set_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            result=result,
        )
    )


def _command(size: Size, path: Path) -> list[str]:
    batch = ["--batch-size", str(size.batch.size)]
    if size.batch.length is not None:
        batch += ["--sequence-length", str(size.batch.length)]
    output = ["-o", str(path.with_name("plan.json")), "--quiet"]
    return ["plan", str(path), "--task", size.task, *batch, *_STEP, *output]


def _run(words: Sequence[str]) -> str:
    """What a command says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        cli.main(words)
    return said.getvalue()


def _result(said: str, plan_file: Path) -> str:
    if not plan_file.exists():
        least = re.search(r"has a plan is (\d+) MiB", said)
        before = re.search(r"([\d.]+ \w+) of it are there before", said)
        needs = f"needs {int(least[1]) / 2**10:.1f} GiB" if least else said.splitlines()[-1]
        return f"{needs}, {before[1]} resident" if before else needs
    predicted = Plan.load(plan_file).predicted
    return (
        f"{predicted.peak_bytes / 2**30:.1f} of {predicted.unplanned_peak_bytes / 2**30:.1f} GiB, "
        f"{100 * predicted.overhead:.1f} % slower"
    )


def _import_all(size: Size, name: str) -> None:
    """Imports what the model and planning take; a plan of another model fills no caches of ours."""
    build_model(name, task=size.task)
    tiny = build_model("vit", task="image-classification")
    plan(tiny, 2**60, Batch(1), optimizer="adamw", device="a100-40gb")


def _middle(size: Size, name: str) -> int:
    """A budget halfway between the least that can be done and what needs no plan."""
    model = build_model(name, task=size.task, dtype="bfloat16")
    planned = partial(plan, model, batch=size.batch, optimizer="adamw", device="h100")
    free = planned(2**60).predicted.unplanned_peak_bytes
    try:
        planned(2**20)
    except InfeasibleBudget as error:
        return max(error.minimum_bytes, (error.minimum_bytes + free) // 2)
    return free


def rival(request: processes.Request) -> dict[str, Any]:
    """What torch's partitioner and what a plan of the same step takes, in this process."""
    import torch._functorch.config

    torch.set_num_threads(1)
    torch._functorch.config.activation_memory_budget = 0.5
    size = _llama(request["layers"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"model_type": size.model_type, **size.config}))
        _import_all(size, str(path))
        budget = _middle(size, str(path))
        begin = time.process_time()
        _run([*_command(size, path), "--budget", str(budget)])
        plan_seconds = time.process_time() - begin
        model = build_model(str(path), task=size.task, dtype="bfloat16")
    ids = torch.zeros(1, 4096, dtype=torch.long, device="meta")
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    begin = time.process_time()
    compiled(input_ids=ids, labels=ids, use_cache=False)
    partitioner_seconds = time.process_time() - begin
    return {
        "layers": request["layers"],
        "partitioner_seconds": partitioner_seconds,
        "plan_seconds": plan_seconds,
    }


def answer(request: processes.Request) -> dict[str, Any]:
    """One row of either table."""
    return rival(request) if "layers" in request else measure(request)


def main() -> int:
    arguments = _parse()
    if arguments.alone:
        processes.answer(answer, arguments.alone)
        return 0
    begin = time.perf_counter()
    measure_alone = partial(processes.alone, __file__)
    table, rows = Table(HEADERS), []
    for model in arguments.models:
        for into in (CARD, MIDDLE):
            rows.append(measure_alone({"model": model, "into": into}))
            table.row(Row(**rows[-1]).cells())
    print()
    table = Table(RIVAL_HEADERS)
    for layers in () if arguments.no_rival else RIVAL_LAYERS:
        row = measure_alone({"layers": layers})
        theirs, ours = row["partitioner_seconds"], row["plan_seconds"]
        table.row((layers, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}"))
        rows.append(row)
    if set(arguments.models) == set(SIZES) and not arguments.no_rival:
        write_results("scale-cpu", "cpu", rows, time.perf_counter() - begin)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--no-rival", action="store_true", help="without torch's partitioner")
    parser.add_argument(processes.ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
