"""How an answer appears while it arrives.

Markdown is drawn block by block: a finished block is printed once and stays, and only the last,
growing block is drawn again, so that nothing above it moves or flickers.
"""

import functools
import time
from collections.abc import Callable
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from offload.chat.thinking import Piece
from offload.lines import printable

REFRESH_SECONDS = 0.08  # at least, between two drawings of the growing block
DRAWING_SHARE = 0.1  # at most this share of the time goes into drawing; long blocks are slow
DEEPEST = 12  # highest markdown-it level that is drawn: a list adds two, a quote one
THINKING, THOUGHT = "Thinking...", "...done thinking."  # ollama's words

Panel = Callable[[], RenderableType]  # draws the lines below an answer while it arrives


class Plain:
    """Plain text, for a file, a pipe, or a terminal without colours."""

    live = False  # whether a panel can be shown
    panel: Panel | None = None

    def __init__(self, write: Callable[[str], None], *, safe: bool = True) -> None:
        """`safe`: make control characters visible that a terminal would obey."""
        self.thoughts = True  # whether thoughts are shown
        self.write = write  # writes text that is not part of an answer, unchanged
        self._safe = safe
        self._thinking = False

    def show(self, piece: Piece) -> None:
        """Show the next piece of the answer."""
        if piece.thought and not self.thoughts:
            return
        if piece.thought != self._thinking:
            self.write(f"{THINKING}\n" if piece.thought else f"\n{THOUGHT}\n\n")
            self._thinking = piece.thought
        self.write(printable(piece.text) if self._safe else piece.text)

    def finish(self) -> None:
        """End the answer, which may have been interrupted at any point, and show all of it."""
        if self._thinking:
            self._thinking = False
            self.write(f"\n{THOUGHT}\n")
        self.write("\n")


class Rendered:
    """Markdown in a terminal, with dimmed thoughts."""

    live = True

    def __init__(self, console: Console) -> None:
        self.thoughts = True
        self.panel: Panel | None = None
        self._console = console
        self._live: Live | None = None
        self._source = ""  # Markdown of the growing block
        self._thinking = False
        self._begun = False  # whether a block of this answer has been printed
        self._next_drawing = 0.0  # earliest time of the next drawing, by `time.monotonic`

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
        if begin >= self._next_drawing:  # parsing a long list is slow, so not after every piece
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
        """Split `source` into blocks. All but the last are finished."""
        if self._thinking:
            over, newline, rest = source.rpartition("\n")
            return [over + newline, rest]
        starts = [token.map[0] for token in _tokens(source) if token.level == 0 and token.map]
        lines = [f"{line}\n" for line in source.split("\n")]  # as markdown-it counts them
        lines[-1] = lines[-1][:-1]
        edges = [0, *starts[1:], len(lines)]
        return ["".join(lines[begin:end]) for begin, end in pairwise(edges)]

    def _settle_all(self) -> None:
        """Print everything that is left, because the thoughts or the answer are over."""
        for block in self._blocks(self._source):
            self._settle(block)
        self._source = ""

    def _settle(self, source: str) -> None:
        """Print a finished block."""
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
            self._live.update("")  # the growing block is now printed as a finished one
        self._console.print(what)

    def _draw(self) -> None:
        """Draw the growing block and the panel again, in place."""
        if self._live is None:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
            )
            self._live.start()
            self._console.show_cursor(True)  # a killed program must not leave the cursor hidden
        growing: RenderableType
        if self._thinking:
            growing = Text(self._source if self.thoughts else THINKING, style="dim")
        else:
            growing = _Lines(_drawn(self._source))
            if self._begun:
                growing = Group(Text(""), growing)
        parts = [growing] if self.panel is None else [growing, Text(""), self.panel()]
        self._live.update(_Lines(Group(*parts), most=self._console.height - 1), refresh=True)


Display = Plain | Rendered


class _Lines:
    """Draws something without blank lines around it, or only its last `most` lines."""

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


# The parser of `rich.markdown`, except that nothing is dropped: HTML and link definitions, which
# rich does not draw, stay text, and an image becomes a link.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": 4 * DEEPEST})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference"])
)


@functools.lru_cache(maxsize=1)  # a block is parsed to find its end, then again to be drawn
def _tokens(source: str) -> list[Token]:
    return _PARSER.parse(source)


def _drawn(source: str) -> RenderableType:
    """Draw Markdown without leaving anything out, or plain text where it is nested too deeply."""
    tokens = _tokens(source)
    if max((token.level for token in tokens), default=0) > DEEPEST:
        return Text(source)
    drawn = Markdown("", hyperlinks=False)
    drawn.markup, drawn.parsed = source, tokens
    return drawn
