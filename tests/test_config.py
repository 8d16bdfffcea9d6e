"""Values of options from the user's file and from the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from offload.config import NAMES, OPTIONS
from offload.main import parse

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's file is read from; it does not exist yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "offload").mkdir()
    return tmp_path / "offload" / "config.toml"


def asked(*words: str) -> dict[str, Any]:
    return vars(parse(words))


def test_flag_environment_model_and_file_are_asked_in_this_order(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('ctx_size = 1\nexpert-slots = "10%"\n[models."a/b"]\nctx_size = 2\n')
    assert asked("chat", "c/d")["context"] == 1
    assert asked("chat", "a/b")["context"] == 2
    assert asked("chat", "a/b")["expert_slots"] == "10%"
    monkeypatch.setenv("OFFLOAD_CTX_SIZE", "3")
    assert asked("chat", "a/b")["context"] == 3
    assert asked("chat", "a/b", "-c", "4")["context"] == 4
    monkeypatch.delenv("OFFLOAD_CTX_SIZE")
    config.unlink()
    assert "context" not in asked("chat", "a/b")  # the built-in default holds


EXAMPLES = {"int": 1, "float": 0.5, "bool": True, "str": "8", "Path": "x"}
SPECIAL = {"policy": "lru", "engine": "host", "device": "cpu", "gpus": "0", "dense_bits": 4}
SPECIAL |= {"bits": "q4", "expert_bits": 4, "group_size": 64, "vram": "8GiB", "ram": "8GiB"}
SPECIAL |= {"template_arguments": '{"a": true}'}


@pytest.mark.parametrize("word", NAMES)
def test_every_option_can_be_in_the_file_and_in_the_environment(
    word: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = NAMES[word]
    kind = str(OPTIONS[name].type).partition(" |")[0]
    value = SPECIAL.get(name, EXAMPLES.get(kind, "8"))
    command = next(
        each
        for each in ("chat", "generate", "ppl", "doctor")
        if name in {action.dest for action in cli_parser(each)._actions}
    )
    words = {"ppl": ["ppl", "demo"], "doctor": ["doctor"]}.get(command, [command, "demo"])
    config.write_text(f"{word} = {str(value).lower() if value is True else repr(value)}\n")
    from_file = asked(*words)[name]
    config.unlink()
    monkeypatch.setenv(f"OFFLOAD_{word.upper()}", str(value))
    assert asked(*words)[name] == from_file
    flag = next(a for a in cli_parser(command)._actions if a.dest == name).option_strings[0]
    monkeypatch.delenv(f"OFFLOAD_{word.upper()}")
    assert asked(*words, flag, *([] if value is True else [str(value)]))[name] == from_file


def cli_parser(command: str) -> Any:
    from offload.main import build_parser

    return build_parser().commands[command]


WRONG = {
    "[model.demo]\ntemp = 1": "there is no option 'model' (did you mean models?)",
    "ctxsize = 3": "there is no option 'ctxsize' (did you mean ctx_size?)",
    "n_predict = -5": "n_predict: -5 is less than -1",
    "ctx_size = 4.5": "ctx_size: '4.5' is not a whole number",
    "ram = true": "ram: True is not a value of this option",
    "vram = { a = 1 }": "vram: {'a': 1} is not a value of this option",
    'ram = "5x"': "ram: '5x' is not a size",
    'policy = "mru"': "policy: there is no policy 'mru'",
    'bits = "q9"': "bits: 'q9' is not a rule for bits",
    "top_p = 7": "top_p: top_p is 7.0: it must be above 0, at most 1",
    'temp = "hot"': "temp: 'hot' is not a number",
    'verbose = "perhaps"': "verbose: 'perhaps' is neither true nor false",
    "[models]\ndemo = 3": "models: write a table for each",
    "models = 3": "models: write a table for each",
    "[models.demo]\nctxsize = 3": "models.\"demo\": there is no option 'ctxsize'",
    "[models.other]\nctxsize = 3": "models.\"other\": there is no option 'ctxsize'",
    "[models.demo]\nctx_size = -1": 'models."demo", ctx_size: -1 is less than 0',
    "x": "cannot be read: ",
    "x = " + 10**5 * "[": "cannot be read: ",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_the_file_is_told_with_its_place(
    text: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    assert cli.main(["chat", "demo"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"offload: error: {config}")
    assert WRONG[text] in told
    assert told.count("\n") == 1


def test_a_file_that_is_none_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.mkdir()
    assert cli.main(["chat", "demo"]) == 1
    assert capsys.readouterr().err.endswith(f"{config} cannot be read: Is a directory\n")
    config.rmdir()
    config.symlink_to("/dev/zero")  # it never ends
    assert cli.main(["chat", "demo"]) == 1
    assert "more than" in capsys.readouterr().err


def test_a_file_may_begin_with_a_byte_order_mark(config: Path) -> None:
    config.write_text("ctx_size = 7", encoding="utf-8-sig")
    assert asked("chat", "demo")["context"] == 7


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, whose user may have no name."""
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert asked("chat", "demo")["model"] == "demo"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert cli.main(["list"]) == 0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OFFLOAD_CTX_SIZE", "many", "OFFLOAD_CTX_SIZE: 'many' is not a whole number"),
        ("OFFLOAD_TOP_P", "7", "OFFLOAD_TOP_P: top_p is 7.0"),
        ("OFFLOAD_LOOKAHEAD", "maybe", "OFFLOAD_LOOKAHEAD: 'maybe' is neither true nor false"),
        (
            "OFFLOAD_CTX_SIZ",
            "1",
            "OFFLOAD_CTX_SIZ is not an option (did you mean OFFLOAD_CTX_SIZE?)",
        ),
    ],
)
def test_what_is_wrong_in_the_environment_is_told_with_its_name(
    name: str,
    value: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert cli.main(["chat", "demo"]) == 1
    assert capsys.readouterr().err.startswith(f"offload: error: {told}")


def test_variables_for_other_things_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", "/tmp")
    monkeypatch.setenv("OFFLOAD_REPORT", "2")  # of Intel's compilers
    assert "context" not in asked("chat", "demo")


@pytest.mark.parametrize("value", ["off", "0", "false", "no"])
def test_a_switch_can_be_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_LOOKAHEAD", value)
    assert asked("chat", "demo")["lookahead"] is False
    assert asked("bench", "demo")["lookahead"] == [False]  # where it takes a list


def test_lists_in_the_file_are_lists_of_the_command_line(config: Path) -> None:
    config.write_text('reverse_prompt = ["a", "b"]\nexpert_slots = "25%"\n')
    assert asked("chat", "demo")["reverse_prompt"] == ["a", "b"]
    assert asked("bench", "demo")["expert_slots"] == ["25%"]


def test_a_replay_follows_the_recorded_run(config: Path) -> None:
    config.write_text('lookahead = false\npolicy = "lru"\nexpert_slots = "50%"\n')
    for action in ("replay", "plot"):
        given = asked("trace", action, "run.trace")
        assert not given.keys() & {"lookahead", "policy", "expert_slots"}


def test_a_default_of_a_command_itself_stays(config: Path) -> None:
    config.write_text("ctx_size = 9999\nwarm_start = true\n")
    assert asked("ppl", "demo")["context"] == 512
    assert asked("bench", "demo")["warm_start"] is False


# --- completion ----------------------------------------------------------------------------------

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
_shtab_offload
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    file = tmp_path_factory.mktemp("completion") / "offload.bash"
    done = subprocess.run(
        [sys.executable, "cli.py", "--completion", "bash"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["che"], {"check"}),
        (["trace", ""], {"show", "replay", "plot"}),
        (["chat", "--pol"], {"--policy"}),
        (["chat", "--policy", ""], {"lfru", "lru"}),
        (["chat", "--engine", "d"], {"device"}),
        (["bench", "-o", ""], {"md", "csv", "json", "jsonl"}),
        (["chat", "READ"], {"README.md"}),
        (["generate", "demo", "-f", "CHANGE"], {"CHANGELOG.md"}),
        (["--completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes_commands_flags_choices_and_files(
    words: list[str], offered: set[str], completion: Path
) -> None:
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", completion, "offload", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "#compdef offload"), ("fish", "complete -c")])
def test_other_shells_get_a_script_with_every_command(
    shell: str, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--completion", shell]) == 0
    text = capsys.readouterr().out
    assert mark in text
    for word in ("quantize", "expert-slots", "jsonl"):
        assert word in text
