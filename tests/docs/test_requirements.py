"""What has to be installed: all that is imported is asked for, and all of it has one version."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = (ROOT / "constraints.txt").read_text()


def normal(name: str) -> str:
    """A distribution's name as indices compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(requirements: Iterable[str]) -> Iterator[str]:
    """The names in `requirements`; of extras of this project, what they ask for."""
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement)
        assert found, requirement
        if found[1] == PROJECT["name"]:
            for extra in found[2].split(","):
                yield from asked_for(EXTRAS[extra])
        else:
            yield normal(found[1])


def imported(folder: Path) -> dict[str, str]:
    """Other projects' modules that files in `folder` import, and one file that does."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    own = {"activemlp_jax", "configs", "examples"}
    own |= {path.stem for place in (folder, ROOT / "benchmarks") for path in place.rglob("*.py")}
    not_others = own | sys.stdlib_module_names
    return {name: path for name, path in found.items() if name not in not_others}


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
def test_what_is_imported_is_asked_for_by_name(folder: str, extras: Iterable[str]):
    wanted = (requirement for extra in extras for requirement in EXTRAS[extra])
    names = {*asked_for(PROJECT["dependencies"]), *asked_for(wanted)}
    by_module = packages_distributions()
    missing = {
        module: path
        for module, path in imported(ROOT / folder).items()
        if not names & {normal(name) for name in by_module.get(module, ())}
    }
    assert not missing


def test_what_the_tests_need_is_pinned():
    pinned = {normal(name) for name in re.findall(r"^([\w.-]+)==", PINNED, re.MULTILINE)}
    names = {*asked_for(PROJECT["dependencies"]), *asked_for(EXTRAS["test"])}
    assert not names - pinned
