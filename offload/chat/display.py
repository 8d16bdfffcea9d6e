"""How an answer appears while it comes.

Knows: thoughts and text, piece by piece; a terminal's lines. Does not know: models, conversations.

Markdown is drawn a block at a time: blocks that are over are printed once and for all, only the
last one is drawn anew as it grows, so that nothing above it ever moves or flickers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from offload.chat.thinking import Piece
from offload.lines import printable

REFRESH_SECONDS = 0.08  # between two drawings of what grows
DRAWING_SHARE = 0.1  # of the time, at most: long blocks take long to draw
DEEPEST = 12  # levels of lists and quotes, two for each, that are drawn
THINKING, THOUGHT = "Thinking...", "...done thinking."  # ollama's words

Panel = Callable[[], RenderableType]


class Display(Protocol):
    """Shows one answer after the other."""

    thoughts: bool  # shown, or left out
    live: bool  # whether there is a place for a panel
    panel: Panel | None  # what is shown below an answer while it comes

    def write(self, text: str) -> None:
        """Text that is no answer, as it stands."""

    def show(self, piece: Piece) -> None:
        """More of the answer."""

    def finish(self) -> None:
        """The answer is over, or was interrupted at any point: nothing of it is lost."""


class Plain:
    """Text as it comes, for a file, a pipe, or a terminal that asks for no more."""

    live = False
    panel: Panel | None = None

    def __init__(self, write: Callable[[str], None], *, safe: bool = True) -> None:
        """`safe`: `write` reaches a terminal, which must not be told what to do by a model."""
        self.thoughts = True
        self.write = write
        self._safe = safe
        self._thinking = False

    def show(self, piece: Piece) -> None:
        if piece.thought and not self.thoughts:
            return
        if piece.thought != self._thinking:
            self.write(f"{THINKING}\n" if piece.thought else f"\n{THOUGHT}\n\n")
            self._thinking = piece.thought
        self.write(printable(piece.text) if self._safe else piece.text)

    def finish(self) -> None:
        if self._thinking:
            self._thinking = False
            self.write(f"\n{THOUGHT}\n")
        self.write("\n")


class Rendered:
    """Markdown and dimmed thoughts in a terminal."""

    live = True

    def __init__(self, console: Console) -> None:
        self.thoughts = True
        self.panel: Panel | None = None
        self._console = console
        self._live: Live | None = None
        self._source = ""  # of the block that grows
        self._thinking = False
        self._begun = False  # something of the answer is on the screen for good
        self._next_drawing = 0.0  # by `time.monotonic`

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def show(self, piece: Piece) -> None:
        if piece.thought != self._thinking:
            self._settle_all()
            if self.thoughts:
                self._print(Text(THINKING if piece.thought else THOUGHT, style="dim"))
            self._thinking = piece.thought
        self._source += printable(piece.text)
        begin = time.monotonic()
        if begin >= self._next_drawing:  # reading a long list takes long, too: not at every line
            *over, self._source = self._blocks(self._source)
            for block in over:
                self._settle(block)
            self._draw()
            end = time.monotonic()
            self._next_drawing = end + max(REFRESH_SECONDS, (end - begin) / DRAWING_SHARE)

    def finish(self) -> None:
        self._settle_all()
        if self._thinking and self.thoughts:
            self._print(Text(THOUGHT, style="dim"))
        self._thinking = self._begun = False
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _blocks(self, source: str) -> list[str]:
        """The blocks of `source`: all but the last will not change any more."""
        if self._thinking:
            over, newline, rest = source.rpartition("\n")
            return [over + newline, rest]
        starts = [token.map[0] for token in _tokens(source) if token.level == 0 and token.map]
        lines = [f"{line}\n" for line in source.split("\n")]  # as markdown-it counts them
        lines[-1] = lines[-1][:-1]
        edges = [0, *starts[1:], len(lines)]
        return ["".join(lines[begin:end]) for begin, end in pairwise(edges)]

    def _settle_all(self) -> None:
        """Print what there is for good: nothing follows in this voice."""
        for block in self._blocks(self._source):
            self._settle(block)
        self._source = ""

    def _settle(self, source: str) -> None:
        """Print a block for good."""
        if not source.strip() or (self._thinking and not self.thoughts):
            return
        if self._thinking:
            self._print(Text(source.rstrip("\n"), style="dim"))
            return
        if self._begun:
            self._print(Text(""))
        self._begun = True
        self._print(_Lines(_drawn(source)))

    def _print(self, what: RenderableType) -> None:
        if self._live is not None:
            self._live.update("")  # the block that grew is this one now
        self._console.print(what)

    def _draw(self) -> None:
        """Draw the block that grows, and the panel, where they were drawn before."""
        if self._live is None:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
            )
            self._live.start()
            self._console.show_cursor(True)  # or a program that is killed leaves none
        growing: RenderableType
        if self._thinking:
            growing = Text(self._source if self.thoughts else THINKING, style="dim")
        else:
            growing = _Lines(_drawn(self._source))
            if self._begun:
                growing = Group(Text(""), growing)
        parts = [growing] if self.panel is None else [growing, Text(""), self.panel()]
        self._live.update(_Lines(Group(*parts), most=self._console.height - 1), refresh=True)


class _Lines:
    """Something without blank lines around it, which rich draws around some blocks; the last
    `most` lines of it."""

    def __init__(self, what: RenderableType, most: int | None = None) -> None:
        self._what = what
        self._most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._what, options, pad=False)
        if self._most is None:
            while lines and _blank(lines[0]):
                del lines[0]
            while lines and _blank(lines[-1]):
                del lines[-1]
        else:
            lines = lines[-max(1, self._most) :]
        for line in lines:
            yield from _without_padding(line)
            yield Segment.line()


def _without_padding(line: list[Segment]) -> list[Segment]:
    """`line` without the spaces that fill it up: terminals disagree about how wide emoji and
    combined letters are, and a line as wide as the terminal would break."""
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


# As `rich.markdown` reads it, but for what that does not draw: HTML and definitions of links stay
# text, an image is a link.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": 4 * DEEPEST})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference"])
)


@functools.lru_cache(maxsize=1)  # a block is looked at for its end, and then drawn
def _tokens(source: str) -> list[Token]:
    return _PARSER.parse(source)


def _drawn(source: str) -> RenderableType:
    """Markdown of which nothing is left out; as it stands where it is nested too deep for lines."""
    tokens = _tokens(source)
    if max((token.level for token in tokens), default=0) > DEEPEST:
        return Text(source)
    drawn = Markdown("", hyperlinks=False)
    drawn.markup, drawn.parsed = source, tokens
    return drawn
