"""The documentation agrees with the code: commands, links, Python, messages, public names."""

import ast
import contextlib
import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock, create_autospec, patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import yaml
from commands import run_main
from documents import INLINE, PAGES, ROOT, Passage, anchors, commands, fences, links
from rich.console import Console
from small_models import BACKBONE, save_classifier, save_photos, save_segmentor

import activemlp_jax as am
from activemlp_jax import compile_check
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.training import cli_flags, loop
from activemlp_jax.training.config import check_config
from activemlp_jax.utils.errors import UserError

COMMANDS = [found for page in PAGES for found in commands(page)]
LINKS = [found for page in PAGES for found in links(page)]
PYTHON = [  # but the signatures in api.md
    fence
    for page in PAGES
    for fence in fences(page)
    if fence.language == "python" and page.name != "api.md"
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_FOLDERS = ("benchmarks/", "configs/", "docs/", "examples/", "tests/")


class AcceptedError(Exception):
    """Raised where a program has parsed its command line and would begin to work."""


def parse(program: Callable[[], object], *arguments: str) -> None:
    """Run a command until its own parser has accepted its arguments; raise if it refuses them."""
    parse_args, parse_arguments = ArgumentParser.parse_args, cli_flags.parse_arguments

    def accept(parser: ArgumentParser) -> None:
        parse_args(parser)
        raise AcceptedError

    def accept_config(*arguments: Any) -> None:
        check_config(parse_arguments(*arguments)[1])
        raise AcceptedError

    with (
        contextlib.suppress(AcceptedError),
        contextlib.chdir(ROOT),
        patch.object(ArgumentParser, "parse_args", accept),
        patch.object(cli_flags, "parse_arguments", accept_config),
        patch.object(compile_check, "parse_arguments", accept_config),
        patch.object(cli_flags, "keep_freed_memory"),
    ):
        result = run_main(program, *arguments)
        assert result.returncode == 0, result.stderr
        assert "--help" in arguments, "the command parses nothing"


def check_command(words: list[str], has_arguments: bool = True) -> None:
    """Raise if a command of the documentation would not be accepted."""
    program, *rest = words
    for path in (path for word in rest for path in word.rpartition("=")[2].split()):
        file = path.partition(":")[0]  # a config may have a variant
        assert not file.startswith(OWN_FOLDERS) or (ROOT / file).exists(), f"there is no {path}"
    if program.endswith("make"):
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program.endswith("pip"):
        extras = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(rest))).split(",")
        assert {*extras} <= {"", *PROJECT["optional-dependencies"]}
        assert rest.count("-c") == rest.count("constraints.txt")
    elif rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
        if rest[1].startswith(am.__name__) and has_arguments:
            is_package = importlib.util.find_spec(rest[1]).submodule_search_locations is not None
            module = f"{rest[1]}.__main__" if is_package else rest[1]
            parse(importlib.import_module(module).main, *rest[2:])
    else:
        script = ROOT / rest[0]
        compile(script.read_text(), script, "exec")
        if "sys.argv" not in script.read_text() and has_arguments:
            parse(lambda: runpy.run_path(str(script), run_name="__main__"), *rest[1:])


def short(value: object) -> str:
    return str(value)[:70] if isinstance(value, Passage) else ""


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=short)
def test_every_command_is_accepted_by_its_own_parser(place: Passage, words: list[str]):
    is_name = place.language == INLINE and len(words) == 2 + (words[1:2] == ["-m"])
    try:
        check_command(words, has_arguments=not is_name)
    except (Exception, SystemExit) as error:
        pytest.fail(f"{place}\n{error!r}", pytrace=False)


@pytest.mark.parametrize(
    "words",
    [
        "python -m activemlp_jax.evaluate models/tiny --data digits --batchsize 8",
        "python train.py --config.batchsize=8",
        "python -m activemlp_jax.compile_check --config configs/digits.py --chips 8",
        "make everything",
        "pip install -e .[everything]",
    ],
)
def test_a_command_that_is_not_accepted_is_found(words: str):
    refusals = (AssertionError, OSError, SystemExit, UserError, subprocess.CalledProcessError)
    with pytest.raises(refusals):
        check_command(words.split())


@pytest.mark.parametrize("link", LINKS, ids=short)
def test_every_link_leads_somewhere(link: Passage):
    if link.text.startswith(("https://", "http://")):
        return
    path, _, anchor = link.text.partition("#")
    target = (link.page.parent / path).resolve() if path else link.page
    assert target.exists(), f"{link} is not there"
    assert target.is_relative_to(ROOT), f"{link} is outside of the project"
    if anchor:
        assert anchor in anchors(target), f"{link} has no such heading"


@pytest.mark.parametrize("fence", PYTHON, ids=short)
def test_python_in_pages_compiles_and_imports_what_is_there(fence: Passage):
    for node in ast.walk(ast.parse(fence.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(am.__name__):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"no {node.module}.{alias.name}"


@pytest.fixture(scope="module")
def place_of_a_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files that the pages name, as small as possible."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("runs/digits/model", "models/active_tiny"):
        save_classifier(place / name)
    save_segmentor(place / "models" / "scenes")
    shutil.copy(ROOT / "tests" / "fixtures" / "micro_checkpoint.pth", place / "activemlp_tiny.pth")
    save_photos(place, "photo.jpg", "holiday/1.jpg", "digits/3.png")
    return place


@pytest.fixture
def shapes_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make networks return zeros of the right shapes, so that nothing is compiled for them."""

    def give_zeros(method: Callable[..., Any]) -> Callable[..., Any]:
        def give(module: nn.Module, *arrays: Any, **options: Any) -> Any:
            found = jax.eval_shape(partial(method, module, **options), *arrays)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)

        return give

    for name in ("init", "apply"):
        monkeypatch.setattr(nn.Module, name, give_zeros(getattr(nn.Module, name)))
    yield
    jax.clear_caches()  # or later tests would run what was traced with zeros


WANDB: Any = ModuleType("wandb")  # is not installed
WANDB.init, WANDB.log = Mock(), Mock()


def track_a_step(config: object, workdir: Path, console: Console, *, trackers: Any) -> None:
    """Replace training, which other tests do: pass a record to each tracker."""
    check_config(config)
    assert isinstance(workdir, Path)
    assert isinstance(console, Console)
    for tracker in trackers:
        tracker({"step": 1, "loss": 2.3})


@pytest.mark.usefixtures("shapes_alone")
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/converting.md",
        "docs/faq.md",
        "docs/from_timm.md",
        "docs/segmentation.md",
        "docs/training.md",
    ],
)
def test_python_in_pages_runs(page: str, place_of_a_reader: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place_of_a_reader)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setitem(VARIANTS, "active_tiny", BACKBONE)
    monkeypatch.setitem(sys.modules, "wandb", WANDB)
    monkeypatch.setattr(loop, "train", create_autospec(loop.train, side_effect=track_a_step))
    names: dict[str, Any] = {}
    for fence in PYTHON:
        if fence.page == ROOT / page:
            lines = "\n" * (fence.line - 1)  # so that errors have the numbers of the page
            exec(compile(lines + fence.text, page, "exec"), names)


def message_templates() -> list[re.Pattern[str]]:
    """Return patterns of the package's long strings, with any values and a name before them."""
    found = []
    for path in (ROOT / am.__name__).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= 24:
                filled = (re.escape(text) if isinstance(text, str) else ".*" for text in texts)
                found.append(re.compile(f"(?:[^:]+: |\\S+ )?(?:{''.join(filled)})"))
    return found


def test_every_message_explained_is_one_that_the_package_has():
    templates = message_templates()
    messages = [fence for fence in fences(ROOT / "docs" / "faq.md") if fence.language == "text"]
    assert len(messages) > 15
    for message in messages:
        found = any(template.fullmatch(message.text.strip()) for template in templates)
        assert found, f"no such message: {message}"


def test_every_room_is_in_the_architecture_page():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in (ROOT / am.__name__).glob("*/__init__.py"):
        assert f"{file.parent.name}/" in text, file.parent


def test_the_api_page_is_what_the_docstrings_make():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    is_new = (ROOT / "docs" / "api.md").read_text() == page
    assert is_new, "docs/api.md is out of date: run `python docs/make_api.py`"


@pytest.mark.parametrize("name", am.__all__)
def test_every_parameter_of_a_public_name_is_explained(name: str):
    thing = getattr(am, name)
    parameters = [*inspect.signature(thing).parameters]
    if inspect.isclass(thing):
        parameters = [field for field in parameters if field not in ("parent", "name")]  # linen's
    _, _, explained = inspect.cleandoc(thing.__doc__).partition("Args:\n")
    items = re.findall(r"^  (\w+): ", explained.partition("\n\n")[0], re.MULTILINE)
    assert items == parameters


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"\n## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
