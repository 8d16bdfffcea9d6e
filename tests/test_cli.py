"""The commands: what they write to stdout and to stderr, their flags and their help."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import cli
from offload.main import COMMANDS
from offload.quant.pack import Pack
from tests.conftest import Script

ROOT = Path(__file__).parents[1]
ANSWER = "שלום 👋, it is\nblue."
TIMINGS = re.compile(r"\[ Prompt: \d+\.\d t/s \| Generation: \d+\.\d t/s \]")
EXPERTS = re.compile(
    r"\[ Experts: \d+ of 24 in memory"  # a script's model asks for no experts
    r"( \| hits \d+\.\d% \| \d+\.\d MiB/token \| look-ahead (\d+%|off))? \]"
)
VERBOSE_ROWS = [
    ("total duration", r"\d+\.\d\d(ms|s)"),
    ("load duration", r"\d+\.\d\d(ms|s)"),
    ("prompt eval count", r"\d+ token\(s\)"),
    ("prompt eval duration", r"\d+\.\d\d(ms|s)"),
    ("prompt eval rate", r"\d+\.\d\d tokens/s"),
    ("eval count", r"\d+ token\(s\)"),
    ("eval duration", r"\d+\.\d\d(ms|s)"),
    ("eval rate", r"\d+\.\d\d tokens/s"),
]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run_(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run_


# --- generate: the answer and its timings --------------------------------------------------------


def test_stdout_holds_the_answer_and_nothing_else(
    run: Run, script: Script, mixtral: Path, mixtral_pack: Path
) -> None:
    script.say(ANSWER)
    for model in (mixtral, mixtral_pack):  # quantised first, and opened
        done = run("generate", model, "-p", "Why?")
        assert (done.code, done.out) == (0, ANSWER + "\n")


def test_the_timings_line_and_the_experts_line_end_stderr(
    run: Run, script: Script, mixtral_pack: Path
) -> None:
    script.say(ANSWER)
    lines = run("generate", mixtral_pack, "-p", "Why?").err.splitlines()
    assert lines[0] == ""
    assert TIMINGS.fullmatch(lines[1])
    assert EXPERTS.fullmatch(lines[2])
    assert len(lines) == 3


def test_without_timings_stderr_only_says_what_was_cut(run: Run, mixtral_pack: Path) -> None:
    done = run("generate", mixtral_pack, "-p", "Why?", "-n", "3", "--no-show-timings")
    assert (done.code, done.err) == (0, "(stopped at 3 tokens)\n")


def test_verbose_rows_come_in_ollamas_order(run: Run, script: Script, mixtral_pack: Path) -> None:
    script.say("abcdef")
    done = run("generate", mixtral_pack, "-p", "Why?", "--raw", "--verbose")
    rows = [line.split(":") for line in done.err.splitlines()[: len(VERBOSE_ROWS)]]
    assert [name for name, _ in rows] == [name for name, _ in VERBOSE_ROWS]
    for (name, value), (_, pattern) in zip(rows, VERBOSE_ROWS, strict=True):
        assert re.fullmatch(pattern, value.strip()), name
    values = {name: value.strip() for name, value in rows}
    assert values["prompt eval count"] == "4 token(s)"
    assert values["eval count"] == "7 token(s)"
    assert TIMINGS.search(done.err)


def test_a_real_answer_agrees_with_python(run: Run, mixtral_pack: Path) -> None:
    from offload import generate, load

    model, tokenizer = load(mixtral_pack, device="cpu")
    text = generate(model, tokenizer, "Why?", max_new_tokens=9)
    model.offload.close()
    for slots in ("1", "25%", "100%"):
        done = run(
            "generate", mixtral_pack, "-p", "Why?", "--raw", "-n", "9", "--temp", "0",
            "--expert-slots", slots,
        )  # fmt: skip
        assert done.out == text + "\n"


def test_a_quarter_of_the_experts_can_be_resident(run: Run, mixtral_pack: Path) -> None:
    done = run("generate", mixtral_pack, "-p", "Why?", "-n", "3", "--expert-slots", "25%")
    assert "[ Experts: 6 of 24 in memory |" in done.err


# --- generate: prompts ---------------------------------------------------------------------------


def test_the_prompt_goes_through_the_chat_template(
    run: Run, script: Script, mixtral_pack: Path
) -> None:
    run("generate", mixtral_pack, "-p", "Why?")
    assert script.prompt == "<user>Why?</user><assistant>"
    run("generate", mixtral_pack, "-p", "Why?", "-sys", "be brief")
    assert script.prompt == "<system>be brief</system><user>Why?</user><assistant>"


def test_a_raw_prompt_does_not(run: Run, script: Script, mixtral_pack: Path) -> None:
    run("generate", mixtral_pack, "-p", "Why?", "--raw")
    assert script.prompt == "Why?"


def test_a_file_is_a_prompt(run: Run, script: Script, mixtral_pack: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("שלום\nמה שלומך?", encoding="utf-8")
    run("generate", mixtral_pack, "-f", file, "--raw")
    assert script.prompt == "שלום\nמה שלומך?"


def test_a_pipe_is_a_prompt_unless_there_is_another(
    run: Run, script: Script, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from the pipe"))
    run("generate", mixtral_pack, "--raw")
    assert script.prompt == "from the pipe"
    monkeypatch.setattr("sys.stdin", io.StringIO("from the pipe"))
    run("generate", mixtral_pack, "--raw", "-p", "from the flag")
    assert script.prompt == "from the flag"


def test_the_command_in_a_pipeline(mixtral_pack: Path) -> None:
    """One real process: a prompt comes in by a pipe, the answer alone goes out by another."""
    command = [sys.executable, "-m", "cli", "generate", mixtral_pack, "-n", "12", "--temp", "0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=b"Why?",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0
    text = done.stdout.decode()
    assert text.endswith("\n")
    assert "Prompt:" not in text
    lines = done.stderr.decode().splitlines()
    assert TIMINGS.fullmatch(lines[-2])
    assert EXPERTS.fullmatch(lines[-1])
    assert lines[:-2] == ["(stopped at 12 tokens)", ""]


# --- generate: limits, seeds, stop strings -------------------------------------------------------


def test_n_limits_the_answer(run: Run, script: Script, mixtral_pack: Path) -> None:
    script.say("abcdef")
    assert run("generate", mixtral_pack, "-p", "a", "-n", "3").out == "abc\n"
    assert run("generate", mixtral_pack, "-p", "a", "-n", "-1").out == "abcdef\n"


def test_without_n_the_context_is_the_limit(run: Run, script: Script, mixtral_pack: Path) -> None:
    script.say("x" * 999)
    assert run("generate", mixtral_pack, "-p", "abcd", "--raw", "-c", "64").out == "x" * 60 + "\n"


def test_a_seed_repeats_the_answer(run: Run, mixtral_pack: Path) -> None:
    common = ("generate", mixtral_pack, "-p", "a", "-n", "12", "--temp", "1.5", "--top-k", "0")
    first, again, other = (run(*common, "-s", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_temperature_0_needs_no_seed(run: Run, mixtral_pack: Path) -> None:
    common = ("generate", mixtral_pack, "-p", "a", "-n", "12", "--temp", "0")
    assert run(*common).out == run(*common).out


def test_stop_strings_end_the_answer(run: Run, script: Script, mixtral_pack: Path) -> None:
    script.say("one two three")
    assert run("generate", mixtral_pack, "-p", "a", "-r", "three").out == "one two \n"
    stops = ("-r", "never", "-r", "two", "--reverse-prompt", "three")
    assert run("generate", mixtral_pack, "-p", "a", *stops).out == "one \n"


ACTIONS = [("trace", action) for action in ("show", "replay", "plot")]


@pytest.mark.parametrize("words", [*((name,) for name in COMMANDS), *ACTIONS], ids=" ".join)
def test_every_help_ends_with_an_example_and_fits_80_columns(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"example: offload {' '.join(words)}")
    assert [line for line in lines if len(line) > 80] == []


def test_ctrl_c_is_exit_code_130(run: Run, script: Script, mixtral_pack: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    script.say("abcdef")
    script.at = interrupt
    done = run("generate", mixtral_pack, "-p", "a")
    assert done.code == 130
    assert done.out.strip() == "ab"
    assert "Traceback" not in done.err


def test_a_single_turn_chat_answers_and_leaves(
    run: Run, script: Script, mixtral_pack: Path
) -> None:
    script.say(ANSWER)
    done = run("chat", mixtral_pack, "--single-turn", "-p", "Why?", "--expert-slots", "25%")
    assert done.code == 0
    assert done.out.startswith(ANSWER + "\n")
    assert done.err.startswith("6 of 24 experts in memory (25%)\n")


def test_ctrl_c_in_a_single_turn_is_exit_code_130(
    run: Run, script: Script, mixtral_pack: Path
) -> None:
    def interrupt(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    script.say("abcdef")
    script.at = interrupt
    done = run("chat", mixtral_pack, "-st", "-p", "a")
    assert "24 of 24 experts in memory (100%)\n" in done.err
    assert done.code == 130
    assert (done.out, "(stopped)\n" in done.err) == ("ab\n", True)


def test_a_chat_that_begins_with_a_prompt_goes_on_whatever_comes_of_it(
    run: Run, script: Script, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ("chat", mixtral_pack, "--no-show-timings", "-c", "200", "-p")
    script.say("yes")
    for prompt, answers in (("x" * 300, ["yes"]), ("/bye now", ["yes"] * 2), ("hi", ["yes"] * 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        done = run(*chat, prompt)
        assert (done.code, done.out.splitlines()) == (0, [*answers, ""])
        assert ("raise --ctx-size" in done.err) == (len(answers) == 1)
        assert script.prompt.endswith("<user>one</user><assistant>")
    assert "<user>hi</user><assistant>yes</assistant>" in script.prompt


def test_a_piped_chat_answers_each_line(
    run: Run, script: Script, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.say("yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    done = run("chat", mixtral_pack, "--no-show-timings")
    assert (done.code, done.out) == (0, "yes\nyes\n\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/nonsense\n"))
    done = run("chat", mixtral_pack)
    assert (done.code, done.out) == (0, "yes\nyes\n\n"), "figures and errors are on stderr"
    assert len(TIMINGS.findall(done.err)) == done.err.count("[ Experts: ") == 2
    assert "Unknown command /nonsense" in done.err
    assert script.prompt == "<user>one</user><assistant>yes</assistant><user>two</user><assistant>"


# --- quantize ------------------------------------------------------------------------------------


def test_quantize_makes_a_pack_that_answers_as_the_checkpoint(
    run: Run, gpt_oss: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "pack"
    done = run("quantize", gpt_oss, target, "--expert-bits", "8")
    assert (done.code, done.out) == (0, f"{target}\n")
    assert "quantising tiny-gpt-oss: done in" in done.err
    pack = Pack(target)
    assert pack.info.bits == "experts=8g64"
    pack.close()
    answers = [
        run("generate", *model, "-p", "a", "-n", "9", "--temp", "0").out
        for model in ([target], [gpt_oss, "--expert-bits", "8"])
    ]
    assert answers[0] == answers[1]


def test_quantizing_again_does_nothing(run: Run, mixtral: Path, tmp_path: Path) -> None:
    run("quantize", mixtral, tmp_path / "pack")
    done = run("quantize", mixtral, tmp_path / "pack")
    assert (done.code, done.out) == (0, f"{tmp_path / 'pack'}\n")
    assert "quantising" not in done.err
    assert f"Next: offload chat {tmp_path / 'pack'}" in done.err
