"""Parser of the documentation pages: their commands, code blocks, links and headings."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from processes import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("results/*.md")])
SHELL = ("", "sh", "bash")  # fences without a language hold commands or their output
INLINE = "inline"
MARKDOWN = MarkdownIt().enable("table")

# The start of a command; variables, `srun`, `on_all '` and the like may precede it.
PROGRAM = re.compile(r"(?:^|(?<=[\s'\"]))(?:\.venv/bin/)?(?:python3?|pip|make)(?=\s|$)")


class Passage(NamedTuple):
    """Text of a page and the line it starts on; `language` is that of its fence, or INLINE."""

    page: Path
    line: int
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def fences(page: Path) -> Iterator[Passage]:
    """Yield the code blocks of a page."""
    for token in MARKDOWN.parse(page.read_text()):
        if token.type == "fence":
            assert token.map
            yield Passage(page, token.map[0] + 2, token.content, token.info)


def _inline(page: Path, kind: str) -> Iterator[tuple[int, Token]]:
    """Yield inline tokens of a kind, with the line on which their paragraph starts."""
    line = 0
    for token in MARKDOWN.parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line  # table cells have no line number
        for child in token.children or ():
            if child.type == kind:
                yield line, child


def links(page: Path) -> Iterator[Passage]:
    """Yield the targets of links and the paths of images."""
    for kind, attribute in (("link_open", "href"), ("image", "src")):
        for line, token in _inline(page, kind):
            yield Passage(page, line, str(token.attrs[attribute]))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub generates them, without the '#'."""
    tokens = MARKDOWN.parse(page.read_text())
    headings = [
        "".join(child.content for child in token.children or ())
        for opening, token in itertools.pairwise(tokens)
        if opening.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def split_command(text: str) -> list[str]:
    """Split the command that `text` starts with into words, as a shell does."""
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # a quote that opens before the command closes after it
        return split_command(text[: max(text.rfind("'"), text.rfind('"'))])
    return [*itertools.takewhile(lambda word: not re.fullmatch(r"[();<>|&]+", word), words)]


def commands(page: Path) -> Iterator[tuple[Passage, list[str]]]:
    """Yield the commands in code blocks and in running text, each with its words."""
    for fence in fences(page):
        lines = fence.text.replace("\\\n", "  ").splitlines() if fence.language in SHELL else ()
        for text in lines:
            for program in PROGRAM.finditer(text):
                words = split_command(text[program.start() :])
                yield Passage(page, fence.line, shlex.join(words)), words
    for line, token in _inline(page, "code_inline"):
        text = token.content.replace("\n", " ")
        if PROGRAM.match(text):
            yield Passage(page, line, text, INLINE), split_command(text)


def steps(page: Path) -> list[tuple[Passage, str]]:
    """List the blocks that a reader of the page runs, each with the output that the page shows."""
    blocks: list[tuple[Passage, str]] = []
    for fence in fences(page):
        if fence.language == "python" or (
            fence.language in SHELL and re.match(r"(source|make|python|pip) ", fence.text)
        ):
            blocks.append((fence, ""))
        elif fence.language == "" and blocks:
            blocks[-1] = (blocks[-1][0], fence.text)
    return blocks


def output_lines(text: str) -> list[str]:
    """Return lines to compare: numbers become '#', and extra spaces and text after '...' go."""
    lines = (re.sub(r"[\d,]*\d(\.\d+)?(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    lines = (re.sub(r"([─━])\1+", r"\1", re.sub(r"\s+", " ", line)) for line in lines)
    return [kept for line in lines if (kept := line.partition("...")[0].strip())]
