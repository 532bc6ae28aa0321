"""Write docs/api.md: the public names and the commands, from their source and docstrings.

python docs/make_api.py
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import activemlp_jax as am
from activemlp_jax.__main__ import COMMANDS
from activemlp_jax.inference.classify import ClassProbability
from activemlp_jax.inference.offsets import BlockOffsets
from activemlp_jax.inference.tiling import Protocol
from activemlp_jax.weights.model_card import ModelCard

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """# API

What `import activemlp_jax as am` gives, and the commands. Made from the docstrings by
`python docs/make_api.py`, so change those.

In shapes B is the number of images, H and W are height and width, C channels, G groups of channels.
*Normalized* images have the mean and standard deviation of the model's preprocessing taken out.
`UserError` is `activemlp_jax.utils.errors.UserError`, a `ValueError` whose message is one line for
the user."""
PUBLIC = [getattr(am, name) for name in am.__all__]
TITLES = {
    "models": "Models",
    "ops": "The operator",
    "weights": "Weights",
    "inference": "Images",
    "plots": "Pictures",
}  # by package
GROUPS = {
    title: [thing for thing in PUBLIC if thing.__module__.split(".")[1] == package]
    for package, title in TITLES.items()
}
GROUPS["Types of arguments and results"] = [BlockOffsets, ClassProbability, ModelCard, Protocol]
NAMES = {thing.__name__ for group in GROUPS.values() for thing in group}


def definition(thing: Any) -> str:
    """Source of a function up to its docstring, or the name and fields of a class."""
    source = textwrap.dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        segments = (str(ast.get_source_segment(source, field)) for field in fields)
        return "\n    ".join([f"class {node.name}:", *segments])
    assert isinstance(node, ast.FunctionDef)
    return "\n".join(source.splitlines()[: node.body[0].lineno - 1])


def described(thing: Any) -> str:
    """Definition and docstring as Markdown, with links to the other names of the page."""
    text = inspect.cleandoc(thing.__doc__)
    text = re.sub(r"^(\w+):\n", r"**\1**\n\n", text, flags=re.MULTILINE)  # headings of sections
    text = re.sub(r"^  (\w+(?:, \w+)*): ", r"- `\1`: ", text, flags=re.MULTILINE)  # their items
    text = re.sub(r"^Source: ", "*Source:* ", text, flags=re.MULTILINE)
    for name in NAMES - {thing.__name__}:
        text = text.replace(f"`{name}`", f"[`{name}`](#{name.lower()})")
    return f"```python\n{definition(thing)}\n```\n\n{text}"


def members(thing: Any) -> Iterator[Any]:
    """Public methods and properties of a class that have docstrings of their own, as functions."""
    for name, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield inspect.unwrap(function)


def command_help(name: str) -> str:
    """Text that the --help of a command begins with, from a path without its suffix."""
    path = ROOT / name
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, group in GROUPS.items():
        parts.append(f"## {title}")
        for thing in group:
            path = Path(inspect.getfile(thing)).relative_to(ROOT)
            parts += [f"### `{thing.__name__}`", described(thing), f"[{path}](../{path})"]
            parts += map(described, members(thing))
    parts.append("## Commands\n\n`--help` lists the options of each.")
    commands = {f"{name}.py": name for name in ("train", "convert_torch_weights")}
    commands |= {f"-m activemlp_jax.{name}": f"activemlp_jax/{name}" for name in sorted(COMMANDS)}
    for command, path_without_suffix in commands.items():
        parts.append(f"### `python {command}`\n\n```\n{command_help(path_without_suffix)}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
