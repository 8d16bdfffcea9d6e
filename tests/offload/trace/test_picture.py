"""Heat maps: what their signs say, in a terminal, a file and a PNG."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

import cli
from offload.cache.trace.file import write
from offload.cache.trace.heatmap import BLOCKS, PLAIN_BLOCKS, HeatMap, draw, draw_for
from offload.cache.trace.synthetic import MIXTRAL, Routing, synthesize

HEAT = HeatMap(
    uses=((9.0, 3.0, 0.0, 1.0), (0.0, 5.0, 5.0, 0.0)),
    resident=((True, True, True, False), (False, False, True, False)),
    hit_rates=(0.9, 0.5),
)


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.trace"
    write(file, synthesize(replace(MIXTRAL, layers=4), Routing(), 20))
    return file


def test_blocks_are_resident_points_are_not_fuller_is_used_more() -> None:
    title, numbers, first, second, share, here, elsewhere = draw(HEAT, width=None).splitlines()
    assert title == "2 layers, one per row; 4 experts each, one per column"
    assert numbers == "     0 2"
    assert first == "   0 █▒░.  90.0% hits"
    assert second == "   1  !█   50.0% hits"
    assert share == "4 of 8 experts in memory (50%)"
    assert here == "in memory:     ░ never used   ▒ ▓ █ used more and more"
    assert elsewhere == "not in memory:   never used   . : ! used more and more"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_map_is_as_wide_as_the_terminal_and_numbers_its_columns(width: int) -> None:
    _, numbers, first, *_ = draw(HEAT, width=width).splitlines()
    assert width - 4 <= len(first) <= width
    for number in range(4):
        assert numbers.index(str(number)) == first.index("█▒░."[number])


def test_a_rate_that_is_not_known_is_not_shown() -> None:
    assert "hits" not in draw(replace(HEAT, hit_rates=(None, None)))


def test_wide_layers_are_folded() -> None:
    wide = HeatMap(((1.0,) * 100,), ((True,) * 100,), (1.0,))
    _, *lines, _, _, _ = draw(wide, width=80).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.count("█") for line in lines) == 100


def test_colours_at_a_terminal_only_and_not_against_the_users_will(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38;5;" in draw_for(Terminal(), HEAT)
    assert "\x1b" not in draw_for(io.StringIO(), HEAT)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in draw_for(Terminal(), HEAT)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in draw_for(Terminal(), HEAT)


def test_plain_signs_where_blocks_cannot_be_written() -> None:
    text = draw_for(Terminal("ascii"), HEAT)
    assert not set(text) & set(BLOCKS)
    assert set(text) & set(PLAIN_BLOCKS)
    text.encode("ascii")


def test_a_trace_is_drawn_on_stdout(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "plot", str(trace_file), "--expert-slots", "50%"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("lfru, replayed without look-ahead")
    assert "16 of 32 experts in memory" in lines[-4]


def test_a_trace_is_drawn_as_png(trace_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "experts.png"
    assert cli.main(["trace", "plot", str(trace_file), "-o", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_png_without_matplotlib_says_how_to_get_it(
    trace_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["trace", "plot", str(trace_file), "-o", "x.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_png_that_cannot_be_written_is_told(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["trace", "plot", str(trace_file), "-o", "/nowhere/x.png"]) == 1
    assert "cannot write the picture to /nowhere/x.png" in capsys.readouterr().err
