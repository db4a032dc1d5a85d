"""The layout rule (folder x/ is imported as memfit.x) and the direction of the imports hold.

Subpackages have to be listed in pyproject.toml, and one that is not listed is missing from the
wheel without a word; the checkers follow symbolic links that nothing else uses. Both would rot.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("solvers", "planner", "integrations")
SOURCES = sorted(
    path
    for folder in (*PACKAGES, "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def read_setuptools() -> dict[str, Any]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = pyproject["tool"]["setuptools"]
    return settings


def package_folders() -> set[str]:
    """Folders of the repository that hold an ``__init__.py``, relative to it."""
    skipped = {"tests", "benchmarks", "examples", "build", "dist"}
    tops = (p for p in ROOT.iterdir() if p.is_dir() and p.name not in skipped)
    return {
        init.parent.relative_to(ROOT).as_posix()
        for top in tops
        if not top.name.startswith(".")
        for init in top.rglob("__init__.py")
    }


def imports(tree: ast.AST, *, at_import_time: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; ``at_import_time`` leaves out those in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction of a dependency"
            # "from memfit import planner" names memfit.planner
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif at_import_time and (is_function(node) or is_for_checkers(node)):
            continue
        else:
            yield from imports(node, at_import_time=at_import_time)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_listed_packages_are_the_folders() -> None:
    settings = read_setuptools()
    expected = {f"memfit.{folder.replace('/', '.')}": folder for folder in package_folders()}
    assert set(settings["packages"]) == set(expected)
    assert settings["package-dir"].items() <= expected.items()
    assert set(PACKAGES) == {folder for folder in expected.values() if "/" not in folder}


def test_files_that_are_no_modules_are_shipped() -> None:
    patterns = read_setuptools()["package-data"]["*"]
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.*"))
    data = [path for path in files if path.suffix not in (".py", ".pyc")]
    assert ROOT / "integrations" / "timeline" / "page.html" in data
    assert not [path for path in data if not any(map(path.match, patterns))]


@pytest.mark.parametrize("package", PACKAGES)
def test_checkers_find_the_package(package: str) -> None:
    link = ROOT / ".links" / "memfit" / package
    assert link.is_symlink()
    assert link.resolve() == ROOT / package
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_bare_imports(path: Path) -> None:
    assert not [name for name in imports(parse(path)) if within(name, *PACKAGES)]


@pytest.mark.parametrize("path", sorted((ROOT / "solvers").rglob("*.py")), ids=named)
def test_solvers_are_pure(path: Path) -> None:
    forbidden = ("torch", "transformers", "memfit.planner", "memfit.integrations")
    assert not [name for name in imports(parse(path)) if within(name, *forbidden)]


@pytest.mark.parametrize("path", sorted((ROOT / "planner").rglob("*.py")), ids=named)
def test_the_planner_knows_no_integrations(path: Path) -> None:
    tree = parse(path)
    assert not [name for name in imports(tree) if within(name, "memfit.integrations")]
    # transformers takes a second to import and is needed only for models that come from it
    eager = imports(tree, at_import_time=True)
    assert not [name for name in eager if within(name, "transformers")]


@pytest.mark.parametrize("module", ["budget", "devices", "errors", "timeline"])
def test_what_reads_no_tensors_does_not_import_torch(module: str) -> None:
    eager = imports(parse(ROOT / "planner" / f"{module}.py"), at_import_time=True)
    assert not [name for name in eager if within(name, "torch")]
