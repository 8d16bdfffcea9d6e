"""`offload generate`: nothing that was given is dropped, and only answers are printed as such."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import cli
from offload.generation.command import asked_prompt
from offload.generation.text import Answer
from offload.options import AnswerOptions
from tests.conftest import make_tokenizer

Said = tuple[str, str]  # stdout and stderr
Generate = Callable[..., Said]


@pytest.fixture
def generate(mixtral: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Run the command with a tiny model and return what it printed."""

    def run(*words: str | Path, code: int = 0, model: Path = mixtral) -> Said:
        capsys.readouterr()
        common = (
            [
                "--temp",
                "0",
            ]
            if "--temp" not in words
            else []
        )
        common += ["--no-show-timings", "--device", "cpu"]
        assert cli.main(["generate", str(model), *map(str, words), *common]) == code
        said = capsys.readouterr()
        lines = said.err.splitlines(keepends=True)  # the model's pack is made in the first run
        return said.out, "".join(line for line in lines if not line.startswith("quantising"))

    return run


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[int]]]:
    """Let the model say a text; returns the list of prompts that it was given."""

    def say(text: str) -> list[list[int]]:
        prompts: list[list[int]] = []
        whole = Answer.push

        def push(self: Answer, token: int) -> str:
            if not self.tokens:
                prompts.append(self.request.ids)
            told = tokens[len(self.tokens)]
            return whole(self, told)

        tokens = [*text.encode(), 258]
        monkeypatch.setattr(Answer, "push", push)
        return prompts

    return say


def _text(ids: Sequence[int]) -> str:
    return bytes(ids).decode()


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "file", "piped", "expected"),
    [
        ("Sum up:", None, "notes\n\n", "notes\n\nSum up:"),
        ("Sum up:", "text\n", None, "text\n\nSum up:"),
        ("Sum up:", "text\n", "notes\n", "notes\n\ntext\n\nSum up:"),
        (None, "text\n", "notes\n", "notes\n\ntext\n"),
        (None, None, "notes\n", "notes\n"),
        ("Why?", None, "", "Why?"),
        ("Why?", "", " \n", "Why?"),
        (None, None, "", ""),
        (None, None, None, None),
    ],
)
def test_words_file_and_pipe_are_joined_in_ollamas_order(
    words: str | None,
    file: str | None,
    piped: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "piped").write_text(piped or "")
    (tmp_path / "file").write_text(file or "")
    asked = AnswerOptions(prompt=words, file=None if file is None else tmp_path / "file")
    with (tmp_path / "piped").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert asked_prompt(asked, piped=piped is not None) == expected


def test_an_open_stdin_without_text_is_told(mixtral_pack: Path) -> None:
    command = [sys.executable, "cli.py", "generate", str(mixtral_pack), "-p", "a", "-n", "2"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    assert child.stderr.readline().startswith("waiting for the prompt on stdin")
    _, rest = child.communicate("b")
    assert child.returncode == 0, rest


# --- what the template does with them ------------------------------------------------------------


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TAKES = (
    "{{ tools | tojson if tools else '' }}{{ enable_thinking | default('?') }}"
    "{{ low | default('') }}"
)


def _with_template(mixtral: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(mixtral, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [NO_SYSTEM + DROPS_SYSTEM, DROPS_SYSTEM])
def test_a_system_prompt_that_the_template_does_not_take_is_in_the_first_message(
    template: str,
    mixtral: Path,
    tmp_path: Path,
    generate: Generate,
    speaks: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, prompts = _with_template(mixtral, tmp_path / "m", template + "<a>"), speaks("Yes")
    generate("-p", "Hi", "-sys", "Be brief", model=model)
    assert [_text(ids) for ids in prompts] == ["<user>Be brief\n\nHi<a>"]
    assert caplog.text.count("takes no system prompt: it is put in front") == 1


def test_a_model_without_template_gets_the_system_prompt_in_front(
    mixtral: Path, tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    model, prompts = _with_template(mixtral, tmp_path / "m", None), speaks("Yes")
    _, err = generate("-p", "Hi", "-sys", "Be brief", model=model)
    assert [_text(ids) for ids in prompts] == ["Be brief\n\nHi"]
    assert "has no chat template: -sys is put in front of the prompt" in err
    _, err = generate("-p", "Hi", "--no-think", model=model, code=1)
    assert "has no chat template: leave --think out" in err


def test_raw_prompts_and_what_needs_a_template_exclude_each_other(generate: Generate) -> None:
    for words in (["-sys", "a"], ["--think"], ["--chat-template-kwargs", "{}"]):
        _, err = generate("-p", "Hi", "--raw", *words, code=1)
        assert f"--raw leaves out the chat template: leave {words[0]} out" in err


def test_the_template_gets_think_and_arguments(
    mixtral: Path, tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    model, prompts = _with_template(mixtral, tmp_path / "m", TAKES), speaks("Yes")
    generate("-p", "a", model=model)
    generate("-p", "a", "--think", model=model)
    generate("-p", "a", "--no-think", "--chat-template-kwargs", '{"low": 3}', model=model)
    assert [_text(ids) for ids in prompts] == ["?", "True", "False3"]


def test_a_switch_for_thinking_that_the_template_lacks_is_refused(generate: Generate) -> None:
    for word in ("--think", "--no-think"):
        assert "has no switch for thinking" in generate("-p", "a", word, code=1)[1]


# --- thoughts ------------------------------------------------------------------------------------


def test_thoughts_are_not_in_the_answer(generate: Generate, speaks: Any) -> None:
    speaks("<think>\nhm\n</think>\n\nYes")
    assert generate("-p", "a") == ("Yes\n", "Thinking...\nhm\n\n...done thinking.\n\n")
    assert generate("-p", "a", "--hide-thoughts") == ("Yes\n", "")
    assert generate("-p", "a", "--raw") == ("<think>\nhm\n</think>\n\nYes\n", "")


def test_thoughts_that_are_cut_are_ended_and_told(generate: Generate, speaks: Any) -> None:
    speaks("<think>hm, let me see")
    out, err = generate("-p", "a", "-n", "12")
    assert out == "\n"
    assert err == "Thinking...\nhm, l\n...done thinking.\n\n(stopped at 12 tokens)\n"


# --- files of prompts ----------------------------------------------------------------------------


def _file(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_file_of_prompts_without_o_is_answered_on_stdout(
    tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    speaks("<think>hm</think>שלום")
    file = _file(tmp_path, "a", {"prompt": "b", "id": 7})
    out, _ = generate("-f", file, "-np", "1")
    assert [json.loads(line) for line in out.splitlines()] == [
        {**given, "answer": "שלום", "thinking": "hm"}
        | {"finish_reason": "stop", "prompt_tokens": 25, "generated_tokens": 26}
        for given in ({"prompt": "a"}, {"prompt": "b", "id": 7})
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("words", [["-p", "a"], ["--vote", "3"]])
def test_what_a_file_of_prompts_cannot_do_is_refused(
    words: list[str], tmp_path: Path, generate: Generate
) -> None:
    _, error = generate("-f", _file(tmp_path, "a"), *words, code=1)
    assert "cannot be combined with -p or --vote" in error


def test_several_at_once_are_refused_for_one_prompt(generate: Generate) -> None:
    assert "-np answers a file of prompts" in generate("-p", "a", "-np", "4", code=1)[1]


def test_a_run_that_fails_before_the_first_answer_leaves_no_file(
    tmp_path: Path, generate: Generate
) -> None:
    (tmp_path / "earlier.jsonl").touch()
    for name in ("out.jsonl", "earlier.jsonl"):
        words = ["-f", _file(tmp_path, "x" * 300), "-c", "64", "-o", tmp_path / name]
        generate(*words, code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier.jsonl", "prompts.jsonl"]


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
SHOWN = (
    "{% for m in messages %}{{ m.role }}={{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }};{% endfor %}"
)


def test_openais_messages_reach_the_template(
    mixtral: Path, tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    model = _with_template(mixtral, tmp_path / "m", TAKES + SHOWN)
    prompts = speaks("Yes")
    user = {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}
    tool = {"role": "tool", "tool_call_id": "1", "content": "2"}
    line = {
        "messages": [user, {"role": "assistant", "content": None, "tool_calls": [CALL]}, tool],
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"low": "!"},
        "max_tokens": 3,
        "temperature": 0,
    }
    _, err = generate("-f", _file(tmp_path, line), model=model)
    called = {**CALL, "function": {"name": "f", "arguments": {"x": 1}}}
    assert [_text(ids) for ids in prompts] == [
        f'[{{"name": "f"}}]?!user=a\nb;assistant={json.dumps([called])};tool=2;'
    ]
    assert "temperature, max_tokens in the lines of -f: use --temp, -n instead" in err


def test_a_message_of_the_assistant_is_continued(
    tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    prompts = speaks("two")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "One, "}]
    out, _ = generate("-f", _file(tmp_path, {"messages": said}))
    assert [_text(ids) for ids in prompts] == ["<user>a</user><assistant>One, "]
    assert json.loads(out)["answer"] == "two"


def test_tools_that_the_template_does_not_take_are_refused(
    tmp_path: Path, generate: Generate
) -> None:
    file = _file(tmp_path, {"prompt": "a", "tools": [{"name": "f"}]})
    assert "prompt 1: the model's chat template takes no tools" in generate("-f", file, code=1)[1]


USER = {"role": "user", "content": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "a.png"}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "type 'image_url': only text"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "tool answers"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}, USER]}, "a tool call must"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the last message is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}, USER]}, 'write "a text"'),
        ({"prompt": "a", "tools": {}}, None),
        ({"prompt": "a", "tools": {"name": "f"}}, '"tools" must be a list'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            'write "a text"',
        ),
        ({"prompt": "a", "chat_template_kwargs": {"messages": 1}}, "'messages' cannot be given"),
        ({"prompt": "a", "chat_template_kwargs": {"tokenize": True}}, "'tokenize' cannot be given"),
        ({"prompt": "a", "chat_template_kwargs": 3}, '"chat_template_kwargs" must be an object'),
    ],
)
def test_what_a_line_cannot_have_is_refused_with_its_reason(
    line: Any, words: str | None, tmp_path: Path, generate: Generate, speaks: Any
) -> None:
    speaks("Yes")
    _, err = generate("-f", _file(tmp_path, line), code=int(words is not None))
    assert words is None or f"prompts.jsonl, line 1: {words}" in err or words in err
    assert err.count("\n") == 1


# --- votes ---------------------------------------------------------------------------------------


def _vote(generate: Generate, monkeypatch: pytest.MonkeyPatch, *texts: str, code: int = 0) -> Said:
    """The vote of answers `texts`, of which those that end in ... are cut."""

    class Told:
        def __init__(self, text: str) -> None:
            self.text, self.tokens = text, [1] * 6
            self.finish_reason = "length" if text.endswith("...") else "stop"
            self.request = io.StringIO()
            self.request.ids = [1]  # type: ignore[attr-defined]

    def complete(*_: Any, watch: Callable[[Any], None], **__: Any) -> list[list[Told]]:
        watch([Told(text) for text in texts])
        return [[Told(text) for text in texts]]

    monkeypatch.setattr("offload.generation.batch.complete", complete)
    return generate("-p", "a", "--vote", str(len(texts)), "--temp", "1", code=code)


def test_a_vote_prints_one_answer_and_its_tally(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = _vote(generate, monkeypatch, "one", "<think>one</think>two", "two")
    assert said == ("two\n", "   2 of 3: two\n   1 of 3: one\n")


def test_answers_that_were_cut_do_not_vote(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = _vote(generate, monkeypatch, "half...", "half...", "one")
    assert out == "one\n"
    assert err == "   1 of 3: one\n   2 of 3: cut by -n, without a vote\n"
    out, err = _vote(generate, monkeypatch, "half...", "another...", code=1)
    assert out == ""
    assert "none of 2 answers ended within 6 tokens: raise -n" in err


def test_a_tie_is_told(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = _vote(generate, monkeypatch, "one", "two", "three")
    assert out == "one\n"
    assert "no agreement: 3 different answers have 1 of 3 votes each" in err
