"""Markdown drawn for a terminal, so that nothing is left out and code can be copied out of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import (
    BlockQuote,
    CodeBlock,
    Heading,
    HorizontalRule,
    ListItem,
    Markdown,
    MarkdownElement,
)
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

DEEPEST = 12  # deepest nesting, as markdown-it counts it (two a list or quote), that is drawn
THEME = Theme({"markdown.code": "cyan", "markdown.h1": "bold underline"})
# Stands before each line of code, so that it gets neither a list's indentation nor a quote's mark.
EXACT = Segment("", Style(meta={"exact": True}))

# The parser of `rich.markdown`, except that nothing is dropped: HTML and link definitions, which
# rich does not draw, stay text, and an image becomes a link.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": 4 * DEEPEST})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference"])
)


@functools.lru_cache(maxsize=1)  # a block is parsed to find its end, then again to be drawn
def tokens_of(source: str) -> list[Token]:
    return _PARSER.parse(source)


def code_blocks(source: str) -> list[str]:
    """The text of each code block in `source`, without the line break at its end."""
    return [
        token.content.removesuffix("\n")
        for token in tokens_of(source)
        if token.type in ("fence", "code_block")
    ]


def drawn(source: str) -> RenderableType:
    """Draw Markdown without leaving anything out, or plain text where it is nested too deeply."""
    tokens = tokens_of(source)
    if max((token.level for token in tokens), default=0) > DEEPEST:
        return Text(source)
    made = _Markdown("", hyperlinks=False)
    made.markup, made.parsed = source, tokens
    return made


class Lines:
    """Draws something without blank lines around it and without filling lines up with spaces.

    With `most`, only the last `most` lines are drawn, and none is wider than the terminal.
    """

    def __init__(self, what: RenderableType, most: int | None = None) -> None:
        self._what = what
        self._most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [*map(_without_padding, Segment.split_lines(console.render(self._what, options)))]
        if self._most is None:
            while lines and _blank(lines[0]):
                del lines[0]
            while lines and _blank(lines[-1]):
                del lines[-1]
        else:
            lines = [part for line in lines for part in _folded(line, options.max_width)]
            lines = lines[-max(1, self._most) :]
        for line in lines:
            yield from line
            yield Segment.line()


class _Code(CodeBlock):
    """Code as it is, so that it can be copied: the terminal wraps what is too long for it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Syntax("", self.lexer_name, theme="ansi_dark").highlight(str(self.text).rstrip())
        code.rstrip()
        yield Segment.line()
        for line in code.split("\n", allow_blank=True):
            yield EXACT
            yield from line.render(console)
            yield Segment.line()
        yield Segment.line()


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar = {}  # rich would centre the first level


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="markdown.hr")


class _Quote(BlockQuote):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        mark = Segment("▌ ", self.style)
        yield from _marked(console, options, self.elements, mark, mark)


class _Item(ListItem):
    def render_bullet(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bullet = Segment(" • ", console.get_style("markdown.item.bullet"))
        yield from _marked(console, options, self.elements, bullet, Segment("   "))

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        width = len(str(last_number)) + 2
        text = f"{number}".rjust(width - 1) + " "
        numeral = Segment(text, console.get_style("markdown.item.number"))
        yield from _marked(console, options, self.elements, numeral, Segment(" " * width))


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "blockquote_open": _Quote,
        "hr": _Rule,
        "list_item_open": _Item,
    }


def _marked(
    console: Console, options: ConsoleOptions, what: RenderableType, first: Segment, rest: Segment
) -> RenderResult:
    """Draw `what` behind `first`, or behind `rest` from its second line on, except for code."""
    inner = options.update(width=max(1, options.max_width - len(first.text)))
    for at, line in enumerate(Segment.split_lines(console.render(what, inner))):
        if EXACT not in line:
            yield rest if at else first
        elif at == 0:
            yield first
            yield Segment.line()
        yield from line
        yield Segment.line()


def _folded(line: list[Segment], width: int) -> Iterable[list[Segment]]:
    length = Segment.get_line_length(line)
    cuts = range(width, length + width, width)
    return [line] if length <= width else Segment.divide(line, cuts)


def _without_padding(line: list[Segment]) -> list[Segment]:
    """Remove the spaces that fill a line up to the terminal's width. Terminals disagree about the
    width of emoji and combining characters, so that a full line may wrap."""
    kept = list(line)
    while kept:
        text, style, control = kept.pop()
        if style is None or style.bgcolor is None:
            text = text.rstrip(" ")
        if text:
            return [*kept, Segment(text, style, control)]
    return kept


def _blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)
