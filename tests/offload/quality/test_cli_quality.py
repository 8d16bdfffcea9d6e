"""The output, exit codes and baselines of `offload ppl` and `offload check`."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

import cli
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.quality import check
from offload.quant.errors import OffloadError
from tests.offload.quality.test_check import perturbed
from tests.test_cli import Done, Run
from tests.test_cli import run as run  # a fixture

LINE = re.compile(r"Perplexity: \d+\.\d{3} ± \d+\.\d{3}")
PROMPTS = "--- one\nThe quick brown fox jumps.\n--- two\ndef f(x):\n    return x + 1\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("שלום, this is a text. " * 20, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


# --- ppl -----------------------------------------------------------------------------------------


def test_ppl_prints_llama_cpps_line_and_nothing_else(
    run: Run, mixtral_pack: Path, text: Path
) -> None:
    done = run("ppl", mixtral_pack, "-f", text, "-c", "64", "--stride", "48")
    assert done.code == 0
    assert LINE.fullmatch(done.out.rstrip("\n"))
    assert done.out.endswith("\n")
    assert done.err.startswith("[ Experts: 24 of 24 in memory")


def test_ppl_reads_a_pipe(
    run: Run, mixtral_pack: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_file = run("ppl", mixtral_pack, "-f", text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text.read_text(encoding="utf-8")))
    assert run("ppl", mixtral_pack).out == from_file.out


def test_ppl_does_not_depend_on_what_is_resident(run: Run, mixtral_pack: Path, text: Path) -> None:
    outs = {
        run("ppl", mixtral_pack, "-f", text, "--expert-slots", slots).out for slots in ("1", "24")
    }
    assert len(outs) == 1


def test_ppl_as_json(run: Run, mixtral_pack: Path, text: Path) -> None:
    line = run("ppl", mixtral_pack, "-f", text, "-c", "64").out
    data = json.loads(run("ppl", mixtral_pack, "-f", text, "-c", "64", "--json").out)
    figures = f"{data['perplexity']:.3f} ± {data['perplexity_error']:.3f}"
    assert line == f"Perplexity: {figures}\n"
    assert (data["window"], data["stride"]) == (64, 32)
    assert data["tokens"] == len(text.read_bytes()) - 1
    assert data["model"]["settings"]["bits"] == "experts=4g64"


def one_line(done: Done) -> str:
    """The only line of error, which is also the last line of stderr."""
    assert done.code == 1
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith("offload: error: ")]
    assert done.err.splitlines()[-1:] == lines
    return lines[0]


def test_ppl_needs_a_text(
    run: Run, mixtral_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    assert "give one with -f or a pipe" in one_line(run("ppl", mixtral_pack))
    assert "cannot read the text" in one_line(run("ppl", mixtral_pack, "-f", tmp_path / "none"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in one_line(run("ppl", mixtral_pack, "-f", tmp_path / "bytes"))
    assert "is empty" in one_line(run("ppl", "none", "-f", os.devnull))
    (tmp_path / "short").write_text("ab")
    error = one_line(run("ppl", mixtral_pack, "-f", tmp_path / "short"))
    assert "short has 2 tokens, too few to measure: give at least 3" in error


def test_ppl_needs_a_stride_inside_the_window(run: Run, mixtral_pack: Path, text: Path) -> None:
    done = run("ppl", mixtral_pack, "-f", text, "-c", "32", "--stride", "32")
    assert "the stride is 32: give --stride at least 1 and at most 31" in one_line(done)
    done = run("ppl", mixtral_pack, "-f", text, "-c", "0")
    assert "a window of 0 tokens scores nothing: raise --ctx-size" in one_line(done)


@pytest.mark.parametrize("flags", [(), ("--stride", "0"), ("--stride", "x"), ("-c", "-1")])
def test_wrong_usage_is_exit_code_2(flags: tuple[str, ...]) -> None:
    command = ["check", "demo"] if not flags else ["ppl", "demo", *flags]
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 2


@pytest.mark.parametrize("command", ["ppl", "check"])
def test_both_have_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"example: offload {command} " in capsys.readouterr().out


# --- check ---------------------------------------------------------------------------------------


def test_check_prints_the_figures(
    run: Run, mixtral: Path, mixtral_pack: Path, prompts: Path
) -> None:
    done = run("check", mixtral_pack, "--against", mixtral, "--prompts", prompts)
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["prompt", "one", "two", "all"]
    assert re.fullmatch(r"KL\(reference \|\| model\): 0\.0\d+ ± 0\.0\d+ nats", lines[-3])
    assert re.fullmatch(r"Same top token: \d+\.\d\d% ± \d+\.\d\d%", lines[-2])
    assert lines[-1].startswith("Perplexity: ")


def test_check_as_json(run: Run, mixtral: Path, mixtral_pack: Path) -> None:
    done = run("check", mixtral_pack, "--against", mixtral, "--plain", "--json")
    data = json.loads(done.out)
    assert data["prompts"]["names"] == ["prose", "code", "maths", "dialogue", "hebrew"]
    assert data["reference"]["settings"]["runner"] == "transformers"
    assert data["model"]["settings"]["bits"] == "experts=4g64"
    assert 0 < data["figures"]["kl_mean"] < data["figures"]["kl_p99"] < data["figures"]["kl_max"]
    assert data["worse"] is None
    assert data["by_prompt"].keys() == set(data["prompts"]["names"])


def test_check_passes_a_good_pack_and_fails_a_damaged_one(
    run: Run, mixtral: Path, mixtral_pack: Path, prompts: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    common = ("--against", mixtral, "--prompts", prompts)
    saved = run("check", mixtral_pack, *common, "--save-baseline", baseline)
    assert (saved.code, saved.err.splitlines()[-1]) == (0, f"the figures are saved in {baseline}")

    good = run("check", mixtral_pack, *common, "--baseline", baseline)
    assert (good.code, good.err) == (0, f"no figure is worse than {baseline} allows\n")

    better = run("check", mixtral, "--bits", "q8", *common, "--baseline", baseline)
    assert better.code == 0
    assert "the baseline was measured with {" in better.err

    checkpoint = perturbed(mixtral, tmp_path / mixtral.name, 0.5)
    damaged = find_or_make_pack(str(checkpoint), LoadOptions(), destination=tmp_path / "damaged")
    bad = run(
        "check", damaged, *common, "--baseline", baseline, "--save-baseline", tmp_path / "new.json"
    )
    assert bad.code == 1
    assert bad.out.startswith("prompt")  # the figures are printed even if the check fails
    error = bad.err.splitlines()[-1]
    assert error.startswith(f"offload: error: worse than {baseline} allows: kl_mean 0.")
    assert "kl_median" in error
    assert not (tmp_path / "new.json").exists()  # a check that fails saves no baseline

    as_json = run("check", damaged, *common, "--baseline", baseline, "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["worse"][0]["figure"] == "kl_mean"


def test_check_refuses_a_baseline_of_something_else(
    run: Run, mixtral_pack: Path, prompts: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    common = ("check", mixtral_pack, "--against", mixtral_pack)
    run(*common, "--prompts", prompts, "--save-baseline", baseline)
    error = run(*common, "--baseline", baseline).err.splitlines()[-1]
    assert "the baseline is of another set of prompts" in error
    assert run(*common, "--baseline", baseline).code == 1
    baseline.write_text("{}")
    assert "not a usable baseline" in one_line(run(*common, "--baseline", baseline))
    assert "cannot read" in one_line(run(*common, "--baseline", tmp_path / "none.json"))
    missing = tmp_path / "no" / "folder.json"
    assert "No such file or directory" in one_line(run(*common, "--save-baseline", missing))
    assert "is not a file" in one_line(run(*common, "--save-baseline", tmp_path))


def test_a_plain_reference_has_the_threads_that_were_asked_for(
    run: Run, mixtral: Path, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        raise OffloadError(f"threads {threads}")

    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(check.AutoModelForCausalLM, "from_pretrained", refuse)
    told = run("check", mixtral_pack, "--against", mixtral, "--plain", "-t", "3")
    assert one_line(told).endswith("threads [3]")


def test_a_saved_baseline_keeps_the_tolerances_it_passed(
    run: Run, mixtral_pack: Path, prompts: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    common = ("check", mixtral_pack, "--against", mixtral_pack, "--prompts", prompts)
    run(*common, "--save-baseline", baseline)
    data = json.loads(baseline.read_text())
    data["tolerances"]["kl_max"]["absolute"] = 0.5
    baseline.write_text(json.dumps(data))
    assert run(*common, "--baseline", baseline, "--save-baseline", baseline).code == 0
    assert json.loads(baseline.read_text())["tolerances"]["kl_max"]["absolute"] == 0.5
