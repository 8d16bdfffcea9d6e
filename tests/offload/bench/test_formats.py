"""What rows look like: tables for terminals and files, csv, json, jsonl, pictures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from offload.quant.errors import OffloadError

from offload.bench.output import (
    CsvPrinter,
    Earlier,
    JsonlPrinter,
    JsonPrinter,
    TablePrinter,
    ended,
    read_earlier,
)
from offload.bench.picture import check_picture, save_picture
from offload.bench.run import Row
from offload.bench.sample import Test
from offload.options import LoadOptions
from tests.offload.bench.rows import row

TESTS = [Test(8, 0), Test(0, 4)]


def tables(rows: list[Row], settings: list[LoadOptions], columns: int | None = None) -> list[str]:
    out = io.StringIO()
    with ended(TablePrinter(out, TESTS, settings, columns=columns)) as printer:
        for one in rows:
            printer.row(one)
    return out.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_lines_of_a_table_are_equally_long() -> None:
    lines = tables([row(Test(8, 0)), row()], [LoadOptions()])
    first, second = lines[:4], lines[5:]
    assert lines[4] == ""
    assert len({len(line) for line in first}) == len({len(line) for line in second}) == 1


def test_the_second_table_holds_times_memory_and_bounds() -> None:
    lines = tables([row(Test(8, 0)), row()], [LoadOptions()])
    assert cells(lines[5])[1:] == [
        "test", "first ms", "p50 ms", "p95", "p99", "peak GiB", "bound t/s", "reached",
    ]  # fmt: skip
    assert cells(lines[7])[1:6] == ["pp8", "5.0", "-", "-", "-"]
    assert cells(lines[8])[1:4] == ["tg4", "-", "10.0"]


def test_what_is_swept_has_a_column() -> None:
    settings = [LoadOptions(policy="lru"), LoadOptions(policy="lfru")]
    lines = tables([row(policy="lru"), row(policy="lfru")], settings)
    assert cells(lines[0])[4:6] == ["policy", "test"]
    assert [cells(line)[4] for line in lines[2:4]] == ["lru", "lfru"]
    assert "look-ahead" not in lines[0]
    lines = tables(
        [row(lookahead=True)], [LoadOptions(lookahead=True), LoadOptions(lookahead=False)]
    )
    assert cells(lines[2])[4] == "on"


def test_a_narrow_terminal_has_the_model_above_its_rows() -> None:
    rows = [row(bits="q8"), row(bits="q8"), row(bits="q4")]
    lines = tables(rows, [LoadOptions(expert_bits=8), LoadOptions(expert_bits=4)], columns=90)
    assert all(len(line) <= 90 for line in lines)
    assert lines[0] == "tiny q8, 1.00 GiB, 1.00 B, CPU"
    assert lines.count("tiny q4, 1.00 GiB, 1.00 B, CPU") == 2  # in both tables
    assert cells(lines[2])[0] == "test"


def test_csv_has_llama_benchs_quotes_and_no_samples() -> None:
    out = io.StringIO()
    with ended(CsvPrinter(out)) as printer:
        printer.row(row())
        first = out.getvalue()
        printer.row(row(Test(8, 0), lookahead=False))
    assert len(first.splitlines()) == 2  # a row is there as soon as it is measured
    assert first.startswith('"build","cpu_info"')
    decode, prefill = csv.DictReader(io.StringIO(out.getvalue()))
    assert decode["n_gen"] == "4"
    assert "samples_ns" not in decode
    assert (decode["lookahead"], prefill["lookahead"]) == ("", "0")


def test_jsonl_is_a_row_a_line() -> None:
    out = io.StringIO()
    with ended(JsonlPrinter(out)) as printer:
        printer.row(row())
        assert json.loads(out.getvalue()) == row().to_json()
        printer.row(row(Test(8, 0)))
    assert len(out.getvalue().splitlines()) == 2


def test_json_is_whole_also_when_it_is_broken_off() -> None:
    out = io.StringIO()

    def broken_off() -> None:
        with ended(JsonPrinter(out)) as printer:
            printer.row(row())
            printer.row(row(Test(8, 0)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert json.loads(out.getvalue()) == [row().to_json(), row(Test(8, 0)).to_json()]
    empty = io.StringIO()
    with ended(JsonPrinter(empty)):
        pass
    assert json.loads(empty.getvalue()) == []


# --- --compare -----------------------------------------------------------------------------------


def test_a_ratio_has_both_runs_errors() -> None:
    then = {**row(token_ms=(20, 20, 20, 20)).to_json(), "stddev_ts": 5.0}  # of 50 t/s: 10%
    ratio = Earlier((then,)).ratio(row())
    assert ratio is not None
    assert ratio.value == pytest.approx(2)
    assert ratio.error == pytest.approx(0.2)
    assert str(ratio) == "2.00 ± 0.20"


def test_a_row_is_compared_with_the_one_of_its_settings() -> None:
    earlier = Earlier(
        (
            row(policy="lru", token_ms=(20, 20, 20, 20)).to_json(),
            row(policy="lfru", token_ms=(40, 40, 40, 40)).to_json(),
            row(Test(8, 0)).to_json(),
        )
    )

    def value(now: Row) -> float | None:
        ratio = earlier.ratio(now)
        return None if ratio is None else ratio.value

    assert value(row(policy="lru")) == pytest.approx(2)
    assert value(row(policy="lfru")) == pytest.approx(4)
    assert value(row(policy="lru", slots=12)) == pytest.approx(2)  # the nearest
    assert value(row(policy="fifo")) is None  # as near to both
    assert value(row(Test(16, 0))) is None


def test_why_there_is_no_ratio_names_the_rows_there_are() -> None:
    earlier = Earlier(
        (
            row(policy="lru").to_json(),
            row(policy="lfru").to_json(),
            row(Test(8, 0)).to_json(),
        )
    )
    assert earlier.why_none(row(policy="lru")) == ""
    absent = earlier.why_none(row(Test(16, 0)))
    assert "nothing to compare with model=tiny text=real n_prompt=16 " in absent
    assert "n_prompt=8 n_gen=0" in absent
    assert "n_prompt=0 n_gen=4" in absent
    assert "-p, -n" in absent
    unclear = earlier.why_none(row(policy="fifo"))
    assert "policy=lru; policy=lfru; measure with one's settings" in unclear
    twice = Earlier((row().to_json(), row().to_json()))
    assert "all alike" in twice.why_none(row())
    assert "\n" not in absent + unclear
    many = Earlier(tuple(row(Test(8 + at, 0)).to_json() for at in range(9)))
    assert "and 5 more" in many.why_none(row())


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_what_was_written_can_be_compared_with(kind: str, tmp_path: Path) -> None:
    out = io.StringIO()
    printer = JsonPrinter(out) if kind == "json" else JsonlPrinter(out)
    with ended(printer):
        printer.row(row())
    file = tmp_path / "rows"
    file.write_text(out.getvalue())
    ratio = read_earlier(file).ratio(row())
    assert ratio is not None
    assert ratio.value == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[1]", "[{}]", "\0", '[{"model": 1}]', "[" * 100_000]
    + [json.dumps([{**row().to_json(), "avg_ts": bad}]) for bad in (0, "fast", None, float("nan"))],
)
def test_what_is_no_bench_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(OffloadError, match="name what offload bench -o json wrote"):
        read_earlier(file)
    with pytest.raises(OffloadError, match="cannot compare"):
        read_earlier(tmp_path / "missing.json")


# --- --plot --------------------------------------------------------------------------------------


def test_a_picture_has_a_line_for_each_setting_but_residency(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(test, slots=slots, policy=policy)
        for policy in ("lru", "lfru")
        for slots in (24, 6)
        for test in TESTS
    ]
    file = tmp_path / "speed.png"
    check_picture(file)
    save_picture(rows, file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OffloadError, match="name another --plot"):
        check_picture(tmp_path / "no" / "speed.png")
    with pytest.raises(OffloadError, match="name another --plot"):
        check_picture(tmp_path)
