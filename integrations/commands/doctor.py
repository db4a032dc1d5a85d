"""``memfit doctor``: says whether plans can be made on this machine, and what is missing.

Depends on the environment, which imports torch and transformers if it can.
"""

import argparse
import sys

from memfit.integrations.commands.arguments import (
    DONE,
    UNUSABLE,
    Commands,
    add_debug,
    add_json,
    write_json,
)
from memfit.integrations.environment import Environment, FoundDevice, Package, find_environment
from memfit.integrations.progress import Progress, hushed
from memfit.integrations.terminal import red
from memfit.planner.budget import format_bytes
from memfit.planner.report import wrapped
from memfit.solvers.records import encode

SCHEMA = "memfit.doctor/1"


def add(commands: Commands) -> None:
    """Tells the parser of the command."""
    parser = commands.add_parser(
        "doctor",
        help="say whether memfit can work here, and what is missing",
        description="Looks for the packages, devices and solvers that memfit uses, and names the\n"
        "command that installs what is missing.",
        epilog="exit status: 0 plans can be made here, 2 something needed is missing.\n",
    )
    parser.set_defaults(run=run)
    add_json(parser, "what is found")
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Prints what is found."""
    with Progress(quiet=False) as progress, hushed(options.debug):
        progress.begin("importing what is installed")
        found = find_environment()
    problems = found.problems
    if options.json:
        write_json(SCHEMA, {"ready": not problems, "problems": problems} | encode(found))
    else:
        sys.stdout.write(_format(found, problems))
    return UNUSABLE if problems else DONE


def _format(found: Environment, problems: list[str]) -> str:
    rows = [("python", f"{found.python} on {found.platform}")]
    rows += [(package.name, _package(package)) for package in found.packages]
    rows += [("device", _device(device)) for device in found.devices]
    rows += [("solver", f"{s.name} {s.problem or 'solves'}") for s in found.solvers]
    width = max(len(name) for name, _ in rows) + 2
    lines = [wrapped(f"{name:{width}}", text) for name, text in rows]
    if problems:
        verdict = [red("plans cannot be made here:", sys.stdout)]
        verdict += [wrapped("- ", problem) for problem in problems]
    else:
        verdict = ["plans can be made here"]
    return "\n".join([*lines, "", *verdict]) + "\n"


def _package(package: Package) -> str:
    said = [package.version, package.problem]
    if not package.needed and package.problem:
        said.append(f"(optional: {package.remedy})")
    return " ".join(filter(None, said))


def _device(device: FoundDevice) -> str:
    text = device.name
    if device.free_bytes is not None and device.total_bytes is not None:
        text += f", {format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
    if device.known_as not in (None, device.name):
        text += f", {device.known_as} in memfit's table"
    return f"{text}; {device.problem}" if device.problem else text
