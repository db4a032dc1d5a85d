"""What the commands have in common: how their arguments read, what is built from them and printed.

Depends on the solvers' names, the device table and the plan document; torch is imported when a
model is built.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeAlias

from memfit.integrations.terminal import red
from memfit.planner.budget import parse_budget
from memfit.planner.devices import DEVICES
from memfit.planner.document import Plan
from memfit.planner.errors import MemfitError
from memfit.planner.report import OVER, format_plan
from memfit.solvers import SOLVERS

if TYPE_CHECKING:
    from torch import nn

    from memfit.planner import Batch

# Exit statuses of every command.
DONE, UNUSABLE, INFEASIBLE = 0, 2, 3


class UsageError(MemfitError, ValueError):
    """The command line cannot be understood or cannot be done."""


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": layout, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_model(parser: Parser) -> None:
    """MODEL, as the commands that build one take it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="local directory, config.json, model type such as bert or llama, or hub id",
    )


def add_budget(parser: Parser) -> None:
    """``--budget``, of the commands that need one."""
    parser.add_argument(
        "--budget",
        required=True,
        metavar="BYTES",
        help="peak of all device memory in a step: 24GiB (2**30 each), 24GB (10**9), bytes, or "
        "auto for what the GPU has free",
    )


def check_budget(options: argparse.Namespace) -> None:
    """Refuses a budget that cannot be read before a model is built, not after."""
    if options.budget != "auto":
        parse_budget(options.budget)


def add_plan_file(parser: Parser) -> None:
    """PLAN, as the commands that read one take it."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file")


def build_model(
    options: argparse.Namespace, *, dtype: str | None = None, class_name: str | None = None
) -> "nn.Module":
    """The model that the arguments name, on meta; ``dtype`` and the class where they do not."""
    from memfit.integrations import models

    model = models.build_model(
        options.model,
        task=options.task,
        dtype=options.dtype or dtype,
        trust_remote_code=options.trust_remote_code,
        class_name=None if options.lora else class_name,  # PEFT's class is not the model's own
    )
    if options.lora is None:
        return model
    from memfit.integrations.adapters import add_lora

    rank, targets = options.lora
    return add_lora(model, rank, targets)


def make_batch(options: argparse.Namespace) -> "Batch | None":
    """The batch that the arguments describe; None for the default one."""
    from memfit.planner import Batch

    if options.batch_size is None and options.sequence_length is None:
        return None
    size = 1 if options.batch_size is None else options.batch_size
    return Batch(size=size, length=options.sequence_length)


def step_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of the training step, as ``prepare`` and ``plan`` take it."""
    names = "optimizer device costs selective keep_outputs keep_gradients max_grad_norm autocast"
    names += " sharding world_size wrap reshard_after_forward param_dtype reduce_dtype"
    return {name: getattr(options, name) for name in names.split()}


def check_writable(path: Path) -> None:
    """Refuses what a plan cannot be written to, before the work begins."""
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no directory {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is not a file; name one, such as plan.json")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: no permission to write in {path.parent}")


def add_class(group: argparse._ArgumentGroup | Parser, default: str = "the config's own") -> None:
    """What MODEL is built as; ``default`` says what it is where the arguments do not."""
    group.add_argument(
        "--dtype", metavar="NAME", help=f"dtype of the weights, such as bfloat16 ({default})"
    )
    group.add_argument("--task", metavar="NAME", help=f"causal-lm, masked-lm, ... ({default})")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the config"
    )
    group.add_argument(
        "--lora",
        type=_lora,
        metavar="r=RANK",
        help="train LoRA adapters only, made by peft; r=16,targets=q_proj+v_proj names their "
        "modules, targets=all-linear all (PEFT's choice for the model type)",
    )


def add_workload(parser: Parser) -> None:
    """The training step, but for the model."""
    group = parser.add_argument_group("the training step")
    group.add_argument("--batch-size", type=int, metavar="N", help="examples in a batch (1)")
    group.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens in an example (from the config)"
    )
    add_class(group)
    group.add_argument(
        "--optimizer", metavar="NAME", help="adamw, sgd, ... (none: forward and backward only)"
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help=f"cuda (the GPU of this machine) or one of {', '.join(DEVICES)}",
    )
    group.add_argument(
        "--keep-outputs",
        action="store_true",
        help="plan for a loop that holds the model's outputs during the backward",
    )
    group.add_argument(
        "--keep-gradients",
        action="store_true",
        help="plan for a step that adds to the gradients of earlier ones (accumulation)",
    )
    group.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="NORM",
        help="gradients are clipped to this norm before the optimizer step",
    )
    group.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="the forward runs under torch.autocast with this dtype",
    )
    group.add_argument(
        "--sharding",
        choices=("ddp", "fsdp2"),
        help="how the step is spread over processes; batch and budget are those of one",
    )
    group.add_argument("--world-size", type=int, default=1, metavar="N", help="processes (1)")
    group.add_argument(
        "--wrap",
        action="append",
        metavar="CLASS",
        help="class of the layers that FSDP2 shards, or the name of a module: 'model.norm', "
        "'model.norm+lm_head' for two together, 'model.norm:whole' for what is not resharded",
    )
    group.add_argument(
        "--reshard-after-forward",
        action=argparse.BooleanOptionalAction,
        help="what FSDP2's fully_shard is told (by default it reshards all but the model's own)",
    )
    for what, text in (
        ("param", "FSDP2 gathers parameters in this dtype (param_dtype of its policy)"),
        ("reduce", "FSDP2 reduces gradients in this dtype"),
    ):
        group.add_argument(f"--{what}-dtype", choices=("bfloat16", "float16", "float32"), help=text)
    group.add_argument(
        "--costs",
        choices=("auto", "measured", "roofline"),
        default="auto",
        help="seconds from timing every distinct op on the device, or from the device table; auto: "
        "measured if the device is here",
    )
    group.add_argument(
        "--selective",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute op by op within regions too (default), or regions whole only",
    )


def add_solver(group: argparse._ArgumentGroup | Parser) -> None:
    """Which solver, and when it may stop."""
    group.add_argument(
        "--solver",
        choices=tuple(SOLVERS),
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(SOLVERS)} (auto)",
    )
    group.add_argument(
        "--gap",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="stop once the plan is proved to be this close to the best (0)",
    )
    group.add_argument(
        "--time-limit",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="stop with the best plan found after this long (20)",
    )


def add_json(parser: Parser, what: str) -> None:
    """``--json``, for commands whose product is a table."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def write_json(schema: str, value: Mapping[str, Any]) -> None:
    """``value`` on stdout, as a document that says what it is."""
    sys.stdout.write(json.dumps({"schema": schema} | dict(value), indent=2) + "\n")


def write_table(plan: Plan, stream: TextIO) -> None:
    """The table of a plan, with what is over the budget in red on a terminal."""
    stream.write(format_plan(plan).replace(OVER, red(OVER, stream)))


def add_debug(parser: Parser) -> None:
    """``--debug``, which every command has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _lora(text: str) -> tuple[int, tuple[str, ...]]:
    """Rank and targets of ``r=16,targets=q_proj+v_proj``."""
    found = re.fullmatch(r"r=([1-9]\d*)(?:,targets=([^+,\s]+(?:\+[^+,\s]+)*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rank such as r=16, or r=16,targets=q_proj+v_proj"
        )
    return int(found[1]), tuple(found[2].split("+")) if found[2] else ()


def whole_number(text: str, least: int) -> int:
    """Reads an argument that counts something, ``least`` of it or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} up")
    return int(text)


def _share(text: str) -> float:
    return _number(text, lambda share: 0 <= share < 1, "a number from 0 to below 1")


def _seconds(text: str) -> float:
    return _number(text, lambda seconds: seconds > 0, "a number of seconds above 0")


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):  # no comparison is true of nan
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
