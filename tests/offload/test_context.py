"""Which turns leave a full context."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from offload.context import LEFT_FREE, first_kept, reserve
from offload.generation import Message


def _turns(*sizes: int) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x" * size} for i, size in enumerate(sizes)]


def _encode(messages: Sequence[Message]) -> list[int]:
    return [0] * sum(len(message["content"]) for message in messages)


def test_nothing_leaves_while_all_fits() -> None:
    assert first_kept(_turns(10, 10, 10), 0, 100, _encode) == 0


def test_the_oldest_turns_leave_whole_and_leave_room_for_some_more() -> None:
    messages = _turns(20, 20, 20, 20, 20)
    assert first_kept(messages, 0, 100, _encode) == 2  # 60 of 75 tokens


def test_the_last_message_stays_whatever_its_length() -> None:
    assert first_kept(_turns(5, 5, 500), 0, 100, _encode) == 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=15), st.integers(64, 400))
def test_what_is_sent_fits_and_begins_with_a_user(sizes: list[int], context: int) -> None:
    messages = _turns(*(sizes if len(sizes) % 2 else sizes[1:] or [1]))
    begin = first_kept(messages, 0, context, _encode)
    assert messages[begin]["role"] == "user"
    fits = len(_encode(messages[begin:])) <= context - reserve(context)
    assert fits or begin == len(messages) - 1
    if 0 < begin < len(messages) - 1:
        assert len(_encode(messages[begin:])) <= context * (1 - LEFT_FREE)
