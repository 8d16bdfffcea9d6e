"""Which turns of a conversation fit into the context.

Knows: messages, and that turns leave whole, the oldest first. Does not know: how they become
tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from offload.generation.stream import Message

NEARLY_FULL = 0.85  # of the context: said before turns have to leave
LEFT_FREE = 0.25  # of it, once some have: or each turn would cost a new prefill of all others
MOST_RESERVED = 512  # tokens kept for the answer, at most an eighth of the context


def reserve(context: int) -> int:
    """Tokens of the context that a prompt leaves to its answer."""
    return min(MOST_RESERVED, context // 8)


def fit(
    messages: Sequence[Message],
    begin: int,
    context: int,
    encode: Callable[[Sequence[Message]], list[int]],
) -> tuple[int, list[int]]:
    """Where the messages to send begin, and their ids: at `begin`, or later where from there on
    they do not fit into `context` tokens.

    Whole turns leave, a turn being a user's message and what follows it. The last one stays: that
    it may be too long by itself is for the caller to say. With n turns to choose from log2(n) + 2
    beginnings are encoded: a long conversation takes a while each time.
    """
    ids = encode(messages[begin:])
    if len(ids) <= context - reserve(context):
        return begin, ids
    turns = [at for at, message in enumerate(messages) if message["role"] == "user" and at > begin]
    if not turns:
        return begin, ids
    room = context * (1 - LEFT_FREE)
    first = bisect_left(turns, True, key=lambda at: len(encode(messages[at:])) <= room)
    begin = turns[min(first, len(turns) - 1)]
    return begin, encode(messages[begin:])
