"""Reading messages and commands until the end of a conversation.

Knows: what one message is, what ends a chat and what only ends an answer. Does not know: where
lines come from (`offload.terminal`), what is done with them (`offload.chat`,
`offload.chat_commands`).
"""

from __future__ import annotations

from collections.abc import Callable

from offload.chat.chat import Chat
from offload.chat.commands import obey
from offload.lines import one_line
from offload.quant.errors import OffloadError

QUOTES = '"""'


def converse(chat: Chat, read: Callable[[str], str], first: str | None = None) -> None:
    """Answer the message `first`, if there is one, then read and answer until `/bye` or the end of
    the input (`EOFError`).

    An error in an answer or a command is told in one line and the chat goes on; one in reading or
    writing ends it, since there is nobody to talk to.
    """
    waiting = [] if first is None else [(first, True)]
    while True:
        try:
            text, quoted = waiting.pop() if waiting else read_message(read)
            if not text.strip():
                continue
            if not _answer(chat, text, quoted):
                return
        except EOFError:
            chat.display.write("\n")
            return
        except KeyboardInterrupt:
            chat.display.write("\n(/bye or Ctrl-D leaves)\n")


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """One message from `read(prompt)`, and whether three quotes began and ended it."""
    line = read(">>> ")
    if not line.startswith(QUOTES):
        return line, False
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n"), True


def is_command(text: str) -> bool:
    """Whether a message that no quotes enclose is a command. One of several lines, pasted say, is
    none, but for a system prompt."""
    several_lines = "\n" in text.strip()
    return text.startswith("/set system " if several_lines else "/")


def _answer(chat: Chat, text: str, quoted: bool) -> bool:
    """Carry out a command or answer a message; False means leave."""
    try:
        if is_command(text) and not quoted:
            return obey(chat, text.strip())
        chat.say(text)
    except Exception as error:
        if chat.debug and not isinstance(error, OffloadError):
            raise
        chat.display.write(f"{one_line(error)}\n")
    return True
