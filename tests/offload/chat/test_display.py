"""Answers on a screen: drawn as they stream, whole at the end, and nothing a terminal obeys."""

from __future__ import annotations

import base64
import io
import re

import pyte
import pytest
from rich.console import Console, ConsoleDimensions
from rich.text import Text

import offload.chat.display
import offload.chat.markdown
from offload.chat.commands import KEYS, USAGE
from offload.chat.display import Plain, Rendered
from offload.generation.thinking import Piece

HINTS = (
    "(context almost full: 4032 of 4096 tokens. The oldest turns will be dropped; /clear makes "
    "room, and chat -c N begins with more)\n"
    "[ Experts: 1536 of 6144 in memory | hits 100.0% | 120.0 MiB/token | look-ahead 90% ]\n"
)
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
    "def f(x):",
    "    return x",
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
        self.raw = ""

    def write(self, text: str) -> int:
        self.raw += text
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
    assert _without_end(screen.lines) == [*SHOWN, "PANEL"]


def test_markdown_is_read_when_it_is_drawn_not_at_every_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    display, screen = _rendered(20, monkeypatch)
    monkeypatch.setattr(offload.chat.display, "REFRESH_SECONDS", 1e9)
    real, read = offload.chat.markdown._PARSER.parse, list[str]()
    monkeypatch.setattr(
        offload.chat.markdown._PARSER, "parse", lambda text: (read.append(text), real(text))[1]
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
    assert _without_end(screen.lines) == ["one two", "PANEL"]


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


LONG = "print(" + " + ".join(f"name_{number}" for number in range(12)) + ")"
CODE = f"def f(items, n):\n    {LONG}\n\n    return sorted(items)[:n]"


@pytest.mark.parametrize(
    "source",
    [
        f"```python\n{CODE}\n```\n",
        "Do:\n\n1. this\n\n   ```python\n   " + CODE.replace("\n", "\n   ") + "\n   ```\n2. that\n",
        "> ```\n> " + CODE.replace("\n", "\n> ") + "\n> ```\n",
    ],
    ids=["alone", "in a list", "in a quote"],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_code_can_be_copied_exactly(
    source: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, screen = _rendered(30, monkeypatch)
    for at in range(0, len(source), size):
        display.show(Piece(source[at : at + size], thought=False))
    display.finish()
    settled = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.raw)
    assert CODE in settled
    cells = [line[x] for line in screen.screen.buffer.values() for x in range(60)]
    assert {cell.bg for cell in cells} == {"default"}


@pytest.mark.parametrize(
    ("source", "at"),
    [
        ("one two three four five", 10),
        ("one two three four five", 8),
        ("```python\nfirst = 1\nsecond = 2\nthird = 3\n```\n\nend", 25),
        ("```python\nfirst = 1\nsecond = 2\nthird = 3\n```\n\nend", 20),
        ("```python\nfirst = 1\nsecond = 2\nthird = 3\n```\n\nend", 5),
        ("```python\nif x:\n    y = 1\n    z = 2\n```\n\nend", 20),
        ("```python\nfirst = 1\n```\n\nthe end", 23),
        ("- one\n- two words\n- three", 12),
        ("# Title\n\nsome **bold** text", 18),
    ],
)
@pytest.mark.parametrize("way", ["resize", "stop"])
def test_after_a_resize_or_a_stop_an_answer_goes_on_where_it_was(
    source: str, at: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = _rendered(30, monkeypatch)
    whole.show(Piece(source, thought=False))
    whole.finish()
    display, screen = _rendered(30, monkeypatch)
    display.show(Piece(source[:at], thought=False))
    if way == "resize":
        display._console.size = ConsoleDimensions(50, 30)
    else:
        display.moved()
    for sign in source[at:]:
        display.show(Piece(sign, thought=False))
    display.finish()
    words = [" ".join(shown.lines).replace("*", "").split() for shown in (screen, expected)]
    assert words[0] == words[1]


def test_a_table_goes_on_with_its_header_after_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(30, monkeypatch)
    display.show(Piece("| a | b |\n| - | - |\n| 1 | 2 |\n| 3 |", thought=False))
    display._console.size = ConsoleDimensions(50, 30)
    display.show(Piece(" 4 |\n", thought=False))
    display.finish()
    rows = [line.split() for line in screen.lines if line.split()]
    table = [["a", "b"], ["────"], ["1", "2"]]
    assert rows == [*table, ["3"], *table[:2], ["3", "4"]]


@pytest.mark.parametrize("width", [60, 80])
def test_help_and_settings_are_no_wider_than_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, screen = _rendered(40, monkeypatch)
    display._console.size = ConsoleDimensions(width, 40)
    monkeypatch.setattr(
        Screen, "write", lambda self, text: self.__dict__.update(raw=self.raw + text)
    )
    display.table((*USAGE, *KEYS))
    display.note(HINTS)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.raw)
    assert max(map(len, plain.splitlines())) <= width
    assert {word for line in plain.splitlines() for word in line.split()} >= set(HINTS.split())


def test_a_path_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(10, monkeypatch)
    path = "/" + "x" * 100
    display.write(f"Saved as {path}\n")
    assert path in screen.raw


def test_a_copy_goes_to_the_terminal_in_base64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display, _ = _rendered(10, monkeypatch)
    display.copy("שלום")
    code = base64.b64encode("שלום".encode()).decode()
    assert capsys.readouterr().out == f"\x1b]52;c;{code}\x07"


def test_something_turns_until_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    display, screen = _rendered(10, monkeypatch)
    display.wait("Reading 7 tokens")
    assert screen.lines[0].endswith("Reading 7 tokens...")
    assert not screen.screen.cursor.hidden
    display.show(Piece("Yes", thought=False))
    display.finish()
    assert _without_end(screen.lines) == ["Yes"]
