"""The command line: ``memfit COMMAND``, each of which is a file of ``commands``.

What a command makes is JSON on stdout or in a file; what is meant for people (tables beside it,
progress, errors) goes to stderr, so that stdout can be piped. What needs no model, and every
``--help``, works without torch and transformers. Depends on the commands.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from memfit.integrations.commands import check, curve, doctor, explain, fit, plan, show, solve
from memfit.integrations.commands.arguments import DONE, INFEASIBLE, UNUSABLE, Parser
from memfit.integrations.terminal import red
from memfit.planner.errors import InfeasibleBudget, MemfitError

COMMANDS = (plan, fit, curve, show, explain, check, solve, doctor)
# What a shell reports for a process that SIGINT or SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141

_EXAMPLES = """\
examples:
  memfit plan bert --budget 2GiB --batch-size 8 --sequence-length 128 \\
      --device cpu -o plan.json
  memfit plan ./my-model --budget 24GiB --batch-size 8 --sequence-length 2048 \\
      --dtype bfloat16 --optimizer adamw --device h100 > plan.json
  memfit fit llama --budget 24GiB --dtype bfloat16 --device rtx4090
  memfit curve bert --batch-size 16 --device a10g --plot curve.png
  memfit show plan.json
  memfit explain plan.json
  memfit check plan.json ./my-model --max-peak 24GiB
  memfit solve problem.json --solver greedy --budget 20GiB
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more as it ends, and must not find the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (MemfitError, OSError) as error:
        if "--debug" in words:
            traceback.print_exc()
        said = red("memfit: error:", sys.stderr)
        print(f"{said} {' '.join(str(error).split())}", file=sys.stderr)
        return INFEASIBLE if isinstance(error, InfeasibleBudget) else UNUSABLE


def _run(words: Sequence[str]) -> int:
    parser = _make_parser()
    options = parser.parse_args(_spelled(words))
    if options.command is None:
        parser.print_help(sys.stderr)
        return UNUSABLE
    status: int | None = options.run(options)
    sys.stdout.flush()  # a closed pipe shows here, not after the exit status is settled
    return DONE if status is None else status


def _spelled(words: Sequence[str]) -> list[str]:
    """``words`` as the parser knows them: ``--batch_size`` is ``--batch-size``.

    A number below zero is tied to its flag, because ``-5GiB`` alone reads as a flag of its own.
    """
    spelled: list[str] = []
    for word in words:
        if re.match(r"-\.?\d", word) and spelled and spelled[-1].startswith("--"):
            spelled[-1] += f"={word}"
        elif word.startswith("--"):
            flag, *value = word.split("=", 1)
            spelled.append("=".join([flag.replace("_", "-"), *value]))
        else:
            spelled.append(word)
    return spelled


def _make_parser() -> Parser:
    parser = Parser(
        prog="memfit",
        description="Plans a training step into a memory budget in bytes: which activations to\n"
        "keep, and which to recompute.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"memfit {version('memfit')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser
