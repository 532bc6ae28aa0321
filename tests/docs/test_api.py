"""The public names: each is documented as docs/api.md shows it, and that page is up to date."""

import ast
import builtins
import inspect
import runpy
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import pytest
from documents import ROOT

import activemlp_jax as am
from activemlp_jax.utils import errors

API = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
ARRAYS = ("Array", "ArrayLike", "ndarray")
# What neither the paper nor an original has.
OUR_OWN = {
    "BlockOffsets", "ClassProbability", "ModelCard", "ModelCard.from_json", "ModelCard.to_json",
    "Protocol.describe", "Protocol.stride", "classify", "draw_offsets", "embed_images",
    "list_models", "load_pretrained", "read_card",
}  # fmt: skip
NEVER_RAISE = {
    "BlockOffsets", "ClassProbability", "ModelCard", "ModelCard.to_json", "Protocol.describe",
    "Protocol.stride", "list_models",
}  # fmt: skip


def members(thing: Any) -> dict[str, Any]:
    """The public methods and properties of a class, but linen's `setup`, as functions."""
    found = {}
    for name, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType) and not name.startswith("_"):
            found[name] = function
    found.pop("setup", None)
    return found


PUBLIC = {name: getattr(am, name) for name in am.__all__}
CLASSES_OF_THEIRS = API["results"](iter(PUBLIC.values()))
MEMBERS = {
    f"{name}.{member}": function
    for name, thing in (PUBLIC | CLASSES_OF_THEIRS).items()
    for member, function in members(thing).items()
}
DOCUMENTED = PUBLIC | CLASSES_OF_THEIRS | MEMBERS


def is_property(name: str) -> bool:
    thing, _, member = name.partition(".")
    return bool(member) and isinstance(vars(DOCUMENTED[thing])[member], property)


CALLED = [name for name in DOCUMENTED if not is_property(name)]


def test_the_page_is_what_the_docstrings_make():
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == API["page"](), "docs/api.md is out of date: run `python docs/make_api.py`"
    for name in PUBLIC | CLASSES_OF_THEIRS:
        assert f"\n### `{name}`\n" in page
    for name in MEMBERS:
        assert f"\n.{name.partition('.')[2]}" in page


def sections(name: str) -> dict[str, str]:
    return API["sections"](DOCUMENTED[name].__doc__ or "")


def tree(name: str) -> Any:
    """The syntax tree of the definition of a name."""
    return ast.parse(textwrap.dedent(inspect.getsource(DOCUMENTED[name]))).body[0]


def parameters(name: str) -> dict[str, str]:
    """Names of parameters, of a class those of its fields, and how their types are written."""
    node = tree(name)
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    found = [*node.args.args, *node.args.kwonlyargs]
    own = found[name in MEMBERS :]  # neither self nor cls
    return {argument.arg: ast.unparse(argument.annotation) for argument in own}


def result(name: str) -> str:
    """How the type of what a function gives is written; '' of a class, None or the own class."""
    node = tree(name)
    kind = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.returns).strip("'\"")
    return "" if kind in ("None", name.partition(".")[0]) else kind


def raised(name: str) -> set[type]:
    """The errors of `raise` statements, of a class in all methods but documented ones."""

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if f"{name}.{getattr(child, 'name', '')}" not in MEMBERS:
                yield from nodes(child)

    found = set()
    for node in nodes(tree(name)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = ast.unparse(node.exc.func)
            found.add(getattr(errors, error, None) or getattr(builtins, error))
    return found


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_has_a_summary_of_one_sentence(name: str):
    summary, *rest = sections(name)[""].split("\n\n")[0].splitlines()
    assert not rest, f"the summary goes over {len(rest) + 1} lines"
    assert summary.endswith("."), summary
    assert not summary.startswith(f"{name}("), "the docstring is made by Python"


@pytest.mark.parametrize("name", CALLED)
def test_every_parameter_is_explained(name: str):
    explained = API["items"](sections(name).get("Args", ""))
    thing = DOCUMENTED[name]
    is_only_given_back = inspect.isclass(thing) and issubclass(thing, tuple)
    if not is_only_given_back:
        assert list(explained) == list(parameters(name))


@pytest.mark.parametrize("name", CALLED)
def test_what_is_given_back_is_explained(name: str):
    wanted = "Calls" if "__call__" in vars(DOCUMENTED[name]) else "Returns"
    assert (wanted in sections(name)) == bool(result(name) or wanted == "Calls"), result(name)


@pytest.mark.parametrize("name", CALLED)
def test_what_takes_or_gives_arrays_says_their_shape(name: str):
    explained = API["items"](sections(name).get("Args", ""))
    for parameter, kind in parameters(name).items():
        if kind.split(".")[-1] in ARRAYS or parameter in ("image", "images"):
            text = explained.get(parameter) or sections(name)[""]
            names_another = any(f"`{other}`" in text for other in am.__all__)
            assert "[" in text or names_another, f"no shape of {parameter}"
    if "Calls" in sections(name):
        assert "[B, H, W, 3]" in sections(name)["Calls"]
    if any(kind in result(name) for kind in ARRAYS) and "dict" not in result(name):
        assert "[" in sections(name)["Returns"], "no shape of the result"


@pytest.mark.parametrize("name", CALLED)
def test_what_raises_says_so(name: str):
    explained = API["items"](sections(name).get("Raises", ""))
    assert bool(explained) == (name not in NEVER_RAISE)
    documented = {
        getattr(errors, error, None) or getattr(builtins, error)
        for names in explained
        for error in names.split(", ")
    }
    for error in raised(name):
        assert any(issubclass(error, other) for other in documented), f"{error} is not explained"


@pytest.mark.parametrize("name", CALLED)
def test_what_is_not_our_own_names_its_source(name: str):
    assert bool(sections(name).get("Source")) == (name not in OUR_OWN)
