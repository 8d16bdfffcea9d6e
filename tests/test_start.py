"""What a command does before its first token: words and flags, quick errors, quick imports."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from offload.habits import OTHER_COMMANDS, OTHER_FLAGS, SAME_COMMANDS, SAME_FLAGS
from offload.main import COMMANDS, build_parser, parse
from tests.conftest import Script

ROOT = Path(__file__).parents[1]
PARSER = build_parser()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which wrong usage ends."""
    with pytest.raises(SystemExit) as left:
        cli.main([*words])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("offload: error: ").strip()


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "command"),
    [(["run", "demo"], "chat"), (["perplexity", "demo"], "ppl"), (["chat", "demo"], "chat")],
)
def test_other_programs_words_for_a_command(words: list[str], command: str) -> None:
    assert parse(words).command == command


@pytest.mark.parametrize("word", OTHER_COMMANDS)
def test_a_command_that_does_not_exist_here_is_answered(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word not in COMMANDS
    assert refusal(capsys, word, "x").startswith(f"offload {word}: {OTHER_COMMANDS[word]}")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("chta", "there is no command chta (did you mean chat?)"),
        ("rnu", "there is no command rnu (did you mean run?)"),
        ("demo", "there is no command demo (did you mean offload chat demo?)"),
        (str(ROOT), f"(did you mean offload chat {ROOT}?)"),
        ("xyzzy", "there is no command xyzzy (see offload --help)"),
    ],
)
def test_an_unknown_command_is_answered_with_what_was_meant(
    word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal(capsys, word)


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["help"], ["--help"]),
        (["help", "chat"], ["chat", "--help"]),
        (["help", "run"], ["chat", "--help"]),
        (["help", "trace", "show"], ["trace", "show", "--help"]),
        (["version"], ["--version"]),
    ],
)
def test_help_and_version_are_words_too(
    words: list[str], same: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for each in (words, same):
        with pytest.raises(SystemExit) as left:
            cli.main(each)
        assert left.value.code == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1]
    assert said[0].out


def test_trace_alone_shows_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace"]) == 2
    assert "usage: offload trace" in capsys.readouterr().err


def test_words_after_the_model_are_the_prompt() -> None:
    assert parse(["run", "demo", "What", "is up?"]).prompt == "What is up?"
    assert parse(["generate", "demo", "--temp", "0", "Hi"]).prompt == "Hi"


@pytest.mark.parametrize(
    "words", [["chat", "demo", "a", "-p", "b"], ["ppl", "demo", "a"], ["bench", "demo", "a"]]
)
def test_a_word_too_many_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, *words)
    assert "'a' is one word too many" in told
    assert ("quote a prompt" in told) == (words[0] == "chat")
    assert f"(see offload {words[0]} --help)" in told


# --- flags ---------------------------------------------------------------------------------------


def test_tables_of_habits_and_our_own_names_do_not_overlap() -> None:
    flags = {f for command in PARSER.commands.values() for f in command._option_string_actions}
    assert not flags & OTHER_FLAGS.keys()
    assert not flags & SAME_FLAGS.keys()
    assert not OTHER_FLAGS.keys() & SAME_FLAGS.keys()
    assert set(SAME_FLAGS.values()) - {""} <= flags
    assert not {*SAME_COMMANDS, *OTHER_COMMANDS} & {*COMMANDS}


@pytest.mark.parametrize("flag", OTHER_FLAGS)
@pytest.mark.parametrize("value", [["99"], ["=1"], []])
def test_a_flag_that_does_not_exist_here_is_answered_by_its_name(
    flag: str, value: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [flag + value[0]] if value == ["=1"] else [flag, *value]
    assert refusal(capsys, "chat", "demo", *words).startswith(f"{flag} {OTHER_FLAGS[flag]}")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--temperature", "0.5"], "temperature", 0.5),
        (["--temperature=0.5"], "temperature", 0.5),
        (["--predict", "7"], "n_predict", 7),
        (["--max-tokens", "7"], "n_predict", 7),
        (["-n7"], "n_predict", 7),
        (["--num-ctx", "64"], "context", 64),
        (["-c", "0"], "context", 0),
        (["-s", "-1"], "seed", None),
        (["--stop", "x"], "reverse_prompt", ["x"]),
        (["--system", "-1"], "system_prompt", "-1"),
        (["--max-kv-size", "64"], "context", 64),
        (["--think=false"], "think", False),
    ],
)
def test_other_programs_spellings_are_taken(words: list[str], name: str, value: object) -> None:
    assert vars(parse(["chat", "demo", *words]))[name] == value


def test_json_may_be_asked_for_by_a_switch(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["show", "demo"], ["plan", "demo"], ["bench", "demo"]):
        assert parse([*command, "--json"]).output == "json"
    assert "there is no option --json" in refusal(capsys, "generate", "demo", "--json")


def test_what_is_no_number_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'hot' is not a number" in refusal(capsys, "chat", "demo", "--temp", "hot")
    assert "'1.5' is not a whole number" in refusal(capsys, "chat", "demo", "--top-k", "1.5")


def test_the_list_of_commands_fits_on_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([]) == 2
    shown = capsys.readouterr().err.splitlines()[-22:]
    assert {line.split()[0] for line in shown if line.startswith("    ")} >= COMMANDS.keys()
    assert shown[-1].endswith("To begin: offload chat demo")


@pytest.mark.parametrize("flag", ["-m", "--model", "-hf", "--hf-repo"])
@pytest.mark.parametrize("command", ["chat", "generate", "bench"])
def test_a_model_may_be_given_by_a_flag(flag: str, command: str) -> None:
    for words in ([flag, "owner/name"], ["-t", "1", flag, "owner/name"], [f"{flag}=owner/name"]):
        assert parse([command, *words]).model == "owner/name"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--ctx", "there is no option --ctx (did you mean --ctx-size?)"),
        ("--n-pred=5", "there is no option --n-pred (did you mean --n-predict?)"),
        ("--ngl=9", "--ngl is not needed: as many experts as fit are resident"),
        ("-foo", "there is no option -foo"),
        ("-px", "there is no option -px"),
    ],
)
def test_no_flag_is_guessed(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "chat", "demo", word)
    assert said.startswith(told)
    assert "(see offload chat --help)" in said


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert parse(["chat", "demo", "--", "-ngl"]).prompt == "-ngl"


@pytest.mark.parametrize("flag", ["-n", "-s"])
def test_a_number_out_of_range_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "-5 is less than -1" in refusal(capsys, "chat", "demo", flag, "-5")


def test_several_numbers_of_threads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'1,2'" in refusal(capsys, "bench", "demo", "-t", "1,2")


# --- errors and imports take no longer than they must --------------------------------------------

LATE = {"torch", "transformers", "numpy", "huggingface_hub", "rich", "prompt_toolkit"}
TYPOS = [
    ["chat", "./nosuch"],
    ["chat", "demo.gguf"],
    ["chat", "demo", "--bits", "q9"],
    ["chat", "demo", "--ram", "plenty"],
    ["chat", "demo", "--ram", "99999GiB"],
    ["chat", "demo", "--vram", "5x"],
    ["chat", "demo", "--gpus", "a"],
    ["chat", "demo", "--device", "mps"],
    ["chat", "demo", "--policy", "mru"],
    ["chat", "demo", "-f", "./nosuch"],
    ["generate", "demo", "-p", "hi", "--top-p", "7"],
    ["generate", "demo", "-p", "hi", "--expert-slots", "abc"],
    ["bench", "demo", "--expert-slots", "500%"],
    ["bench", "demo", "--compare", "./nosuch"],
    ["bench", "demo", "-p", "0", "-n", "0"],
    ["plan", "demo", "--bits", "q9"],
    ["plan", "./nosuch"],
    ["plan", "demo", "--trace", "./nosuch"],
    ["ppl", "demo", "-f", "./nosuch"],
    ["ppl", "./nosuch", "-f", __file__],
    ["check", "demo", "--against", "./nosuch"],
    ["check", "demo", "--against", "demo", "--baseline", "./nosuch"],
    ["quantize", "./nosuch", "./new"],
    ["trace", "show", "./nosuch"],
]


@pytest.mark.parametrize("words", TYPOS, ids=" ".join)
def test_a_typo_is_told_before_torch_is_imported(words: list[str], tmp_path: Path) -> None:
    code = (
        "import json, sys, time\n"
        "from offload.main import main\n"
        f"code = main({words!r})\n"
        f"late = sorted({LATE!r} & sys.modules.keys())\n"
        "print(json.dumps([code, late, time.process_time()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    code, late, seconds = json.loads(done.stdout)
    assert (code, late) == (1, []), done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 0.6  # 0.1 on a quiet machine; torch alone takes 0.9


def test_an_answer_comes_without_libraries_that_it_does_not_need(mixtral_pack: Path) -> None:
    """hqq, torch's compiler, tensors over several machines: 2 s of imports that are not needed."""
    words = ["generate", str(mixtral_pack), "-p", "a", "-n", "2", "--temp", "0"]
    code = (
        "import json, sys\n"
        "from offload.main import main\n"
        f"assert main({words!r}) == 0\n"
        "names = sorted(sys.modules)\n"
        "from torch._dynamo import config\n"
        "print(json.dumps([names, sys.modules['torch._dynamo'].__file__]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    modules, compiler = json.loads(done.stdout.splitlines()[-1])
    needless = {"hqq", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp"}
    needless |= {"triton", "networkx", "torch._dynamo.eval_frame", "matplotlib"}
    assert not needless & set(modules)
    assert compiler.endswith("torch/_dynamo/__init__.py")  # who asks for it later gets it


def test_answers_are_the_same_with_and_without_the_libraries_that_are_left_out(
    mixtral_pack: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(mixtral_pack), "-p", "Why?", "-n", "9", "--temp", "0"]
    done = subprocess.run(
        [sys.executable, "cli.py", *words], cwd=ROOT, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert cli.main(words) == 0  # this process has imported all of transformers
    assert done.stdout.decode() == capfd.readouterr().out


@pytest.mark.parametrize("asked", ["torch._dynamo.utils", "hqq.core.quantize"])
def test_what_is_left_out_is_there_when_it_is_asked_for(asked: str) -> None:
    code = (
        "import importlib, sys\n"
        "from offload.quick import import_transformers\n"
        "import_transformers()\n"
        f"assert not [name for name in sys.modules if name.startswith('hqq')]\n"
        "import torch\n"
        "torch._dynamo.mark_static_address(torch.ones(1))  # as a cache of recurrent states does\n"
        "assert 'torch._dynamo.eval_frame' not in sys.modules\n"
        f"importlib.import_module({asked!r})\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr


def test_ctrl_c_while_numpy_is_imported_is_not_lost() -> None:
    code = (
        "import sys\n"
        "class Press:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy.lib':\n"
        "            sys.meta_path.remove(self)\n"
        "            raise KeyboardInterrupt\n"
        "from offload.quick import import_transformers\n"
        "sys.meta_path.insert(0, Press())\n"
        "import_transformers()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_load_leaves_hqq_out_and_torchs_compiler_to_the_program() -> None:
    code = (
        "import sys, offload\n"
        "offload.load\n"
        "assert 'hqq' not in sys.modules and 'torch._dynamo.eval_frame' in sys.modules\n"
        "import transformers.utils, hqq\n"
        "print(transformers.utils.is_hqq_available())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_line_says_at_once_that_a_model_is_loading(mixtral_pack: Path) -> None:
    """In a terminal, long before the model is there."""
    leader, follower = pty.openpty()
    words = ["generate", str(mixtral_pack), "-p", "a", "-n", "2"]
    child = subprocess.Popen(
        [sys.executable, "cli.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    begin = time.monotonic()
    assert select.select([leader], [], [], 60)[0]
    first, seconds = os.read(leader, 4096).decode(), time.monotonic() - begin
    child.communicate(timeout=300)
    os.close(leader)
    assert first.startswith(f"Loading {mixtral_pack}...")
    assert seconds < 2  # 0.15 on a quiet machine; torch is not imported in less than 1.5 on any


def test_nothing_is_said_about_loading_without_a_terminal(
    script: Script, mixtral_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.say("a")
    assert cli.main(["generate", str(mixtral_pack), "-p", "a", "--no-show-timings"]) == 0
    assert capsys.readouterr().err == ""


# --- the context is no longer than the model -----------------------------------------------------


@pytest.mark.parametrize(("asked", "holds"), [([], 512), (["-c", "0"], 512), (["-c", "64"], 64)])
def test_the_context_has_no_more_tokens_than_the_model_positions(
    asked: list[str], holds: int, mixtral_pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(mixtral_pack), "--raw", "-p", "x" * 600, *asked]
    assert cli.main(words) == 1
    assert f"and the context holds {holds}:" in capsys.readouterr().err
