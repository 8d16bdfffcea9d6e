"""`offload bench`: llama-bench's tests, columns and keys, sweeps, and interrupted runs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import cli
from offload import GenerationError, load, stream_generate
from offload.bench.row import Test
from offload.bench.run import measure_link, take_sample
from offload.bench.run import run as run_tests
from offload.engine.handle import offload_of
from offload.engine.history import read_hot
from offload.machine.measure import processor_name
from offload.quant.pack import Pack
from tests.test_cli import Run
from tests.test_cli import run as run  # a fixture

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "bench.schema.json").read_text())
BENCH = ("-p", "8", "-n", "4", "-r", "2", "-c", "64")
COLUMNS = [
    "model",
    "size",
    "params",
    "backend",
    "test",
    "t/s",
    "slots",
    "resident %",
    "hit %",
    "MiB/token",
    "link %",
]


def _table(out: str) -> list[list[str]]:
    """The cells of the first table in `out`."""
    first = out.partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]


def test_bench_prints_a_table_with_llama_benchs_columns_and_ours(
    run: Run, mixtral_pack: Path
) -> None:
    done = run("bench", mixtral_pack, *BENCH, "-pg", "6,2", "--expert-slots", "25%")
    assert done.code == 0
    header, rule, *rows = _table(done.out)
    assert header == COLUMNS
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    assert [row[4] for row in rows] == ["pp8", "tg4", "pp6+tg2"]
    for row in rows:
        cells = dict(zip(COLUMNS, row, strict=True))
        assert cells["backend"] == "CPU"
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", cells["t/s"])
        assert (cells["slots"], cells["resident %"]) == ("6", "25%")
        assert re.fullmatch(r"\d+\.\d%", cells["hit %"])
        assert re.fullmatch(r"\d+\.\d", cells["MiB/token"])
        assert re.fullmatch(r"\d+%", cells["link %"])
        assert re.fullmatch(r"\d+\.\d\d GiB", cells["size"])
        assert re.fullmatch(r"\d+\.\d\d B", cells["params"])
        assert "tiny-mixtral" in cells["model"]


def test_bench_names_the_depth(run: Run, mixtral_pack: Path) -> None:
    _, _, *rows = _table(run("bench", mixtral_pack, *BENCH, "-d", "16", "--no-warmup").out)
    assert [row[4] for row in rows] == ["pp8 @ d16", "tg4 @ d16"]


@pytest.mark.parametrize("text", ["--random", None])
def test_bench_writes_llama_benchs_json_and_ours(
    text: str | None, run: Run, mixtral_pack: Path
) -> None:
    done = run("bench", mixtral_pack, *BENCH, "-o", "json", *([text] if text else []))
    prefill, decode = json.loads(done.out)
    keys = [
        "n_prompt",
        "n_gen",
        "n_depth",
        "test_time",
        "avg_ns",
        "stddev_ns",
        "avg_ts",
        "stddev_ts",
        "samples_ns",
        "samples_ts",
    ]
    ours = [
        "expert_slots",
        "total_experts",
        "hit_rate",
        "mib_per_token",
        "link_share",
        "model",
        "bits",
    ]
    for result in (prefill, decode):
        assert {*keys, *ours} <= result.keys()
        assert [key for key in result if key in keys] == keys
        assert len(result["samples_ns"]) == len(result["samples_ts"]) == 2
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", result["test_time"])
        assert result["avg_ns"] == pytest.approx(sum(result["samples_ns"]) / 2, abs=1)
        tokens = result["n_prompt"] + result["n_gen"]
        rates = [tokens / ns * 1e9 for ns in result["samples_ns"]]
        assert result["samples_ts"] == pytest.approx(rates)
        assert result["avg_ts"] == pytest.approx(sum(rates) / 2)
        assert result["cpu_info"] == processor_name()
        assert result["text"] == ("random" if text else "real")
        assert 0 <= result["hit_rate"] <= 1
    assert (prefill["n_prompt"], prefill["n_gen"]) == (8, 0)
    assert (decode["n_prompt"], decode["n_gen"]) == (0, 4)


def test_a_model_without_tokenizer_can_only_read_random_tokens(mixtral_pack: Path) -> None:
    model, _ = load(mixtral_pack, device="cpu")
    tests = [Test(4, 0)]
    with pytest.raises(GenerationError, match="pass --random"):
        next(run_tests(model, None, tests))
    (measured,) = run_tests(model, None, tests, random=True)
    assert measured.text == "random"
    model.offload.close()


def test_bench_leaves_the_cache_in_order(mixtral_pack: Path) -> None:
    model, tokenizer = load(mixtral_pack, device="cpu", expert_slots=3)

    def tokens() -> list[int]:
        return [step.token for step in stream_generate(model, None, [1, 2], max_new_tokens=6)]

    expected = tokens()
    results = list(run_tests(model, tokenizer, [Test(8, 0), Test(0, 4)], repetitions=2))
    assert [result.test.name for result in results] == ["pp8", "tg4"]
    offload_of(model).engine.cache.check_integrity()
    assert tokens() == expected
    model.offload.close()


def test_the_measured_bandwidth_does_not_depend_on_when_copies_are_waited_for(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(mixtral_pack, device="cpu", expert_slots=1)
    transfer = model.offload.engine.transfer

    def late(ticket: object) -> None:
        time.sleep(0.002)
        type(transfer).wait(transfer, ticket)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "wait", late)
        assert 0.001 < measure_link(model.offload.engine, copies=16) < 1000
    model.offload.close()


# --- sweeps --------------------------------------------------------------------------------------


def test_lists_make_one_table(run: Run, mixtral_pack: Path) -> None:
    done = run(
        "bench", mixtral_pack, "-p", "8,4", "-n", "0", "-r", "1", "-c", "64",
        "--expert-slots", "25%,100%", "--policy", "lru,lfru", "--lookahead", "on,off",
    )  # fmt: skip
    assert done.code == 0
    header, _, *rows = _table(done.out)
    at = {name: header.index(name) for name in ("policy", "look-ahead", "test", "slots")}
    settings = [
        (slots, policy, lookahead, test)
        for slots in ("6", "24")
        for policy in ("lru", "lfru")
        for lookahead in ("on", "off")
        for test in ("pp8", "pp4")
    ]
    found = [
        (row[at["slots"]], row[at["policy"]], row[at["look-ahead"]], row[at["test"]])
        for row in rows
    ]
    assert found == settings


def test_bits_are_swept_over_a_checkpoint(run: Run, mixtral: Path) -> None:
    rows = json.loads(
        run(
            "bench", mixtral, "-p", "4", "-n", "0", "-r", "1", "-c", "64", "-o", "json",
            "--expert-bits", "8,4",
        ).out
    )  # fmt: skip
    assert [row["bits"] for row in rows] == ["experts=8g64", "experts=4g64"]
    assert rows[0]["model_size"] > rows[1]["model_size"]


@pytest.mark.parametrize(
    ("flags", "value"),
    [(["--no-lookahead"], False), (["--lookahead"], True), ([], None)],
)
def test_lookahead_is_a_switch_too(
    flags: list[str], value: bool | None, run: Run, mixtral_pack: Path
) -> None:
    done = run("bench", mixtral_pack, "-p", "4", "-n", "0", "-r", "1", "-o", "jsonl", *flags)
    assert json.loads(done.out)["lookahead"] is value


def test_bench_leaves_no_heat_behind(run: Run, mixtral_pack: Path) -> None:
    pack = Pack(mixtral_pack)
    before = list(read_hot(pack.path, pack.info))
    run("bench", mixtral_pack, *BENCH)
    assert list(read_hot(pack.path, pack.info)) == before
    pack.close()


@pytest.mark.parametrize("flag", ["--trace", "--timeline"])
def test_a_sweep_is_not_recorded(flag: str, run: Run, mixtral_pack: Path, tmp_path: Path) -> None:
    done = run("bench", mixtral_pack, *BENCH, "--policy", "lru,lfru", flag, tmp_path / "file")
    assert done.code == 1
    assert "give each option one value" in done.err
    assert not (tmp_path / "file").exists()


# --- formats -------------------------------------------------------------------------------------


def test_json_is_as_its_schema_says(run: Run, mixtral_pack: Path, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    done = run(
        "bench", mixtral_pack, *BENCH, "-pg", "6,2", "-d", "0,4", "--expert-slots", "25%",
        "-o", "json",
    )  # fmt: skip
    rows = json.loads(done.out)
    jsonschema.validate(rows, SCHEMA)
    assert len(rows) == 6
    assert [*rows[0]] == [key for key in SCHEMA["$defs"]["row"]["properties"] if key in rows[0]]
    (tmp_path / "before.json").write_text(done.out)
    lines = run(
        "bench", mixtral_pack, *BENCH, "-o", "jsonl", "--random", "--compare",
        tmp_path / "before.json",
    ).out.splitlines()  # fmt: skip
    compared = [json.loads(line) for line in lines]
    jsonschema.validate(compared, SCHEMA)
    assert [row["ratio"] for row in compared] == [None, None]  # of another text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{**rows[0], "more": 1}], SCHEMA)


def test_a_comparison_has_a_column(run: Run, mixtral_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text(run("bench", mixtral_pack, *BENCH, "-o", "json").out)
    header, _, *rows = _table(
        run("bench", mixtral_pack, *BENCH, "--compare", tmp_path / "before.json").out
    )
    assert header[-1] == "vs before"
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[-1]) for row in rows)
    other = ("-p", "0", "-n", "5", "-r", "1", "-c", "64")
    done = run("bench", mixtral_pack, *other, "--compare", tmp_path / "before.json")
    said = [line for line in done.err.splitlines() if line.startswith("--compare: ")]
    assert len(said) == 1
    assert "the file has" in said[0]


def test_a_file_that_cannot_be_compared_with_is_refused_before_a_model_is_loaded(
    run: Run, mixtral_pack: Path, tmp_path: Path
) -> None:
    done = run("bench", "no-such-model", *BENCH, "--compare", tmp_path / "nothing.json")
    assert (done.code, done.out) == (1, "")
    assert "cannot read" in done.err


def test_csv_and_a_picture(run: Run, mixtral_pack: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(
        "bench", mixtral_pack, *BENCH, "-o", "csv", "--expert-slots", "6,24",
        "--plot", tmp_path / "speed.png",
    )  # fmt: skip
    assert done.code == 0
    assert len(done.out.splitlines()) == 5
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("output", ["md", "csv", "json", "jsonl"])
def test_an_interrupted_sweep_keeps_its_rows(
    output: str,
    capsys: pytest.CaptureFixture[str],
    mixtral_pack: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = 0

    def sample(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 4:  # in the second setting
            raise KeyboardInterrupt
        return take_sample(*arguments)

    monkeypatch.setattr("offload.bench.run.take_sample", sample)
    code = cli.main(
        ["bench", str(mixtral_pack), "-p", "4", "-n", "0", "-r", "1", "-o", output,
         "--policy", "lru,lfru"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 130
    if output == "json":
        assert [row["policy"] for row in json.loads(out)] == ["lru"]
    if output == "jsonl":
        assert [json.loads(line)["policy"] for line in out.splitlines()] == ["lru"]
    if output == "csv":
        assert len(out.splitlines()) == 2
    if output == "md":
        assert len(_table(out)) == 3
