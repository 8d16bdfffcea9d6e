"""Which turns of a conversation fit into the context.

Knows: messages, and that turns leave whole, the oldest first. Does not know: how they become
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.generation import Message

NEARLY_FULL = 0.85  # of the context: said before turns have to leave
LEFT_FREE = 0.25  # of it, once some have: or each turn would cost a new prefill of all others
MOST_RESERVED = 512  # tokens kept for the answer, at most an eighth of the context


def reserve(context: int) -> int:
    """Tokens of the context that a prompt leaves to its answer."""
    return min(MOST_RESERVED, context // 8)


def first_kept(
    messages: Sequence[Message],
    begin: int,
    context: int,
    encode: Callable[[Sequence[Message]], list[int]],
) -> int:
    """Where the messages to send begin: `begin`, or later where from there on they do not fit.

    Whole turns leave, a turn being a user's message and what follows it. The last one stays: that
    it may be too long by itself is for the caller to say.
    """
    if len(encode(messages[begin:])) <= context - reserve(context):
        return begin
    turns = [at for at, message in enumerate(messages) if message["role"] == "user" and at > begin]
    for at in turns:
        if len(encode(messages[at:])) <= context * (1 - LEFT_FREE):
            return at
    return turns[-1] if turns else begin
