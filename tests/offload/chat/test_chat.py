"""A conversation: commands, several lines, Ctrl-C, errors; and once in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import offload
from offload.cache.trace.heatmap import BLOCKS, PLAIN_BLOCKS, POINTS
from offload.chat.chat import Chat
from offload.chat.commands import COMMANDS, SETTINGS, WORDS, converse, obey, read_message
from offload.chat.display import Plain
from offload.chat.figures import Panel
from offload.chat.terminal import is_open
from offload.errors import ChatError, SourceError
from offload.sampling import Sampling
from tests.conftest import Script
from tests.full_disk import full_beyond
from tests.tiny import EXPERTS, LAYERS

ROOT = Path(__file__).parents[3]
TIMINGS = r"\[ Prompt: \d+\.\d t/s \| Generation: \d+\.\d t/s \]\n\[ Experts: .* \]\n"
CONTEXT = 256


class Terminal:
    """Gives lines and keeps what is written. A line may be an exception to raise."""

    def __init__(self) -> None:
        self.lines: list[str | type[BaseException]] = []
        self.prompts: list[str] = []
        self.text = ""
        self.on_write: Callable[[str], None] = lambda text: None

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def write(self, text: str) -> None:
        self.text += text
        self.on_write(text)

    def take(self) -> str:
        """What was written since the last call."""
        text, self.text = self.text, ""
        return text


@pytest.fixture(scope="module")
def loaded(
    mixtral: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    model, tokenizer = offload.load(
        mixtral,
        device="cpu",
        expert_slots=6,
        context=CONTEXT,
        pack_dir=tmp_path_factory.mktemp("packs"),
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    yield model, tokenizer
    model.offload.close()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def chat(loaded: tuple[Any, Any], terminal: Terminal, script: Script) -> Chat:
    """A chat whose model says "yes", without timings."""
    script.say("yes")
    model, tokenizer = loaded
    return Chat(model, tokenizer, Sampling(), Plain(terminal.write), timings=False)


@pytest.fixture
def thinker(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat template has a switch for thinking."""
    switch = "{% if enable_thinking %}!{% endif %}"
    monkeypatch.setattr(loaded[1], "chat_template", loaded[1].chat_template + switch)


def _converse(chat: Chat, terminal: Terminal, *lines: str | type[BaseException]) -> str:
    terminal.lines = list(lines)
    converse(chat, terminal.read)
    assert terminal.lines == [], "the chat left before the last line"
    return terminal.take()


# --- messages ------------------------------------------------------------------------------------


def test_each_line_is_answered_with_all_that_was_said(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    assert _converse(chat, terminal, "one", "two") == "yes\nyes\n\n"
    assert terminal.prompts == [">>> "] * 3
    assert script.prompt == "<user>one</user><assistant>yes</assistant><user>two</user><assistant>"


def test_empty_lines_are_not_messages(chat: Chat, terminal: Terminal) -> None:
    _converse(chat, terminal, "", "   ", "\t")
    assert chat.messages == []


def test_an_answer_comes_in_whole_characters(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    pieces: list[str] = []
    terminal.on_write = pieces.append
    script.say("שלום 👋🏽")
    chat.say("hi")
    assert [piece for piece in pieces if piece] == [*"שלום 👋🏽", "\n"]


def test_an_answer_is_made_by_the_model_itself(loaded: tuple[Any, Any], terminal: Terminal) -> None:
    model, tokenizer = loaded
    chat = Chat(
        model, tokenizer, Sampling(), Plain(terminal.write), max_new_tokens=8, timings=False
    )
    chat.say("hello")
    messages = [{"role": "user", "content": "hello"}]
    text = offload.generate(model, tokenizer, messages, max_new_tokens=8)
    assert terminal.take() == text + "\n(stopped at 8 tokens)\n"
    assert chat.messages == [*messages, {"role": "assistant", "content": text}]


def test_timings_follow_each_answer(chat: Chat, terminal: Terminal) -> None:
    chat.timings = True
    chat.say("hi")
    assert re.fullmatch(rf"yes\n\n{TIMINGS}", terminal.take())


def test_a_later_turns_figures_are_of_what_it_read_and_took(
    loaded: tuple[Any, Any], terminal: Terminal
) -> None:
    """The first answer waited for the model, the second one only for what was new."""
    chat = Chat(*loaded, Sampling(), Plain(terminal.write), max_new_tokens=2, verbose=True)
    chat.load_seconds, rows = 1000.0, []
    for text in ("a long message " * 8, "and a short one"):
        begin = time.perf_counter()
        chat.say(text)
        took = time.perf_counter() - begin
        lines = (line.split(":") for line in terminal.take().splitlines() if ":  " in line)
        rows.append({name: value.strip() for name, value in lines})
        assert chat.last is not None
        total = chat.last.prompt_seconds + chat.last.generation_seconds
        assert 0 < total <= took
    last, total = chat.last, f"{total * 1e3:.2f}ms" if total < 1 else f"{total:.2f}s"
    assert last.cached_tokens > 100
    read = last.prompt_tokens - last.cached_tokens
    assert last.experts.tokens == read + 1  # and the answer's first token
    assert rows[1]["prompt eval count"] == f"{read} token(s) (+{last.cached_tokens} cached)"
    assert rows[1]["total duration"] == total
    assert "load duration" not in rows[1]
    assert rows[0]["load duration"] == "1000.00s"
    assert rows[0]["total duration"].startswith("1000.")
    assert re.fullmatch(r"\d+ token\(s\)", rows[0]["prompt eval count"])


def test_three_quotes_make_a_message_of_several_lines(chat: Chat, terminal: Terminal) -> None:
    _converse(chat, terminal, '"""first', "", "  second", 'third"""')
    assert chat.messages[0]["content"] == "first\n\n  second\nthird"
    assert terminal.prompts == [">>> ", "... ", "... ", "... ", ">>> "]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"""one line"""'], "one line"),
        (['"""', "inside", '"""'], "inside"),
        (['"""a', 'b"""  '], "a\nb"),
        (['""""""'], ""),
        (['a """quoted""" word'], 'a """quoted""" word'),
        (["plain"], "plain"),
    ],
)
def test_messages_are_read_whole(lines: list[str], message: str, terminal: Terminal) -> None:
    terminal.lines = list(lines)
    assert read_message(terminal.read)[0] == message
    assert terminal.lines == []


@pytest.mark.parametrize("text", ['"""', '"""  \t ', '"""a', '"""a\n"" '])
def test_enter_does_not_send_a_message_that_is_still_open(text: str) -> None:
    assert is_open(text)
    assert not is_open(text.rstrip() + '"""' + " ")
    assert not is_open(text[1:])


def test_a_message_of_several_lines_is_never_a_command(chat: Chat, terminal: Terminal) -> None:
    text = _converse(chat, terminal, '"""', "/bye is how one leaves", '"""', "/clear")
    assert text.startswith("yes\n")


def test_the_end_of_input_inside_a_message_leaves(chat: Chat, terminal: Terminal) -> None:
    _converse(chat, terminal, '"""begun', EOFError)
    assert chat.messages == []


# --- leaving and stopping ------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["/bye", "/bye ", "/exit", "/quit", EOFError])
def test_bye_and_ctrl_d_leave(line: Any, chat: Chat, terminal: Terminal) -> None:
    terminal.lines = ["one", line, "never read"]
    converse(chat, terminal.read)
    assert terminal.lines == ["never read"]


def test_ctrl_c_at_the_prompt_says_how_to_leave(chat: Chat, terminal: Terminal) -> None:
    text = _converse(chat, terminal, KeyboardInterrupt, "one")
    assert "(press Ctrl-D or type /bye to quit)" in text
    assert text.endswith("yes\n\n")


def _interrupt_at(terminal: Terminal, *texts: str) -> None:
    """Press Ctrl-C whenever one of `texts` is written, until the last of them was."""

    def interrupt(text: str) -> None:
        if text in texts:
            if text == texts[-1]:
                terminal.on_write = lambda text: None
            raise KeyboardInterrupt

    terminal.on_write = interrupt


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    _interrupt_at(terminal, "l")
    script.say("a long answer")
    text = _converse(chat, terminal, "one", "two")
    assert text.startswith("a l\n(stopped)\n")
    assert text.endswith("a long answer\n\n")
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 2
    assert "a long answer".startswith(chat.messages[1]["content"])


@pytest.mark.parametrize("shown", ["\n", "\n(press Ctrl-D or type /bye to quit)\n"])
def test_ctrl_c_twice_keeps_the_answer_and_the_chat(
    shown: str, chat: Chat, terminal: Terminal, script: Script
) -> None:
    """The second one comes while the end of the answer is shown, or the words after the first."""
    _interrupt_at(terminal, "l", "\n", shown)
    script.say("a long answer")
    text = _converse(chat, terminal, "one", "two")
    assert text.endswith("a long answer\n\n")
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 2


@pytest.mark.parametrize("step", [0, 2])
def test_ctrl_c_while_the_model_works_keeps_the_chat(
    step: int, chat: Chat, terminal: Terminal, script: Script
) -> None:
    def interrupt(at: int) -> None:
        if at == step:
            script.at = lambda at: None
            raise KeyboardInterrupt

    script.at = interrupt
    text = _converse(chat, terminal, "one", "two")
    assert text.endswith("yes\n\n")
    assert "(stopped)" in text


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense",
        "/",
        "/set nothing 1",
        "/set num_ctx 4096",
        "/set parameter format json",
        "/set num_predict 0",
        "/set num_predict -5",
        '/set stop "a',
        "/set think",
        "/clear x",
        "/regen now",
        "/stats please",
        "/bye the way",
        "/exit now",
        "/copy",
        "/copy 1",
        "/write",
        "/write /nowhere/file",
        "/set temperature",
        "/set temperature warm",
        "/set temperature -1",
        "/set top_p 2",
        "/set top_k 1.5",
        "/set seed -1",
        "/set seed anything",
        "/set verbose extra",
        "/set nothink please",
        "/set num_predict many",
        "/show",
        "/show nothing",
        "/save",
        "/save ../outside",
        "/save a/b",
        "/load",
        "/load nothing",
        "/load ../outside",
        "/read",
        "/read /no/such/file",
        "/regen",
        "/_do_clear",
        "/answer",
        "x" * CONTEXT,
        "/set temperature 1e999",
        "/set repetition_penalty inf",
        "/set seed 1" + "0" * 5000,
        "/set num_predict " + "9" * 5000,
        "/read ~no-such-user/x",
        "/read a\0b",
        "/read " + "x" * 5000,
        "/read /dev/zero",
        "/read /",
        "/load " + "x" * 300,
        "/save " + "x" * 300,
        "bytes \udcff that are no text",
        "/read \ud800",
    ],
)
def test_an_error_is_told_and_the_chat_goes_on(
    line: str, chat: Chat, terminal: Terminal, script: Script
) -> None:
    text = _converse(chat, terminal, line, "one")
    first, *rest = text.splitlines()
    assert first not in ("", "yes")
    assert rest == ["yes", ""]
    assert script.prompt == "<user>one</user><assistant>"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("one\ntwo"), MemoryError(), OSError(5, "Input/output error"), KeyError(1)],
)
@pytest.mark.parametrize("line", ["one", "/regen"])
def test_any_error_in_an_answer_is_one_line_and_the_chat_goes_on(
    line: str, error: Exception, chat: Chat, terminal: Terminal, script: Script
) -> None:
    chat.say("before")
    before, _ = list(chat.messages), terminal.take()

    def fail(step: int) -> None:
        if step == 1:
            raise error

    script.at = fail
    text = _converse(chat, terminal, line)
    assert chat.messages == before
    assert text.startswith("y\n")  # what was said ends its line
    assert text.count("\n") == 3  # the error's, and the last at the end of the input
    script.at = lambda step: None
    assert _converse(chat, terminal, "again").startswith("yes\n")
    assert script.prompt.endswith("<assistant>yes</assistant><user>again</user><assistant>")


def test_under_debug_an_error_that_is_not_ours_is_shown_whole(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    def fail(step: int) -> None:
        raise RuntimeError("shown")

    chat.debug, script.at = True, fail
    with pytest.raises(RuntimeError, match="shown"):
        _converse(chat, terminal, "one")


@pytest.mark.parametrize("error", [OSError, BrokenPipeError])
def test_a_terminal_that_is_gone_ends_the_chat(
    error: type[OSError], chat: Chat, terminal: Terminal
) -> None:
    terminal.lines = [error, "never read"]
    with pytest.raises(error):
        converse(chat, terminal.read)

    def gone(text: str) -> None:
        raise error

    terminal.lines, terminal.on_write = ["one", "never read"], gone
    with pytest.raises(error):
        converse(chat, terminal.read)
    assert terminal.lines == ["never read"]


def test_a_system_prompt_that_is_no_text_is_told_and_can_be_replaced(
    chat: Chat, terminal: Terminal, home: Path
) -> None:
    text = _converse(
        chat, terminal, "/set system \udc80", "one", "/save mine", "/set system", "two"
    )
    assert "not UTF-8" in text
    assert "cannot write" in text
    assert text.endswith("yes\n\n")
    assert list((home / "conversations").iterdir()) == []


def test_a_pipe_is_not_read(chat: Chat, terminal: Terminal, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "there is no file" in _converse(chat, terminal, f"/read {tmp_path / 'pipe'}")


def test_an_extreme_temperature_answers(loaded: tuple[Any, Any], terminal: Terminal) -> None:
    chat = Chat(*loaded, Sampling(), Plain(terminal.write), timings=False, max_new_tokens=3)
    for temperature in ("1e-300", "1e300"):
        obey(chat, f"/set temperature {temperature}")
        chat.say("one")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_a_saved_file_that_cannot_be_written_keeps_the_chat(
    chat: Chat, terminal: Terminal, home: Path
) -> None:
    (home / "conversations").write_text("in the way")
    text = _converse(chat, terminal, "/save mine", "one")
    assert "conversations" in text
    assert text.endswith("yes\n\n")


def test_a_question_too_long_can_be_followed_by_a_short_one(chat: Chat, terminal: Terminal) -> None:
    text = _converse(chat, terminal, "x" * CONTEXT, "one")
    assert "raise --ctx-size" in text
    assert [message["content"] for message in chat.messages] == ["one", "yes"]


def test_a_question_too_long_takes_no_turns_away(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    text = _converse(chat, terminal, "one", "x" * CONTEXT, "two")
    assert "raise --ctx-size" in text
    assert script.prompt == "<user>one</user><assistant>yes</assistant><user>two</user><assistant>"


def test_an_answer_is_made_again_from_the_turns_that_it_was_made_from(
    chat: Chat, terminal: Terminal, script: Script
) -> None:
    for size in (60, 60, 20, 20, 20):  # turns leave at the second, and at the last
        chat.say("x" * size)
        asked = script.prompt
        obey(chat, "/regen")
        assert script.prompt == asked
    assert chat.begin > 0


def test_an_answer_that_cannot_be_made_again_is_kept(chat: Chat, script: Script) -> None:
    chat.say("one")
    chat.stop_strings, before = ("x",), list(chat.messages)

    def fail(step: int) -> None:
        raise offload.PackError("the pack is gone")

    script.at = fail
    with pytest.raises(offload.PackError):
        obey(chat, "/regen")
    assert chat.messages == before


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["/?", "/help"])
def test_help_lists_every_command(line: str, chat: Chat, terminal: Terminal) -> None:
    assert obey(chat, line)
    text = terminal.take()
    for name in ("set", "show", "stats", "save", "load", "read", "regen", "clear", "bye"):
        assert f"/{name}" in text
    assert '"""' in text


def test_a_typo_is_answered_with_what_was_meant(chat: Chat, terminal: Terminal) -> None:
    said = _converse(chat, terminal, "/experts", "/cler", "/set temprature 1", "/set top_p 1")
    assert "Unknown command /experts (did you mean /show experts?)" in said
    assert "Unknown command /cler (did you mean clear?)" in said
    assert "Unknown setting 'temprature' (did you mean temperature?)" in said
    assert "Set top_p to 1." in said


def test_what_help_says_is_what_there_is(chat: Chat, terminal: Terminal) -> None:
    assert set(WORDS[""]) == COMMANDS.keys() | {"bye", "exit", "quit"}
    for before in ("set", "show"):
        lines = [f"/{before} {word}" for word in WORDS[before]]
        told = _converse(chat, terminal, *lines)
        assert "Unknown setting" not in told
        assert "Usage" not in told
    obey(chat, "/?")
    assert all(len(line) <= 80 for line in terminal.take().splitlines())
    assert WORDS["set panel"] == ("on", "off")
    assert {"temperature", "seed", "num_predict", "thoughts", "quiet"} < set(WORDS["set"])


def test_pasted_lines_that_begin_with_a_slash_are_a_message(chat: Chat, terminal: Terminal) -> None:
    pasted = "/clear all of it\nis what the manual says"
    _converse(chat, terminal, "one", pasted, "/set system two\nlines")
    assert [message["content"] for message in chat.messages[::2]] == ["one", pasted]
    assert chat.system == "two\nlines"


def test_clear_forgets_what_was_said_and_keeps_the_system_prompt(
    chat: Chat, script: Script
) -> None:
    chat.system = "be brief"
    chat.say("one")
    obey(chat, "/clear")
    chat.say("two")
    assert script.prompt == "<system>be brief</system><user>two</user><assistant>"


def test_regen_answers_the_last_message_again(chat: Chat, script: Script) -> None:
    chat.say("one")
    script.say("no")
    obey(chat, "/regen")
    assert script.prompts[0] == script.prompts[1]
    assert [message["content"] for message in chat.messages] == ["one", "no"]


def test_read_sends_a_file(chat: Chat, script: Script, tmp_path: Path) -> None:
    file = tmp_path / "with space.txt"
    file.write_text("שלום\nfrom a file", encoding="utf-8")
    obey(chat, f"/read {file}")
    assert chat.messages[0]["content"] == "שלום\nfrom a file"


def test_read_refuses_what_is_no_text(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SourceError, match="not UTF-8"):
        obey(chat, f"/read {tmp_path / 'image'}")


def test_set_system(chat: Chat, terminal: Terminal, script: Script) -> None:
    obey(chat, "/show system")
    assert terminal.take() == "(not set: model default)\n"
    obey(chat, "/set system be very  brief")
    assert terminal.take() == "Set the system prompt.\n"
    obey(chat, "/show system")
    assert terminal.take() == "be very  brief\n"
    chat.say("one")
    assert script.prompt.startswith("<system>be very  brief</system>")
    obey(chat, "/set system")
    chat.say("two")
    assert script.prompt.startswith("<user>")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_k", "40", 40),
        ("top_p", "0.9", 0.9),
        ("min_p", "0.05", 0.05),
        ("repetition_penalty", "1.1", 1.1),
        ("parameter top_p", "0.8", 0.8),
        ("seed", "7", 7),
    ],
)
def test_set_a_parameter(
    name: str, text: str, value: float, chat: Chat, terminal: Terminal
) -> None:
    obey(chat, f"/set {name} {text}")
    name = name.removeprefix("parameter ")
    shown = name.replace("repetition_penalty", "repeat_penalty")
    assert getattr(chat.sampling, name) == value
    assert terminal.take() == f"Set {shown} to {value:g}.\n"
    obey(chat, "/show parameters")
    rows = dict(line.split(maxsplit=1) for line in terminal.take().splitlines())
    assert rows[shown] == f"{value:g}"
    assert list(rows)[:6] == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "seed",
    ]
    chat.say("one")


@pytest.mark.parametrize("name", ["top_k", "num_predict", "seed"])
def test_a_fraction_is_refused_where_a_whole_number_belongs(name: str, chat: Chat) -> None:
    with pytest.raises(ChatError, match="must be a whole number"):
        obey(chat, f"/set {name} 0.5")


def test_show_parameters_tells_all_that_can_be_set(
    chat: Chat, terminal: Terminal, thinker: None
) -> None:
    def rows() -> list[list[str]]:
        obey(chat, "/show parameters")
        return [line.split(maxsplit=1) for line in terminal.take().splitlines()][5:]

    assert rows() == [
        ["seed", "random"],
        ["num_predict", "-1"],
        ["stop", "none"],
        ["think|nothink", "model default"],
        ["thoughts", "show"],
    ]
    for words in ("seed 7", "num_predict 5", "nothink", "thoughts hide"):
        obey(chat, f"/set {words}")
    chat.stop_strings = ("a b", "\n")
    terminal.take()
    assert [value for _, value in rows()] == ["7", "5", r"'a b', '\n'", "off", "hide"]


def test_a_seed_can_be_given_up_again(chat: Chat) -> None:
    obey(chat, "/set seed 7")
    obey(chat, "/set seed random")
    assert chat.sampling.seed is None


def test_set_num_predict_limits_answers_and_minus_1_does_not(
    chat: Chat, terminal: Terminal
) -> None:
    text = _converse(chat, terminal, "/set num_predict 2", "one", "/set num_predict -1", "two")
    told = ("Set num_predict to 2.", "ye", "(stopped at 2 tokens)", "Set num_predict to -1.", "yes")
    assert text.splitlines() == [*told, ""]


def test_set_verbose_and_quiet(chat: Chat, terminal: Terminal) -> None:
    obey(chat, "/set verbose")
    chat.say("one")
    text = terminal.take()
    assert text.index("total duration:") < text.index("eval rate:") < text.index("[ Prompt:")
    obey(chat, "/set quiet")
    assert terminal.take() == "No timings are shown after an answer.\n"
    chat.say("two")
    assert terminal.take() == "yes\n"


def test_show_info(chat: Chat, terminal: Terminal) -> None:
    obey(chat, "/show info")
    text = terminal.take()
    assert "tiny-mixtral: mixtral, 3 MoE layers, 24 experts; bits: experts=4g64" in text
    where = f"6 of 24 experts in memory on cpu, computing in float32, context {CONTEXT}"
    assert where in text


def test_show_experts_draws_who_is_resident(loaded: tuple[Any, Any], terminal: Terminal) -> None:
    model, tokenizer = loaded
    chat = Chat(
        model, tokenizer, Sampling(), Plain(terminal.write), max_new_tokens=3, timings=False
    )
    chat.say("hello")
    terminal.take()
    obey(chat, "/show experts")
    title, numbers, *rows, resident, here, elsewhere = terminal.take().splitlines()
    assert title == f"{LAYERS} layers, one per row; {EXPERTS} experts each, one per column"
    assert numbers.split() == [str(expert) for expert in range(0, EXPERTS, 2)]
    assert len(rows) == LAYERS
    for index, row in enumerate(rows):
        signs = BLOCKS + PLAIN_BLOCKS + POINTS
        match = re.fullmatch(rf"\s*{index} ([{re.escape(signs)}]{{{EXPERTS}}}) +\d+\.\d% hits", row)
        assert match
    assert re.match(r"[1-6] of 24 experts in memory", resident)
    assert here.startswith("in memory: ")
    assert elsewhere.startswith("not in memory: ")


def test_nothing_is_shown_as_none_before_the_first_question(
    mixtral_pack: Path, terminal: Terminal
) -> None:
    model, tokenizer = offload.load(mixtral_pack, device="cpu", expert_slots=6)
    assert tokenizer is not None
    chat = Chat(model, tokenizer, Sampling(), Plain(terminal.write))
    for command in ("/stats", "/show experts"):
        obey(chat, command)
        text = terminal.take()
        assert "6 of 24" in text or "0 of 24" in text
        assert "hits" not in text
        assert "0.0" not in text
    model.offload.close()


@pytest.mark.parametrize("width", [60, 200])
def test_a_panel_is_as_wide_as_the_terminal_and_explains_itself(
    width: int, loaded: tuple[Any, Any], terminal: Terminal
) -> None:
    chat = Chat(*loaded, Sampling(), Plain(terminal.write), max_new_tokens=3)
    chat.offload.engine.cache.forget()
    panel = Panel(chat.offload)
    chat.say("hello")
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, _environ={"TERM": "xterm"})
    console.print(panel.draw(chat.last))
    text = shown.getvalue()
    assert "93m" in text, "experts that came since the panel was made are marked"
    first, *rows, legend = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert first.startswith("3 tokens, ")
    assert [row.split("  ")[0].split(" █")[0] for row in rows] == ["layer 0", "layer 1", "layer 2"]
    assert max(len(row.rstrip()) for row in rows) > width - 8 - width // 8
    assert legend == "across: 8 experts; █ all ▒ some in memory, █ just loaded"
    console.print(panel.draw(chat.last))
    assert shown.getvalue().count("93m") == text.count("93m") + 1, "only the legend says new now"


def test_stats(chat: Chat, terminal: Terminal) -> None:
    obey(chat, "/stats")
    text = terminal.take()
    for word in ("[ Experts: 6 of 24 in memory", "requests", "hits", "misses", "evictions", "GB/s"):
        assert word in text


def test_set_alone_lists_every_setting_with_its_value(chat: Chat, terminal: Terminal) -> None:
    for line in ("/set", "/set parameter"):
        obey(chat, line)
        rows = terminal.take().splitlines()
        assert len(rows) == len(SETTINGS)
        assert all(len(row) <= 80 for row in rows)
        assert re.match(r"/set temperature X +0 ", rows[1])


@pytest.mark.parametrize(
    ("text", "stops"),
    [('"END" "a b"', ("END", "a b")), ("two words", ("two words",)), ("", ())],
)
def test_stop_texts_are_set(text: str, stops: tuple[str, ...], chat: Chat) -> None:
    obey(chat, f"/set parameter stop {text}")
    assert chat.stop_strings == stops


def test_thinking_is_switched_where_the_template_has_a_switch(
    chat: Chat, terminal: Terminal, thinker: None
) -> None:
    obey(chat, "/set think")
    assert (chat.think, terminal.take()) == (True, "Thinking is on.\n")
    obey(chat, "/set nothink")
    assert (chat.think, terminal.take()) == (False, "Thinking is off.\n")


def test_what_cannot_be_set_here_says_what_to_do(chat: Chat, terminal: Terminal) -> None:
    for name, remedy in (
        ("num_ctx", "-c N"),
        ("num_thread", "-t N"),
        ("num_gpu", "--expert-slots"),
    ):
        assert remedy in _converse(chat, terminal, f"/set parameter {name} 4")


def test_clear_with_words_after_it_forgets_nothing(chat: Chat, terminal: Terminal) -> None:
    text = _converse(chat, terminal, "one", "/clear up this mess")
    assert "/clear takes nothing after it" in text
    assert len(chat.messages) == 2


BLOCKS_ANSWER = (
    "Two:\n\n```python\nif x:\n    y()\n```\n\n1. and\n\n   ```sh\n   ls  # long\n   ```\n"
)


def test_write_puts_an_answer_or_a_code_block_into_a_new_file(
    chat: Chat, terminal: Terminal, tmp_path: Path
) -> None:
    chat.messages = [{"role": "assistant", "content": BLOCKS_ANSWER}]
    file = tmp_path / "a b.py"
    obey(chat, f"/write {file} 1")
    assert file.read_text() == "if x:\n    y()\n"
    assert terminal.take() == f"Wrote 2 lines to {file}\n"
    with pytest.raises(ChatError, match="exists: choose another name"):
        obey(chat, f"/write {file} 2")
    assert file.read_text() == "if x:\n    y()\n"
    obey(chat, f"/write {file}.sh 2")
    assert (tmp_path / "a b.py.sh").read_text() == "ls  # long\n"
    obey(chat, f"/write {tmp_path}/all")
    assert (tmp_path / "all").read_text() == BLOCKS_ANSWER + "\n"
    with pytest.raises(ChatError, match=r"Usage: /write .*x 1 to /write .*x 2"):
        obey(chat, f"/write {tmp_path}/x 3")


def test_a_write_that_fails_leaves_no_part_of_the_file(chat: Chat, tmp_path: Path) -> None:
    chat.messages = [{"role": "assistant", "content": "x" * 5000}]
    with full_beyond(4096), pytest.raises(ChatError, match="cannot write"):
        obey(chat, f"/write {tmp_path}/answer")
    assert not list(tmp_path.iterdir())


def test_a_question_too_long_is_refused_before_turns_are_given_up(
    chat: Chat, terminal: Terminal
) -> None:
    text = _converse(chat, terminal, "one", "x" * CONTEXT)
    assert "no longer fit" not in text


# --- saved conversations -------------------------------------------------------------------------


def test_a_conversation_is_saved_and_loaded(
    chat: Chat, terminal: Terminal, script: Script, home: Path
) -> None:
    chat.system, script.ids = "קצר", list("כן 👋".encode())
    chat.sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=7)
    chat.say("שלום")
    messages, sampling = list(chat.messages), chat.sampling
    obey(chat, "/save my-chat.1")
    assert str(home / "conversations" / "my-chat.1.json") in terminal.take()
    other = Chat(chat.model, chat.tokenizer, Sampling(), Plain(terminal.write))
    other.say("something else")
    obey(other, "/load my-chat.1")
    assert (other.messages, other.system, other.sampling) == (messages, "קצר", sampling)
    assert [file.name for file in (home / "conversations").iterdir()] == ["my-chat.1.json"]


def test_all_that_is_set_is_saved_with_a_conversation(
    chat: Chat, home: Path, thinker: None
) -> None:
    chat.stop_strings, chat.sampling = ("END", "סוף"), Sampling(temperature=0.5, seed=7)
    for words in ("num_predict 5", "nothink", "thoughts hide"):
        obey(chat, f"/set {words}")
    settings, sampling = chat.settings, chat.sampling
    obey(chat, "/save mine")
    other = Chat(chat.model, chat.tokenizer, Sampling(), Plain(lambda _: None))
    assert other.settings != settings
    obey(other, "/load mine")
    assert (other.settings, other.sampling) == (settings, sampling)
    assert (other.max_new_tokens, other.think, other.stop_strings) == (5, False, ("END", "סוף"))
    assert other.display.thoughts is False


def test_a_conversation_saved_by_an_earlier_version_leaves_settings_alone(
    chat: Chat, home: Path
) -> None:
    obey(chat, "/save old")
    file = home / "conversations" / "old.json"
    data = json.loads(file.read_text())
    del data["settings"]
    file.write_text(json.dumps(data))
    obey(chat, "/set num_predict 5")
    before = chat.settings
    obey(chat, "/load old")
    assert chat.settings == before


def test_why_a_saved_conversation_cannot_be_read_is_told(chat: Chat, home: Path) -> None:
    with pytest.raises(ChatError, match="there is no saved conversation 'mine'"):
        obey(chat, "/load mine")
    (home / "conversations" / "mine.json").mkdir(parents=True)
    with pytest.raises(ChatError, match=r"cannot read .*mine\.json: Is a directory"):
        obey(chat, "/load mine")


def test_a_conversation_without_a_seed_comes_back_without_one(chat: Chat) -> None:
    obey(chat, "/save plain")
    obey(chat, "/set seed 7")
    obey(chat, "/load plain")
    assert chat.sampling == Sampling()


def test_saving_again_replaces(chat: Chat, terminal: Terminal) -> None:
    obey(chat, "/save same")
    chat.say("one")
    terminal.take()
    obey(chat, "/save same")
    assert "in place of its earlier state" in terminal.take()
    obey(chat, "/clear")
    obey(chat, "/load same")
    assert [message["content"] for message in chat.messages] == ["one", "yes"]
    assert terminal.take().endswith("Loaded 2 messages.\n>>> one\nyes\n")  # the last turn
    obey(chat, "/save same")  # it was loaded from there


@pytest.mark.parametrize("before", ["/clear", "/load other"])
def test_another_conversation_is_never_replaced(before: str, chat: Chat, home: Path) -> None:
    obey(chat, "/save other")
    chat.say("kept")
    obey(chat, "/save same")
    obey(chat, before)
    with pytest.raises(ChatError, match="same is another saved conversation"):
        obey(chat, "/save same")
    obey(chat, "/load same")
    assert [message["content"] for message in chat.messages] == ["kept", "yes"]


def test_load_alone_lists_what_is_saved(chat: Chat, terminal: Terminal, home: Path) -> None:
    chat.say("What is\nup?")
    obey(chat, "/save first")
    (home / "conversations" / "broken.json").write_text("{")
    terminal.take()
    obey(chat, "/load")
    first, broken = sorted(terminal.take().splitlines(), reverse=True)
    assert re.fullmatch(r"first   \d{4}-\d\d-\d\d \d\d:\d\d, 2 messages: What is up\?", first)
    assert "is not a saved conversation" in broken


WITH_SETTINGS = (
    '{"messages": [], "system": "", "parameters": {"temperature": 1, "top_k": 1, "top_p": 1, '
    '"min_p": 0, "repetition_penalty": 1, "seed": null}, %s}'
)
SAVED_SETTINGS = '"settings": {"num_predict": %s, "think": null, "thoughts": true, "stop": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"messages": [1], "parameters": {}, "system": ""}',
        '{"messages": [], "parameters": {"temperature": "warm"}, "system": ""}',
        '{"messages": [], "parameters": {"temperature": -1}, "system": ""}',
        '{"messages": [], "parameters": [], "system": ""}',
        "[" * 100_000,
        '{"messages": ' + "[" * 900 + "]" * 900 + ', "parameters": {}, "system": ""}',
        '{"messages": [], "parameters": {"temperature": 1, "top_k": Infinity}, "system": ""}',
        WITH_SETTINGS % '"settings": []',
        WITH_SETTINGS % '"settings": {"num_predict": 5}',
        WITH_SETTINGS % SAVED_SETTINGS % ("0", "[]"),
        WITH_SETTINGS % SAVED_SETTINGS % ("true", "[]"),
        WITH_SETTINGS % SAVED_SETTINGS % ("5", '"END"'),
        WITH_SETTINGS % SAVED_SETTINGS % ("5", "[1]"),
        '{"messages": [], "parameters": {"temperature": 1' + "0" * 400 + '}, "system": ""}',
    ],
)
def test_a_saved_file_that_is_damaged_changes_nothing(text: str, chat: Chat, home: Path) -> None:
    chat.say("one")
    chat.system = "kept"
    before = (list(chat.messages), chat.system, chat.sampling, chat.settings)
    (home / "conversations").mkdir()
    (home / "conversations" / "bad.json").write_text(text)
    with pytest.raises(offload.OffloadError):
        obey(chat, "/load bad")
    assert (chat.messages, chat.system, chat.sampling, chat.settings) == before


def test_settings_that_are_good_are_taken(chat: Chat, home: Path) -> None:
    """What the damaged files above differ from."""
    (home / "conversations").mkdir()
    text = WITH_SETTINGS % SAVED_SETTINGS % ("5", '["END"]')
    (home / "conversations" / "good.json").write_text(text)
    obey(chat, "/load good")
    assert (chat.max_new_tokens, chat.stop_strings) == (5, ("END",))


# --- a real terminal -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_chat_in_a_terminal(mixtral: Path, home: Path) -> None:
    import pexpect

    arguments = ["-m", "cli", "chat", str(mixtral), "-n", "8", "--temp", "0"]
    arguments += ["--expert-slots", "25%"]
    environment = {
        **os.environ,
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "OMP_NUM_THREADS": "1",
    }
    child = pexpect.spawn(
        sys.executable,
        arguments,
        cwd=str(ROOT),
        env=environment,
        encoding="utf-8",
        codec_errors="replace",
        timeout=40,
        dimensions=(40, 200),
    )
    try:
        child.expect_exact("6 of 24 experts in memory (25%). /? for help, /bye to quit")
        child.expect_exact(">>>")
        child.send("hello\r")
        child.expect(r"\x1b\[2m\[ Prompt: \d+\.\d t/s \| Generation: \d+\.\d t/s \]\x1b\[0m\r\n")
        child.expect(r"\[ Experts: 6 of 24 in memory \| hits \d+\.\d% \| \d+\.\d MiB/token")
        child.expect_exact(">>>")
        child.send("\x1b[200~pasted\rtext\x1b[201~")  # a paste that holds a line's end
        child.send("\r")
        child.expect(r"\[ Prompt: \d+")
        child.expect_exact(">>>")
        child.send("/save talk\r")
        child.expect_exact("Saved as")
        child.expect_exact(">>>")
        child.send("\x03")
        child.expect_exact("(press Ctrl-D or type /bye to quit)")
        child.expect_exact(">>>")
        child.send("\x04")
        child.expect(pexpect.EOF)
        child.wait()
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
    saved = (home / "conversations" / "talk.json").read_text(encoding="utf-8")
    assert '"content": "hello"' in saved
    assert r'"content": "pasted\ntext"' in saved
    assert "hello" in (home / "history").read_text(encoding="utf-8")
