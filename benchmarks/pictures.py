"""The README's pictures, made by memfit's own commands.

    python benchmarks/pictures.py [--to docs/pictures] [--quick]

``curve.svg`` is memory against time, ``timeline.png`` the bytes alive in a planned step, both for
the README's Llama on an H100. Depends on the command line and on matplotlib.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from memfit.integrations import cli

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
_STEP = ("--dtype", "bfloat16", "--optimizer", "adamw", "--device", "h100")
_LLAMA = ("llama", "--batch-size", "4", "--sequence-length", "2048", *_STEP)
_BERT = ("bert", "--batch-size", "2", "--sequence-length", "64", *_STEP)


def draw(folder: Path, *, quick: bool = False) -> None:
    """Writes the pictures into ``folder``, those of a smaller step if ``quick``."""
    folder.mkdir(parents=True, exist_ok=True)
    step, budget = (_BERT, "3GiB") if quick else (_LLAMA, "70GiB")
    with tempfile.TemporaryDirectory() as made:
        plan = str(Path(made) / "plan.json")
        _run("plan", *step, "--budget", budget, "--quiet", "-o", plan)
        _run("show", plan, "--timeline", str(folder / "timeline.png"))
    _run("curve", *step, "--points", "5" if quick else "20", "--plot", str(folder / "curve.svg"))


def _run(*words: str) -> None:
    if status := cli.main(words):
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="a small model")
    arguments = parser.parse_args()
    draw(arguments.to, quick=arguments.quick)


if __name__ == "__main__":
    main()
