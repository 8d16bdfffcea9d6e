"""Which turns leave a full context."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from offload.chat.chat import LEFT_FREE, fit, reserve
from offload.generation.prompt import Message


def _turns(*sizes: int) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x" * size} for i, size in enumerate(sizes)]


def _encode(messages: Sequence[Message]) -> list[int]:
    return [0] * sum(len(message["content"]) for message in messages)


def test_nothing_leaves_while_all_fits() -> None:
    assert fit(_turns(10, 10, 10), 0, 100, _encode) == (0, [0] * 30)


def test_the_oldest_turns_leave_whole_and_leave_room_for_some_more() -> None:
    messages = _turns(20, 20, 20, 20, 20)
    assert fit(messages, 0, 100, _encode) == (2, [0] * 60)  # of 75 tokens


def test_the_last_message_stays_whatever_its_length() -> None:
    assert fit(_turns(5, 5, 500), 0, 100, _encode) == (2, [0] * 500)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=15), st.integers(64, 400))
def test_what_is_sent_fits_and_begins_with_a_user(sizes: list[int], context: int) -> None:
    messages = _turns(*(sizes if len(sizes) % 2 else sizes[1:] or [1]))
    begin, ids = fit(messages, 0, context, _encode)
    assert ids == _encode(messages[begin:])
    assert messages[begin]["role"] == "user"
    assert len(ids) <= context - reserve(context) or begin == len(messages) - 1
    if 0 < begin < len(messages) - 1:
        assert len(ids) <= context * (1 - LEFT_FREE)
    if begin > 0:
        assert len(_encode(messages[begin - 2 :])) > context * (1 - LEFT_FREE), "left too early"


def test_a_long_conversation_is_not_encoded_once_a_turn() -> None:
    calls = 0

    def encode(messages: Sequence[Message]) -> list[int]:
        nonlocal calls
        calls += 1
        return _encode(messages)

    begin, _ = fit(_turns(*[10] * 2001), 0, 1000, encode)
    assert begin == 2000 - 74
    assert calls <= 12
