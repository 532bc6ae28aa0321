"""The public names: each is documented as docs/api.md shows it, and that page is up to date."""

import ast
import builtins
import inspect
import runpy
import textwrap
from typing import Any

import pytest
from documents import ROOT

import activemlp_jax as am
from activemlp_jax import errors

API = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
ARRAYS = ("Array", "ArrayLike", "ndarray")
# Of the paper or the authors' release.
PUBLISHED = (
    "ActiveMLP", "ActiveSegmentor", "create_model", "create_segmentor", "from_torch",
    "load_torch_checkpoint", "sample_axis", "to_torch",
)  # fmt: skip


def test_the_page_is_what_the_docstrings_make():
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == API["page"](), "docs/api.md is out of date: run `python docs/make_api.py`"
    for name in am.__all__:
        assert f"\n### `{name}`\n" in page


def sections(name: str) -> dict[str, str]:
    return API["sections"](getattr(am, name).__doc__ or "")


def tree(name: str) -> Any:
    """The syntax tree of the definition of a public name."""
    return ast.parse(textwrap.dedent(inspect.getsource(getattr(am, name)))).body[0]


def parameters(name: str) -> dict[str, str]:
    """Names of parameters, of a class those of its fields, and how their types are written."""
    node = tree(name)
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    found = (*node.args.args, *node.args.kwonlyargs)
    return {argument.arg: ast.unparse(argument.annotation) for argument in found}


def raised(name: str) -> set[type]:
    """The errors of `raise` statements, of a class in all of its methods."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = ast.unparse(node.exc.func)
            found.add(getattr(errors, error, None) or getattr(builtins, error))
    return found


@pytest.mark.parametrize("name", am.__all__)
def test_every_public_name_has_a_summary_of_one_sentence(name: str):
    summary, *rest = sections(name)[""].split("\n\n")[0].splitlines()
    assert not rest, f"the summary goes over {len(rest) + 1} lines"
    assert summary.endswith("."), summary
    assert not summary.startswith(f"{name}("), "the docstring is made by Python"


@pytest.mark.parametrize("name", am.__all__)
def test_every_parameter_is_explained(name: str):
    explained = API["items"](sections(name).get("Args", ""))
    assert list(explained) == list(parameters(name))


@pytest.mark.parametrize("name", am.__all__)
def test_what_takes_or_gives_arrays_says_their_shape(name: str):
    explained = API["items"](sections(name).get("Args", ""))
    for parameter, kind in parameters(name).items():
        if kind.split(".")[-1] in ARRAYS or parameter in ("image", "images"):
            names_another = any(f"`{other}`" in explained[parameter] for other in am.__all__)
            assert "[" in explained[parameter] or names_another, f"no shape of {parameter}"
    node = tree(name)
    if isinstance(node, ast.ClassDef):
        assert "[B, H, W, 3]" in sections(name)["Calls"]
        return
    returns = ast.unparse(node.returns)
    if any(kind in returns for kind in ARRAYS) and "dict" not in returns:
        assert "[" in sections(name)["Returns"], "no shape of the result"


@pytest.mark.parametrize("name", am.__all__)
def test_what_raises_says_so(name: str):
    explained = API["items"](sections(name).get("Raises", ""))
    documented = {
        getattr(errors, error, None) or getattr(builtins, error)
        for names in explained
        for error in names.split(", ")
    }
    for error in raised(name):
        assert any(issubclass(error, other) for other in documented), f"{error} is not explained"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_names_its_source(name: str):
    assert sections(name).get("Source"), "no source"
