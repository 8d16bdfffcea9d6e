"""Processes that are killed while they write, memory that the system really refuses, homes that
cannot be written to: faults made in children, which have everything imported already."""

from __future__ import annotations

import io
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from prompt_toolkit.history import InMemoryHistory
from transformers import PreTrainedTokenizerFast

import cli
import offload
from offload.chat import terminal
from offload.chat.chat import Chat
from offload.chat.commands import converse, obey
from offload.chat.display import Plain
from offload.chat.saved import SavedChat
from offload.engine.handle import offload_of
from offload.errors import NO_MEMORY
from offload.generation.prompt import Message
from offload.sampling import Sampling
from tests.conftest import Script
from tests.quant.packs import FORK, needs_fork

KILLS = 25
LONG = "שלום, some words\nof two lines. " * 3000


# --- SIGKILL while files are written --------------------------------------------------------------


def _killed_at_many_moments(work: Callable[[], None], begun: Path) -> Iterator[int]:
    """After each of many kills of a child that does `work`; its first file was there before."""
    chooser = random.Random(3)
    for number in range(KILLS):
        begun.unlink(missing_ok=True)
        child = FORK.Process(target=work)
        child.start()
        limit = time.monotonic() + 30
        while not begun.exists():
            assert time.monotonic() < limit, "the child never began"
            time.sleep(0.0005)
        time.sleep(chooser.uniform(0, 0.02))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == -signal.SIGKILL, "it had ended by itself"
        yield number


@needs_fork
def test_a_conversation_is_whole_after_a_kill_at_any_moment_of_saving(
    home: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def save_for_ever() -> None:
        for number in itertools.count():
            text = f"{number} {LONG} {number}"
            messages = [{"role": "user", "content": text}] * (1 + number % 3)
            chat = Chat(None, tokenizer, Sampling(), Plain(lambda _: None), messages=messages)  # type: ignore[arg-type]
            chat.name = "talk"
            obey(chat, "/save talk")

    file = home / "conversations" / "talk.json"
    left = 0
    for _ in _killed_at_many_moments(save_for_ever, file):
        messages = SavedChat.load("talk").messages
        number, *_, last = messages[0]["content"].split()
        assert number == last
        assert len(messages) == 1 + int(number) % 3
        assert all(message["content"] == f"{number} {LONG} {number}" for message in messages)
        left += len(list(file.parent.iterdir())) > 1
    assert left > 0, "no kill came in the middle of a write"
    SavedChat("", Sampling(), []).save("talk")
    assert [found.name for found in file.parent.iterdir()] == ["talk.json"]


@needs_fork
def test_the_history_loses_one_line_at_most_to_a_kill(home: Path) -> None:
    file = home / "history"

    def remember_for_ever() -> None:
        for number in itertools.count():
            terminal._History(str(file)).store_string(f"{number} {LONG}")

    for _ in _killed_at_many_moments(remember_for_ever, file):
        terminal._History(str(file)).store_string("afterwards")
        newest, *older = terminal._History(str(file)).load_history_strings()
        assert newest == "afterwards"
        half, whole = older[:1], older[1:]
        assert all(f"{len(whole)} {LONG}".startswith(text.rstrip("\ufffd")) for text in half)
        assert whole == [f"{number} {LONG}" for number in reversed(range(len(whole)))]


# --- memory that is refused -----------------------------------------------------------------------

QUESTION = "tell me all of it " * 25
ROOMS = (0, 256, 512, 1024, 2048, 4096, 8192, 102400)  # KiB beyond what the process has
KEEP_NOTHING = (-3, 1 << 16)  # mallopt's M_MMAP_THRESHOLD: what is freed goes to the system at once


def _rest_of_heap() -> list[bytearray]:
    """All pieces of 16 KiB or more that the process has free and need not ask the system for."""
    held, size = [], 1 << 24
    while size >= 1 << 14:
        try:
            held.append(bytearray(size))
        except MemoryError:
            size //= 2
    return held


def _answer_with_little_memory(pack: Path, results: Connection) -> None:
    """Sends for each of `ROOMS` what was told while memory was short, and whether the next answer,
    without the limit, was right."""
    import ctypes
    import resource

    ctypes.CDLL(None).mallopt(*KEEP_NOTHING)
    model, tokenizer = offload.load(
        pack, device="cpu", dtype=torch.float32, expert_slots=4, context=0, warm_start=False
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    told: list[str] = []
    chat = Chat(model, tokenizer, Sampling(), Plain(told.append), max_new_tokens=4, timings=False)

    encoded, encode = dict[str, list[int]](), chat._encode

    def remember(messages: Sequence[Message]) -> list[int]:
        """What was encoded once is not again: without memory, the tokenizers library aborts."""
        key = str(messages)
        if key not in encoded:
            encoded[key] = encode(messages)
        return encoded[key]

    chat._encode = remember  # type: ignore[method-assign]

    def ask(text: str) -> str:
        """What a chat writes that is asked one question, in its loop."""
        told.clear()
        chat.clear()
        chat.prompt_cache.forget()
        lines = iter([text])

        def read(_: str) -> str:
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line

        converse(chat, read)
        return "".join(told)

    expected, expected_next = ask(QUESTION), ask("and now")
    for room in ROOMS:
        before = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        try:
            held = _rest_of_heap()
            resource.setrlimit(resource.RLIMIT_AS, (most + (room << 10), before[1]))
            short = ask(QUESTION)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            del held
        results.send((room, short, short == expected, ask("and now") == expected_next))
    offload_of(model).engine.cache.check_integrity()
    results.send(None)


# If CPython cannot get the next chunk of its own stack, it releases the function that it would have
# called once too often, and later calls whatever lies there. This chunk is enough for all of ask's.
_answer_with_little_memory.__code__ = _answer_with_little_memory.__code__.replace(
    co_stacksize=1 << 16
)


@needs_fork
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's limit of memory")
def test_an_answer_that_the_system_has_no_memory_for_is_one_line_and_the_next_one_works(
    mixtral_pack: Path,
) -> None:
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_answer_with_little_memory, args=(mixtral_pack, there))
    child.start()
    there.close()
    refused = []
    try:
        while (result := here.recv() if here.poll(60) else "nothing came") is not None:
            room, short, answered, next_works = result
            print(room, answered, next_works, short.splitlines()[-2:])
            assert next_works, f"after {room} KiB"
            if not answered:
                told = short.removesuffix("\n").splitlines()[-1]
                assert "bug" not in told
                refused.append(told)
    finally:
        child.kill()
        child.join()
    assert f"out of memory: {NO_MEMORY}" in refused
    assert answered, "100 MiB are enough"


# --- a home that is not there, or not to be written to --------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only"])
def test_a_chat_goes_on_without_a_home(
    kind: str,
    script: Script,
    mixtral_pack: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "home" / "of" / "mine"
    if kind == "a file":
        place.parent.parent.write_text("in the way")
    elif kind == "read-only":
        place.parent.mkdir(parents=True)
        place.parent.chmod(0o500)
        if os.access(place.parent, os.W_OK):  # nothing is read-only to root, but this:
            place = Path("/sys/kernel/offload")
    monkeypatch.setenv("OFFLOAD_HOME", str(place))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/save talk\n/load talk\ntwo\n"))
    script.say("yes")
    assert cli.main(["chat", str(mixtral_pack), "--no-show-timings"]) == 0
    out, told = (text.splitlines() for text in capsys.readouterr())
    history = terminal._history()
    if kind == "missing":
        saved = f"Saved as {place / 'conversations' / 'talk.json'}"
        assert out == ["yes", saved, "Loaded 2 messages.", "yes", "yes", ""]
        assert not isinstance(history, InMemoryHistory)
    else:
        assert out == ["yes", "yes", ""]
        assert told[1].startswith(f"cannot write {place / 'conversations' / 'talk.json'}: ")
        assert "talk" in told[2]
        assert isinstance(history, InMemoryHistory)
        assert "lines are not remembered" in capsys.readouterr().err
    assert script.prompt == "<user>one</user><assistant>yes</assistant><user>two</user><assistant>"
