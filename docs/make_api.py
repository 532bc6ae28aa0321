"""Write docs/api.md: the public names and the commands, from their docstrings.

python docs/make_api.py
"""

import ast
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import activemlp_jax as am

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

TITLES = {
    "models": "Models",
    "ops": "The operator",
    "weights": "Weights",
    "inference": "Images",
    "plots": "Pictures",
}  # by package
INTRODUCTION = """# API

What `import activemlp_jax as am` gives, and the commands. Made from the docstrings by
`python docs/make_api.py`, so change those.

In shapes B is the number of images, H and W are height and width, C channels, G groups of channels.
*Normalised* images have the mean and standard deviation of the model's preprocessing taken out.
`UserError` is `activemlp_jax.utils.errors.UserError`, a `ValueError` whose message is one line for
the user.
"""
LISTS = ("Args", "Raises")  # sections of `name: text`
SECTIONS = (*LISTS, "Returns", "Yields", "Calls", "Source")
HEADINGS = {"Args": "Arguments"}


def signature(thing: Any) -> str:
    """How `thing` is called, with types as its source has them; a parameter a line if it is long.

    Of a class these are its annotated fields.
    """
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    result = ""
    if isinstance(node, ast.ClassDef):
        parts = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
    else:
        assert isinstance(node, ast.FunctionDef)
        positional, defaults = node.args.args, node.args.defaults
        required = len(positional) - len(defaults)
        values = [None] * required + [*defaults] + node.args.kw_defaults
        parts = [
            ast.unparse(argument) + (f" = {ast.unparse(value)}" if value else "")
            for argument, value in zip(positional + node.args.kwonlyargs, values, strict=True)
        ]
        if node.args.kwonlyargs:
            parts.insert(len(positional), "*")
        parts = parts[1:] if parts[:1] in (["self"], ["cls"]) else parts
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(parts)}){result}"
    if len(line) > 96:
        lines = "".join(f"    {part},\n" for part in parts)
        line = f"{node.name}(\n{lines}){result}"
    return line.replace("'", '"')


def sections(docstring: str) -> dict[str, str]:
    """The text under each heading of a docstring, and under '' what comes before them."""
    pattern = rf"^({'|'.join(SECTIONS)}):[ \n]"
    first, *rest = re.split(pattern, inspect.cleandoc(docstring), flags=re.MULTILINE)
    texts = (textwrap.dedent(text).strip() for text in rest[1::2])
    return {"": first.strip(), **dict(zip(rest[::2], texts, strict=True))}


def items(text: str) -> dict[str, str]:
    """What a section says of each name, out of lines `name: text` with indented ones after them."""
    _, *parts = re.split(r"^(\w[\w, ]*): ", text, flags=re.MULTILINE)
    values = (" ".join(value.split()) for value in parts[1::2])
    return dict(zip(parts[::2], values, strict=True))


def body(docstring: str) -> Iterator[str]:
    """A docstring as paragraphs of Markdown."""
    for name, text in sections(docstring).items():
        if not name:
            yield text
        elif name in LISTS:
            yield f"**{HEADINGS.get(name, name)}**"
            yield "\n".join(f"- `{key}`: {value}" for key, value in items(text).items())
        elif name == "Source":
            yield f"*Source:* {text}"
        else:
            yield f"**{name}**"
            yield text


def linked(text: str, names: set[str], own: str) -> str:
    """`text` with links where it names other entries of the page."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        is_other = name in names and name != own
        return f"[{match[0]}](#{name.lower()})" if is_other else match[0]

    return re.sub(r"(?<![`\[])`(\w+)(?:\(\))?`(?!`)", link, text)


def entry(name: str, thing: Any, names: set[str]) -> Iterator[str]:
    """A name with its signature and docstring, and the methods and properties of a class."""
    yield f"### `{name}`"
    yield f"```python\n{signature(thing)}\n```"
    path = Path(inspect.getfile(thing)).relative_to(ROOT)
    text = "\n\n".join(body(thing.__doc__))
    yield f"{linked(text, names, name)}\n\n[{path}](../{path})"
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if member.startswith("_") or not isinstance(function, types.FunctionType):
            continue
        if function.__doc__ and function.__module__ == thing.__module__:
            call = f".{member}" if isinstance(value, property) else f".{signature(function)}"
            yield f"```python\n{call}\n```"
            yield linked("\n\n".join(body(function.__doc__)), names, name)


def results(things: Iterator[Any]) -> dict[str, type]:
    """The classes of this package, by name, that signatures of `things` name, but public ones."""
    found: dict[str, type] = {}

    def look(hint: Any) -> None:
        for part in typing.get_args(hint):
            look(part)
        if inspect.isclass(hint) and hint.__module__.startswith(am.__name__):
            found[hint.__name__] = hint

    for thing in things:
        if inspect.isfunction(thing):
            for hint in typing.get_type_hints(thing).values():
                look(hint)
    return {name: found[name] for name in sorted(found) if name not in am.__all__}


def commands() -> Iterator[tuple[str, str]]:
    """Each command but the list of them, and the text that its --help begins with."""
    package = ROOT / am.__name__
    modules = {path.stem: path for path in package.glob("[!_]*.py")}
    modules |= {path.parent.name: path for path in package.glob("*/__main__.py")}
    names = {f"python {path.name}": path for path in sorted(ROOT.glob("*.py"))}
    names |= {f"python -m {am.__name__}.{name}": modules[name] for name in sorted(modules)}
    for command, path in names.items():
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.If) and "__main__" in ast.dump(node) for node in tree.body):
            yield command, ast.get_docstring(tree) or ""


def command_entry(command: str, docstring: str) -> Iterator[str]:
    """A command with what it is for and its examples."""
    yield f"### `{command}`"
    # What is indented are examples, and lists that the terminal shows as they are.
    for part in re.split(r"\n\n|(?<=:)\n", docstring.replace("Examples:\n", "")):
        is_code = part.startswith("  ") or re.search(r"\S   +\S", part)
        yield f"```\n{textwrap.dedent(part)}\n```" if is_code else part


def page() -> str:
    """The whole page."""
    public = {name: getattr(am, name) for name in am.__all__}
    shown = results(iter(public.values()))
    names = {*public, *shown}
    parts = [INTRODUCTION.strip()]
    for package, title in TITLES.items():
        parts.append(f"## {title}")
        for name, thing in public.items():
            if thing.__module__.split(".")[1] == package:
                parts += entry(name, thing, names)
    parts.append("## Types of arguments and results")
    for name, thing in shown.items():
        parts += entry(name, thing, names)
    parts.append("## Commands\n\n`--help` lists the options of each.")
    for command, docstring in commands():
        parts += command_entry(command, docstring)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
