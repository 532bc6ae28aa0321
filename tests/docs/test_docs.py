"""What the documentation says can be done as it says: commands, links, code, messages."""

import ast
import builtins
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock, create_autospec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from documents import INLINE, PAGES, ROOT, Passage, anchors, commands, fences, links
from rich.console import Console
from small_models import BACKBONE, save_classifier, save_photos, save_segmentor

import activemlp_jax as am
from activemlp_jax import compile_check
from activemlp_jax.data.segmentation_sources import open_scenes
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.training import cli_flags, loop
from activemlp_jax.training.config import check_config
from activemlp_jax.utils.errors import UserError

COMMANDS = [found for page in PAGES for found in commands(page)]
LINKS = [found for page in PAGES for found in links(page)]
PYTHON = [fence for page in PAGES for fence in fences(page) if fence.language == "python"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_FOLDERS = ("configs/", "docs/", "examples/", "tests/")  # what is named in them is there
PIP_OPTIONS = {"-c", "-e", "-q", "--extra-index-url"}


class AcceptedError(Exception):
    """Raised where a program has parsed its command line and would begin to work."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a program, given as a function, as far as to where its own parser is content."""
    parse_args, parse_arguments = ArgumentParser.parse_args, cli_flags.parse_arguments

    def parse(parser: ArgumentParser) -> None:
        parse_args(parser)
        raise AcceptedError

    def parse_with_config(*arguments: Any) -> None:
        check_config(parse_arguments(*arguments)[1])
        raise AcceptedError

    def run(program: Callable[[], object], name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            program()
        except AcceptedError:
            return
        except SystemExit:
            if "--help" in arguments:
                return
            raise
        raise AssertionError(f"{name} parses nothing")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    for module in (cli_flags, compile_check):
        monkeypatch.setattr(module, "parse_arguments", parse_with_config)
    monkeypatch.setattr(cli_flags, "keep_freed_memory", lambda: None)  # for the whole process
    return run


def check_pip(arguments: list[str]) -> None:
    """That the options and extras are there which `pip install` is given."""
    assert arguments[:1] == ["install"]
    assert {word for word in arguments if word.startswith("-")} <= PIP_OPTIONS
    for word in arguments:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"]), word
    if "-c" in arguments:
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()


def check_command(words: list[str], parse: Callable[..., None], has_arguments: bool) -> None:
    """Raises if a command of the documentation would not be accepted."""
    program, *rest = words
    for path in (path for word in rest for path in word.rpartition("=")[2].split()):
        file = path.partition(":")[0]  # a config may have a variant
        assert not file.startswith(OWN_FOLDERS) or (ROOT / file).exists(), f"there is no {path}"
    if program.endswith("make"):
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program.endswith("pip"):
        check_pip(rest)
    elif rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
        if rest[1].startswith(am.__name__) and has_arguments:
            is_package = importlib.util.find_spec(rest[1]).submodule_search_locations is not None
            module = f"{rest[1]}.__main__" if is_package else rest[1]
            parse(importlib.import_module(module).main, *rest[1:])
    else:
        script = ROOT / rest[0]
        compile(script.read_text(), script, "exec")
        if "sys.argv" not in script.read_text() and has_arguments:
            parse(lambda: runpy.run_path(str(script), run_name="__main__"), *rest)


def short(value: object) -> str:
    return str(value)[:70] if isinstance(value, Passage) else ""


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=short)
def test_every_command_is_accepted_by_its_own_parser(
    place: Passage, words: list[str], parse: Any, capsys: pytest.CaptureFixture[str]
):
    is_name = place.language == INLINE and len(words) == 2 + (words[1:2] == ["-m"])
    try:
        check_command(words, parse, has_arguments=not is_name)
    except (Exception, SystemExit) as error:
        said = [*capsys.readouterr().err.splitlines(), repr(error)]
        pytest.fail(f"{place}\n{said[-2 if isinstance(error, SystemExit) else -1]}", pytrace=False)


@pytest.mark.parametrize(
    "words",
    [
        "python -m activemlp_jax.evaluate models/tiny --data digits --batchsize 8",
        "python -m activemlp_jax.evaluate models/tiny",
        "python -m activemlp_jax.nothing",
        "python nothing.py",
        "python train.py --config configs/nothing.py",
        "python train.py --config.batchsize=8",
        "python train.py --config.batch_size=many",
        "python train.py --config.batch_size=0",
        "python train.py --folder runs/a",
        "python -m activemlp_jax.compile_check --config configs/digits.py --chips 8",
        "python examples/draw_letters.py",
        "make everything",
        "pip install -e .[everything]",
        "pip install -c limits.txt -e .",
        "pip install --everything -e .",
    ],
)
def test_a_command_that_is_not_accepted_is_found(words: str, parse: Any):
    refusals = (AssertionError, OSError, SystemExit, UserError, subprocess.CalledProcessError)
    with pytest.raises(refusals):
        check_command(words.split(), parse, has_arguments=True)


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


def names_in(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The names that some code gives a meaning to, and those that it uses."""
    bound, used = set(dir(builtins)), set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.partition(".")[0])
    return bound, used


@pytest.mark.parametrize("fence", PYTHON, ids=lambda fence: str(fence).split(": ")[0])
def test_python_in_pages_compiles_and_uses_what_is_there(fence: Passage):
    if fence.page.name == "api.md":
        return  # signatures
    tree = ast.parse(fence.text)
    read = [other for other in PYTHON if other.page == fence.page and other.line <= fence.line]
    bound, used = names_in(ast.parse("".join(other.text for other in read)))
    assert not used - bound, f"{fence.page}: {used - bound} is nowhere before"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(am.__name__):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{fence.page}: no {node.module}.{name.name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "am":
            assert node.attr in am.__all__, f"{fence.page}: am.{node.attr} is not public"


@pytest.fixture(scope="module")
def place_of_a_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which what the pages name is there, as small as possible."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("runs/digits/model", "models/active_tiny"):
        save_classifier(place / name)
    save_segmentor(place / "models" / "scenes")
    shutil.copy(ROOT / "tests" / "fixtures" / "micro_checkpoint.pth", place / "activemlp_tiny.pth")
    save_photos(place, "photo.jpg", "holiday/1.jpg", "digits/3.png")
    return place


@pytest.fixture
def shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks find the shapes of their results, and give zeros: nothing is compiled for them."""

    def give_zeros(method: Callable[..., Any]) -> Callable[..., Any]:
        def give(module: nn.Module, *arrays: Any, **options: Any) -> Any:
            found = jax.eval_shape(partial(method, module, **options), *arrays)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)

        return give

    for name in ("init", "apply"):
        monkeypatch.setattr(nn.Module, name, give_zeros(getattr(nn.Module, name)))


WANDB: Any = ModuleType("wandb")  # is not installed
WANDB.init, WANDB.log = Mock(), Mock()


def track_a_step(config: object, workdir: Path, console: Console, *, trackers: Any) -> None:
    """In place of training, which other tests do: a record to each tracker."""
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
    """Patterns of all long texts of the package; what they are filled with may be anything.

    Before them there may be the name of what they are about, as many errors are handed on.
    """
    found = []
    for path in (ROOT / am.__name__).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= 24:
                filled = (re.escape(text) if isinstance(text, str) else ".*" for text in texts)
                found.append(re.compile(f"(?:[^:]+: )?(?:{''.join(filled)})"))
    return found


def test_every_message_explained_is_one_that_the_package_has():
    templates = message_templates()
    messages = [fence for fence in fences(ROOT / "docs" / "faq.md") if fence.language == "text"]
    assert len(messages) > 15
    for message in messages:
        found = any(template.fullmatch(message.text.strip()) for template in templates)
        assert found, f"no such message: {message}"


def test_every_file_of_the_package_has_its_place_in_the_table_of_rooms():
    text, package = (ROOT / "docs" / "architecture.md").read_text(), ROOT / "activemlp_jax"
    for file in package.rglob("*.py"):
        path = file.relative_to(package)
        rooms = {path.as_posix(), *(f"{parent.as_posix()}/" for parent in path.parents)}
        named = any(f"`{room}`" in text for room in rooms)
        assert named or path.name == "__init__.py", f"{path} is not in docs/architecture.md"


@pytest.mark.parametrize(
    ("status", "queued"),
    [(0, ""), (1, ""), (143, "requeue 7\n")],
    ids=["done", "failed", "stopped"],
)
def test_the_script_for_slurm_starts_training_and_queues_again_where_it_was_stopped(
    status: int, queued: str, tmp_path: Path, parse: Any
):
    stand_ins = {"srun": f'printf "%s\\n" "$@" > words; exit {status}', "scontrol": 'echo "$@"'}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "7", "HOME": str(tmp_path)}
    chosen = ["--config", "configs/active_tiny.py", "--workdir", "runs/with spaces"]
    result = subprocess.run(
        ["bash", ROOT / "examples" / "train.sbatch", *chosen],
        cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (status, queued, "")
    option, *words = (tmp_path / "words").read_text().splitlines()
    assert option == "--cpus-per-task=12"
    assert words[2:6] == chosen
    check_command(words, parse, has_arguments=True)


def test_the_citation_is_of_this_version_and_of_the_paper():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0"
    assert content["message"]
    assert content["type"] == "software"
    for field, key in (("title", "name"), ("version", "version"), ("license", "license")):
        assert content[field] == PROJECT[key]
    assert content["authors"] == [{"name": "The activemlp-jax authors"}]
    paper = content["preferred-citation"]
    assert (paper["type"], paper["title"]) == ("conference-paper", "Active Token Mixer")
    assert (paper["year"], paper["url"]) == (2023, "https://arxiv.org/abs/2203.06108")
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert names == ["Guoqiang Wei", "Zhizheng Zhang", "Cuiling Lan", "Yan Lu", "Zhibo Chen"]


def test_the_changelog_has_this_version_and_what_comes_after():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings
    assert headings[1:] == sorted(headings[1:], reverse=True)


def test_drawn_shapes_are_scenes_with_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["draw_shapes.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "draw_shapes.py"), run_name="__main__")
    for split, count in (("train", 240), ("val", 40)):
        source = open_scenes(f"folder:{tmp_path}", split)
        assert (len(source), source.class_names[0]) == (count, "background")
        shares = np.mean([np.bincount(source[i].label.ravel(), minlength=4) for i in range(40)], 0)
        assert (shares > 100).all(), f"pixels of each class: {shares}"


def test_a_detector_on_the_pyramid_has_a_box_around_every_place(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.syspath_prepend(ROOT)
    from examples.feature_pyramid import STRIDES, Detector, centers

    model, detector = am.ActiveMLP(**BACKBONE), Detector(num_classes=3, channels=8)
    images = jax.ShapeDtypeStruct((2, 70, 94, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    shapes = jax.eval_shape(partial(model.apply, method="features"), variables, images)
    rest = jax.eval_shape(detector.init, jax.random.key(0), shapes)
    rng = np.random.default_rng(0)
    rest, maps = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) / 9).astype(np.float32), (rest, shapes)
    )

    scores, boxes = map(np.asarray, jax.jit(detector.apply)(rest, maps))
    sides = [leaf.shape[1:3] for leaf in maps[1:]]
    sides += [(2, 2), (1, 1)]  # half of the last map's, and half of that, rounded up
    places = [centers(np.zeros((1, *side, 1)), s) for side, s in zip(sides, STRIDES, strict=True)]
    x, y = np.concatenate(places).T
    assert places[0].max(0).tolist() == [92, 68], "the last place of P3 in an image of 94 x 70"
    assert scores.shape == (2, len(x), 3)
    assert boxes.shape == (2, len(x), 4)
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    for first, middle, last in ((left, x[None], right), (top, y[None], bottom)):
        assert (first < middle).all()
        assert (middle < last).all()
