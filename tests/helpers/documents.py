"""The pages of the documentation as a reader takes them: commands, code, links and headings."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("results/*.md")])
SHELL = ("", "sh", "bash")  # fences without a language hold commands, and what they print
INLINE = "inline"
MARKDOWN = MarkdownIt().enable("table")

# Where a command begins; before it there may be variables, `srun`, `on_all '` and the like.
PROGRAM = re.compile(r"(?:^|(?<=[\s'\"]))(?:\.venv/bin/)?(?:python3?|pip|make)(?=\s|$)")


class Passage(NamedTuple):
    """Some text of a page, by the line it begins on; `language` is a fence's, or INLINE."""

    page: Path
    line: int
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


class Step(NamedTuple):
    """A block of commands or of Python on a page, and the text that it is said to print."""

    block: Passage
    shown: str

    @property
    def script(self) -> str:
        """What a reader types into bash for it."""
        if self.block.language == "python":
            return f"python - <<'END_OF_PYTHON'\n{self.block.text}END_OF_PYTHON\n"
        return self.block.text


def fences(page: Path) -> Iterator[Passage]:
    """The blocks of code."""
    for token in MARKDOWN.parse(page.read_text()):
        if token.type == "fence":
            assert token.map
            yield Passage(page, token.map[0] + 2, token.content, token.info)


def _inline(page: Path, kind: str) -> Iterator[tuple[int, Token]]:
    """Tokens of a kind within paragraphs, and the line on which the paragraph begins."""
    line = 0
    for token in MARKDOWN.parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line  # cells of a table have none of their own
        for child in token.children or ():
            if child.type == kind:
                yield line, child


def links(page: Path) -> Iterator[Passage]:
    """Where links lead, and where images are."""
    for kind, attribute in (("link_open", "href"), ("image", "src")):
        for line, token in _inline(page, kind):
            yield Passage(page, line, str(token.attrs[attribute]))


def anchors(page: Path) -> set[str]:
    """The ends `#...` of links to the headings of a page, as GitHub makes them."""
    tokens = MARKDOWN.parse(page.read_text())
    found: set[str] = set()
    for heading, token in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            parts = [child.content for child in token.children or ()]
            name = re.sub(r"[^\w\- ]", "", "".join(parts).lower()).replace(" ", "-")
            assert name not in found, f"{page} has two headings {name}"
            found.add(name)
    return found


def split(text: str) -> list[str]:
    """The words of the command that `text` begins with, as a shell has them.

    A quote that is opened before the command may be closed behind it.
    """
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        return split(text[: max(text.rfind("'"), text.rfind('"'))])
    ends = (number for number, word in enumerate(words) if re.fullmatch(r"[();<>|&]+", word))
    return words[: next(ends, len(words))]


def commands(page: Path) -> Iterator[tuple[Passage, list[str]]]:
    """Commands in blocks and in running text, and the words of each."""
    for fence in fences(page):
        if fence.language not in SHELL:
            continue
        for found in re.finditer(r"(?:[^\n]*\\\n)*[^\n]*", fence.text):
            line = fence.line + fence.text.count("\n", 0, found.start())
            text = found[0].replace("\\\n", " ")
            for start in PROGRAM.finditer(text):
                words = split(text[start.start() :])
                yield Passage(page, line, shlex.join(words)), words
    for line, token in _inline(page, "code_inline"):
        text = token.content.replace("\n", " ")
        if PROGRAM.match(text):
            yield Passage(page, line, text, INLINE), split(text)


def steps(page: Path) -> list[Step]:
    """The blocks that a reader of the page runs, in order."""
    found: list[Step] = []
    for fence in fences(page):
        if fence.language == "python" or (
            fence.language in SHELL and re.match(r"(source|make|python|pip) ", fence.text)
        ):
            found.append(Step(fence, ""))
        elif fence.language == "" and found:
            found[-1] = found[-1]._replace(shown=fence.text)
    return found


def form(text: str) -> list[str]:
    """The lines of a command's output, without numbers, widths of columns, and all after `...`."""
    lines = (re.sub(r"[\d,]*\d(\.\d+)?(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    lines = (re.sub(r"([─━])\1+", r"\1", re.sub(r"\s+", " ", line)) for line in lines)
    return [kept for line in lines if (kept := line.partition("...")[0].strip())]
