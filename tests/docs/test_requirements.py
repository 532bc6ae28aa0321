"""The requirements in pyproject.toml cover all imports, and constraints.txt pins all of them."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions

import pytest
from processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("benchmarks", "tests")
OWN = {"activemlp_jax", "configs", "examples"}
OWN |= {path.stem for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def normal(name: str) -> str:
    """Normalize the name of a distribution as package indices do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(*extras: str) -> set[str]:
    """Return the names of this project's requirements, including those of `extras`."""
    names: set[str] = set()
    for requirement in [*PROJECT["dependencies"], *(r for extra in extras for r in EXTRAS[extra])]:
        name, others = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()
        names |= distributions(*others.split(",")) if name == PROJECT["name"] else {normal(name)}
    return names


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("activemlp_jax", EXTRAS),
        ("benchmarks", ("torch",)),
        ("configs", ()),
        ("examples", ()),
        ("tests", ("test",)),
    ],
)
def test_imported_packages_are_required(folder: str, extras: Iterable[str]):
    imported: dict[str, str] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    required, by_module = distributions(*extras), packages_distributions()
    missing = {
        module: path
        for module, path in imported.items()
        if module not in OWN | sys.stdlib_module_names
        and not required & {normal(name) for name in by_module.get(module, ())}
    }
    assert not missing


def test_requirements_of_the_tests_are_pinned():
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert not distributions("test") - set(map(normal, pinned))
