"""How an answer appears while it arrives.

Markdown is drawn block by block: a finished block is printed once and stays, and only the last,
growing block is drawn again, so that nothing above it moves or flickers.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.live_render import LiveRender
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from offload.chat.markdown import THEME, Lines, drawn, tokens_of
from offload.lines import THINKING, THOUGHT, Speaker, Write, printable

if TYPE_CHECKING:
    from offload.generation.thinking import Piece

REFRESH_SECONDS = 0.08  # at least, between two drawings of the growing block
DRAWING_SHARE = 0.1  # at most this share of the time goes into drawing; long blocks are slow

Panel = Callable[[], RenderableType]  # draws the lines below an answer while it arrives


class Plain(Speaker):
    """Plain text, for a file, a pipe, or a terminal that cannot be drawn on."""

    live = False  # whether a panel can be shown
    panel: Panel | None = None

    def __init__(self, write: Write, *, note: Write | None = None, safe: bool = True) -> None:
        """`note` writes what is said beside answers (figures, notices, errors); by default `write`
        does."""
        super().__init__(write, safe=safe)
        self.note = note or write

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Write rows of two or more columns."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            self.write("  ".join(cells).rstrip() + "\n")

    def wait(self, what: str) -> None:
        """Say that `what` is being done, until something else is shown."""

    def rest(self) -> None:
        """Take away what `wait` shows."""

    def moved(self) -> None:
        """The cursor is no longer where the last drawing ended."""


class Rendered:
    """Markdown in a terminal, with dimmed thoughts, figures and notices."""

    live = True

    def __init__(self, console: Console, notes: Console | None = None) -> None:
        """`notes`: where what is not an answer goes; by default `console`."""
        console.push_theme(THEME)
        self.thoughts = True
        self.panel: Panel | None = None
        self._console = console
        self._notes = notes or console
        self._status: Live | None = None  # turns until something else is shown
        self._region = LiveRender("")  # what is on the screen and will be drawn again
        self._source = ""  # Markdown of the growing block
        self._on_screen = 0  # how many characters of `_source` the region shows
        self._size = console.size  # when the region was drawn
        self._moved = False  # whether the cursor may have left the end of the region
        # After a move the rest of a word (or, in code, of a line) goes on where the cursor is, up
        # to one of these characters. Empty: nothing does.
        self._raw_until = ""
        self._fence = ("", "")  # marks and language of the code that goes on
        self._last_line = ""  # the Markdown of the line in which the cursor is
        self._thinking = False
        self._begun = False  # whether a block of this answer has been printed
        self._next_drawing = 0.0  # earliest time of the next drawing, by `time.monotonic`

    def write(self, text: str) -> None:
        self._say(self._console, text)

    def note(self, text: str) -> None:
        self._say(self._notes, text, style="dim")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        self.rest()
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in rows[0]:
            grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))
        self._console.print(grid)

    def wait(self, what: str) -> None:
        self._status = Live(
            Spinner("dots", Text(f"{what}...", style="dim")),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=12.5,
        )
        self._status.start(refresh=True)
        self._console.show_cursor(True)  # a killed program must not leave the cursor hidden

    def rest(self) -> None:
        """Take away what `wait` shows."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def copy(self, text: str) -> None:
        """Ask the terminal to copy `text` (OSC 52)."""
        code = base64.b64encode(text.encode()).decode()
        print(f"\x1b]52;c;{code}\x07", end="", flush=True)

    def moved(self) -> None:
        self._moved = True

    def show(self, piece: Piece) -> None:
        self.rest()
        if piece.thought != self._thinking:
            self._settle_all()
            if self.thoughts:
                self._print(Text(THINKING if piece.thought else THOUGHT, style="dim"))
            self._thinking = piece.thought
        self._source += printable(piece.text)
        begin = time.monotonic()
        if begin < self._next_drawing:  # parsing a long list is slow, so not after every piece
            return
        self._go_on_below()
        *over, self._source = self._blocks(self._source)
        for block in over:
            self._settle(block)
        if not self._raw_until:
            self._draw()
        end = time.monotonic()
        self._next_drawing = end + max(REFRESH_SECONDS, (end - begin) / DRAWING_SHARE)

    def finish(self) -> None:
        self.rest()
        self._settle_all()
        if self._thinking and self.thoughts:
            self._print(Text(THOUGHT, style="dim"))
        self._thinking = self._begun = False
        if self.panel is not None:
            self._print(self.panel())
        self._erase()

    def _say(self, console: Console, text: str, style: str = "") -> None:
        """Print lines, wrapped by words. A word that is too long, as a path, stays whole."""
        self.rest()
        if "\x1b" in text:  # a drawing in colours
            console.print(Text.from_ansi(text.removesuffix("\n")), crop=False)
            return
        wrap = TextWrapper(console.width, break_long_words=False, break_on_hyphens=False)
        lines = [wrap.fill(line) for line in text.removesuffix("\n").split("\n")]
        console.print(Text("\n".join(lines), style=style), soft_wrap=True)

    def _blocks(self, source: str) -> list[str]:
        """Split `source` into blocks. All but the last are finished."""
        if self._thinking:
            over, newline, rest = source.rpartition("\n")
            return [over + newline, rest]
        starts = [token.map[0] for token in tokens_of(source) if token.level == 0 and token.map]
        lines = [f"{line}\n" for line in source.split("\n")]  # as markdown-it counts them
        lines[-1] = lines[-1][:-1]
        edges = [0, *starts[1:], len(lines)]
        return ["".join(lines[begin:end]) for begin, end in pairwise(edges)]

    def _settle_all(self) -> None:
        """Print everything that is left, because the thoughts or the answer are over."""
        self._go_on_below()
        if self._raw_until:
            self._end_raw()
        for block in self._blocks(self._source):
            self._settle(block)
        self._source, self._on_screen = "", 0

    def _settle(self, source: str) -> None:
        """Print a finished block."""
        self._on_screen = 0
        if not source.strip() or (self._thinking and not self.thoughts):
            return
        if self._thinking:
            self._print(Text(source.rstrip("\n"), style="dim"))
            return
        if self._begun:
            self._print(Text(""))
        self._begun = True
        self._print(Lines(drawn(source)))

    def _print(self, what: RenderableType) -> None:
        with self._console:  # both are written at once
            self._erase()
            self._console.print(what, crop=False)

    def _erase(self) -> None:
        self._console.control(self._region.position_cursor())
        self._region = LiveRender("")

    def _draw(self) -> None:
        """Draw the growing block and the panel again, in place."""
        growing: RenderableType
        if self._thinking:
            growing = Text(self._source if self.thoughts else THINKING, style="dim")
        else:
            growing = Lines(drawn(self._source))
            if self._begun:
                growing = Group(Text(""), growing)
        parts = [growing] if self.panel is None else [growing, Text(""), self.panel()]
        before = self._region.position_cursor()
        self._region.set_renderable(Lines(Group(*parts), most=self._console.height - 1))
        self._console.print(before, self._region, crop=False)
        self._on_screen, self._size = len(self._source), self._console.size

    def _go_on_below(self) -> None:
        """After a resize or a stop, leave what was drawn where it is, and go on at the cursor.

        How a terminal wraps old lines anew is not known, so the region cannot be drawn again.
        """
        if self._region.last_render_height and (self._moved or self._console.size != self._size):
            self._region, self._begun = LiveRender(""), False
            shown, self._source = self._source[: self._on_screen], self._source[self._on_screen :]
            self._begin_raw(shown)
        self._moved, self._on_screen = False, 0
        if self._raw_until:
            ends = [at for sign in self._raw_until if (at := self._source.find(sign)) >= 0]
            at = min(ends, default=len(self._source))
            self._console.print(
                Text(self._source[:at], style="dim" if self._thinking else ""),
                end="",
                soft_wrap=True,
            )
            self._last_line += self._source[:at]
            self._source = self._source[at:]
            if ends:
                self._source = self._source[1:]
                self._end_raw()

    def _begin_raw(self, shown: str) -> None:
        """Choose how what follows the Markdown `shown`, which is on the screen, can go on."""
        tokens = [] if self._thinking else tokens_of(shown)
        *before, line = shown.split("\n")
        space = shown[len(shown.rstrip()) :]  # is not on the screen
        self._last_line = shown.rstrip().rpartition("\n")[2]
        self._raw_until, self._fence = " \n", ("", "")
        again = "" if space else None  # Markdown to draw once more; None: the line goes on
        fence = next((token for token in reversed(tokens) if token.type == "fence"), None)
        if fence is not None and fence.map and fence.map[1] > shown.rstrip("\n").count("\n"):
            self._raw_until = "\n"
            again = line if "\n" in space else None
            if not before:
                again = shown
            else:
                self._fence = fence.markup, fence.info
                self._source = space.replace("\n", "") * (again is None) + self._source
        elif tokens and tokens[0].type == "table_open":  # its columns need the header
            again = "\n".join([*before[:2], line])
        if again is not None or self.panel is not None:
            self._source = (again or "") + self._source
            self._end_raw()

    def _end_raw(self) -> None:
        """Begin a new line, from which on Markdown is drawn again."""
        self._console.line()
        markup, info = self._fence
        if markup and not self._last_line.strip().startswith(markup):  # the code goes on
            self._source = f"{markup}{info}\n{self._source}"
        self._raw_until = ""


Display = Plain | Rendered
