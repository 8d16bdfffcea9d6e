"""Answers on a screen: drawn as they stream, whole at the end, and nothing a terminal obeys."""

from __future__ import annotations

import io

import pyte
import pytest
from rich.console import Console
from rich.text import Text

import offload.chat.display
from offload.chat.display import Plain, Rendered
from offload.generation.thinking import Piece

ANSWER = """# Title

Some *emphasis* and `code`. שלום עולם 👋🏽 é.

- one
- two

```python
def f(x):
    return x
```

| a | b |
| - | - |
| 1 | 2 |

The end.
"""
SHOWN = [
    "Title",
    "",
    "Some emphasis and code. שלום עולם 👋🏽 é.",
    "",
    " • one",
    " • two",
    "",
    " def f(x):",
    "     return x",
    "",
    " a  b",
    " ────",
    " 1  2",
    "",
    "The end.",
]


class Screen(io.StringIO):
    """A terminal of 60 columns that remembers what scrolled away."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(60, rows, history=1000)
        self.stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self.stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """All lines ever shown that stayed."""
        above = ["".join(line[x].data for x in range(60)) for line in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display)]


def _rendered(rows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Rendered, Screen]:
    monkeypatch.setattr(offload.chat.display, "REFRESH_SECONDS", 0)
    monkeypatch.setattr(offload.chat.display, "DRAWING_SHARE", 1e9)
    screen = Screen(rows)
    console = Console(
        file=screen, force_terminal=True, width=60, height=rows, _environ={"TERM": "xterm"}
    )
    return Rendered(console), screen


def _without_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines.pop()
    return lines


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_an_answer_is_whole_on_any_screen(
    rows: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, screen = _rendered(rows, monkeypatch)
    display.panel = lambda: Text("PANEL")
    for at in range(0, len(ANSWER), size):
        display.show(Piece(ANSWER[at : at + size], thought=False))
    display.finish()
    shown = _without_end(screen.lines)
    shown[0] = shown[0].strip()  # headings are centred
    assert shown == SHOWN


def test_markdown_is_read_when_it_is_drawn_not_at_every_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    display, screen = _rendered(20, monkeypatch)
    monkeypatch.setattr(offload.chat.display, "REFRESH_SECONDS", 1e9)
    real, read = offload.chat.display._PARSER.parse, list[str]()
    monkeypatch.setattr(
        offload.chat.display._PARSER, "parse", lambda text: (read.append(text), real(text))[1]
    )
    for i in range(200):
        display.show(Piece(f"- item {i}\n", thought=False))
    assert len(read) == 1, "a list is one block until it ends: reading it costs its length"
    display.finish()
    assert [line for line in screen.lines if line] == [f" • item {i}" for i in range(200)]


def test_what_grows_and_the_panel_are_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(20, monkeypatch)
    display.panel = lambda: Text("PANEL")
    display.show(Piece("one two", thought=False))
    assert _without_end(screen.lines) == ["one two", "", "PANEL"]
    display.finish()
    assert _without_end(screen.lines) == ["one two"]


def test_thoughts_are_dimmed_or_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown in (True, False):
        display, screen = _rendered(20, monkeypatch)
        display.thoughts = shown
        display.show(Piece("hm\nso", thought=True))
        display.show(Piece("Yes.", thought=False))
        display.finish()
        thoughts = ["Thinking...", "hm", "so", "...done thinking."] if shown else []
        assert _without_end(screen.lines) == [*thoughts, "Yes."]


def test_a_model_cannot_tell_the_terminal_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(20, monkeypatch)
    display.show(Piece("a\x1b[2Jb\x07\x9b1mc\r", thought=False))
    display.finish()
    assert _without_end(screen.lines) == ["a␛[2Jb␇\ufffd1mc␍"]
    written: list[str] = []
    plain = Plain(written.append)
    plain.show(Piece("a\x1b[2Jb\tc\n", thought=False))
    assert "".join(written) == "a␛[2Jb\tc\n"


def test_a_file_gets_the_text_as_it_is() -> None:
    written: list[str] = []
    plain = Plain(written.append, safe=False)
    plain.show(Piece("# a\x1b\n*b*", thought=False))
    plain.finish()
    assert "".join(written) == "# a\x1b\n*b*\n"


def test_thoughts_in_plain_text_have_ollama_s_words_around_them() -> None:
    written: list[str] = []
    plain = Plain(written.append)
    plain.show(Piece("hm", thought=True))
    plain.show(Piece("Yes", thought=False))
    plain.finish()
    assert "".join(written) == "Thinking...\nhm\n...done thinking.\n\nYes\n"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("Use vector<int> and <br>\n", ["Use vector<int> and <br>"]),
        ("<div>\nall of it\n</div>\n", ["<div> all of it </div>"]),
        ("a <!-- b --> c\n", ["a <!-- b --> c"]),
        ("[1]: http://example.com\n", ["[1]: http://example.com"]),
        ("see [docs](http://a.b)\n", ["see docs (http://a.b)"]),
        (">" * 30 + " deep\n", [">" * 30 + " deep"]),
    ],
)
def test_nothing_of_an_answer_is_left_out(
    source: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    display, screen = _rendered(20, monkeypatch)
    display.show(Piece(source, thought=False))
    display.finish()
    assert _without_end(screen.lines) == shown


def test_an_image_keeps_its_words_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(20, monkeypatch)
    display.show(Piece("before ![img](http://a.b) after\n", thought=False))
    display.finish()
    assert _without_end(screen.lines) == ["before !img (http://a.b) after"]


def test_the_cursor_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(20, monkeypatch)
    display.show(Piece("growing", thought=False))
    assert not screen.screen.cursor.hidden
    display.finish()
