"""Faults that are really made: after each the chat, or at least the next run, works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import offload
from offload.chat.chat import Chat
from offload.chat.commands import obey
from offload.chat.display import Plain
from offload.engine.handle import offload_of
from offload.sampling import Sampling
from offload.transfer.host import HostTransfer
from offload.transfer.order import UrgentFirst
from tests.tiny import LAYERS

ROOT = Path(__file__).parents[1]
QUESTIONS = ("one", "two", "שלום")


@pytest.fixture
def pack(mixtral_pack: Path, tmp_path: Path) -> Path:
    """A pack that may be harmed."""
    return Path(shutil.copytree(mixtral_pack, tmp_path / "pack"))


def _load(pack: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    options = {
        "device": "cpu",
        "dtype": torch.float32,
        "expert_slots": 4,
        "warm_start": False,
    } | options
    model, tokenizer = offload.load(pack, **options)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model, tokenizer


@pytest.fixture
def loaded(pack: Path) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    model, tokenizer = _load(pack)
    yield model, tokenizer
    model.offload.close()


def _chat(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast], tokens: int = 6) -> Chat:
    return Chat(*loaded, Sampling(), Plain(lambda _: None), max_new_tokens=tokens, timings=False)


Undisturbed = Callable[[Chat, str], str]


@pytest.fixture(scope="module")
def undisturbed(mixtral_pack: Path) -> Iterator[Undisturbed]:
    """What a model of its own, which nothing ever happens to, answers to a question after what was
    said in a chat."""
    model, tokenizer = _load(mixtral_pack)

    def answer(chat: Chat, question: str) -> str:
        assert chat.model is not model
        other = _chat((model, tokenizer), tokens=chat.max_new_tokens or 6)
        other.messages = list(chat.messages)
        other.say(question)
        return other.messages[-1]["content"]

    yield answer
    model.offload.close()


def _forget_slots(model: PreTrainedModel) -> None:
    transfer = offload_of(model).engine.transfer
    assert isinstance(transfer, HostTransfer)
    for slot in range(4):
        transfer.slot(slot).zero_()


def _turn_a_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()


@pytest.mark.parametrize("harm", [_forget_slots, _turn_a_weight])
def test_harm_to_a_model_would_be_seen_in_its_answers(
    harm: Callable[[PreTrainedModel], None], loaded: tuple[Any, Any], undisturbed: Undisturbed
) -> None:
    """All that follows rests on this comparison."""
    chat = _chat(loaded)
    expected = undisturbed(chat, "one")
    chat.say("one")
    assert chat.messages.pop()["content"] == expected
    chat.clear()
    harm(loaded[0])
    chat.say("one")
    assert chat.messages[-1]["content"] != expected


# --- the pack changes while it is in use ---------------------------------------------------------


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(-1000, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-1000, os.SEEK_END)
        handle.write(bytes([byte ^ 4]))


def _overwrite(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("harm", [_truncate, _flip, _overwrite])
def test_a_pack_that_is_changed_in_use_is_noticed_before_anything_is_said(
    harm: Callable[[Path], None], pack: Path, mixtral_pack: Path, loaded: tuple[Any, Any]
) -> None:
    chat = _chat(loaded)
    for layer in range(LAYERS):
        harm(pack / f"experts-{layer:05}.safetensors")
    with pytest.raises(offload.PackError, match="changed while it was in use"):
        chat.say("one")
    assert chat.messages == []
    shutil.rmtree(pack)
    shutil.copytree(mixtral_pack, pack)
    again = _load(pack)
    _chat(again).say("one")
    again[0].offload.close()


def test_a_pack_that_is_replaced_in_use_goes_on_as_it_was(
    pack: Path,
    mixtral_pack: Path,
    loaded: tuple[Any, Any],
    tmp_path: Path,
    undisturbed: Undisturbed,
) -> None:
    """As packs are replaced: other files under the same names."""
    expected = undisturbed(_chat(loaded), "one")
    shutil.copytree(mixtral_pack, tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        if file.name.startswith("experts"):
            file.write_bytes(bytes(file.stat().st_size))
        file.replace(pack / file.name)
    offload_of(loaded[0]).engine.cache.forget()  # so that all is read anew
    chat = _chat(loaded)
    chat.say("one")
    assert chat.messages[-1]["content"] == expected


# --- the copy thread ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_copy_thread_that_dies_is_replaced_before_the_next_answer(
    loaded: tuple[Any, Any], undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object) -> None:
        raise SystemExit("as when memory runs out at a bad moment")

    chat = _chat(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(UrgentFirst, "pop", die)
        with pytest.raises(offload.OffloadError, match="ask again"):
            chat.say("one")
    assert chat.messages == []
    chat.say("one")
    answer = chat.messages.pop()["content"]
    chat.messages.clear()
    assert answer == undisturbed(chat, "one")


# --- Ctrl-C ---------------------------------------------------------------------------------------


def _interrupt_often(loaded: tuple[Any, Any], undisturbed: Undisturbed, times: int) -> int:
    """Ctrl-C at so many random moments of answers; how many were cut short."""
    chooser, chat, cut = random.Random(1), _chat(loaded), 0
    begin = time.perf_counter()
    chat.say(QUESTIONS[0])
    longest = time.perf_counter() - begin
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(times):
            if len(chat.messages) > 4:
                obey(chat, "/clear")
            said = len(chat.messages)
            try:
                signal.setitimer(signal.ITIMER_REAL, chooser.uniform(1e-4, 1.1 * longest))
                chat.say(QUESTIONS[i % 3])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:  # outside the answer: the chat's loop tells it
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            answered = len(chat.messages) > said
            cut += not answered or len(chat.messages[-1]["content"]) < 6
            expected = undisturbed(chat, "and now")
            chat.say("and now")
            assert chat.messages[-1]["content"] == expected, f"after interruption {i}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    offload_of(loaded[0]).engine.cache.check_integrity()
    return cut


@pytest.mark.skipif(sys.platform == "win32", reason="needs timers that signal")
def test_ctrl_c_at_random_moments_changes_no_later_answer(
    loaded: tuple[Any, Any], undisturbed: Undisturbed
) -> None:
    assert _interrupt_often(loaded, undisturbed, 12) > 0


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs timers that signal")
def test_ctrl_c_at_two_hundred_random_moments_changes_no_later_answer(
    loaded: tuple[Any, Any], undisturbed: Undisturbed
) -> None:
    assert _interrupt_often(loaded, undisturbed, 200) > 50


# --- several at once ----------------------------------------------------------------------------


def test_two_chats_share_a_pack_and_a_home(pack: Path, home: Path) -> None:
    command = [sys.executable, "-m", "cli", "chat", str(pack), "-n", "5", "--temp", "0"]
    lines = "one\n/save same\ntwo\n/save same\n/bye\n"
    chats = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        for _ in range(2)
    ]
    for chat in chats:
        assert chat.stdin is not None
        chat.stdin.write(lines)
        chat.stdin.close()
        chat.stdin = None
    outputs = [chat.communicate(timeout=600) for chat in chats]
    assert [chat.returncode for chat in chats] == [0, 0], outputs
    answers = [[s for s in out.splitlines() if not s.startswith("Saved as")] for out, _ in outputs]
    assert answers[0] == answers[1]
    assert sorted(file.name for file in (home / "conversations").iterdir()) == ["same.json"]
    model, tokenizer = _load(pack)
    chat = _chat((model, tokenizer))
    obey(chat, "/load same")
    assert len(chat.messages) == 4
    model.offload.close()


def test_what_a_killed_process_left_of_a_save_is_removed(
    loaded: tuple[Any, Any], home: Path
) -> None:
    (home / "conversations").mkdir()
    left = home / "conversations" / ".talk.json.999999999.part"
    left.write_bytes(b'{"half')
    chat = _chat(loaded)
    chat.say("one")
    obey(chat, "/save talk")
    assert [file.name for file in left.parent.iterdir()] == ["talk.json"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 3])
def test_memory_that_runs_out_ends_one_answer_only(
    at: int, loaded: tuple[Any, Any], undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    import offload.engine.layer

    chat, real, calls = _chat(loaded), offload.engine.layer.matmul, 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7 * at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(offload.engine.layer, "matmul", fail)
        with pytest.raises(RuntimeError, match="allocate"):
            chat.say("one")
    assert chat.messages == []
    chat.say("one")
    answer = chat.messages[-1]["content"]
    chat.messages.clear()
    assert answer == undisturbed(chat, "one")


def test_weights_beside_the_experts_are_not_read_from_the_disk_again(
    pack: Path, loaded: tuple[Any, Any], undisturbed: Undisturbed
) -> None:
    expected = undisturbed(_chat(loaded), "one")
    for file in pack.glob("model*.safetensors"):
        os.truncate(file, 4096)  # pages of a mapping behind its end are a signal that kills
    chat = _chat(loaded)
    chat.say("one")
    assert chat.messages[-1]["content"] == expected
