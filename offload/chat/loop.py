"""The loop of a chat: read a message or a command, answer it, until the user leaves."""

from __future__ import annotations

from collections.abc import Callable

from offload.chat.chat import Chat
from offload.chat.commands import obey
from offload.lines import one_line
from offload.quant.errors import OffloadError

QUOTES = '"""'


def converse(chat: Chat, read: Callable[[str], str], first: str | None = None) -> None:
    """Answer `first`, if it is given, then read and answer messages until `/bye` or the end of the
    input (`EOFError`).

    An error in an answer or a command is shown in one line and the chat goes on. An error in
    reading or writing ends the chat, because nobody is there to talk to."""
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
    """Read one message with `read(prompt)`. The second value says whether three quotes enclose
    it."""
    line = read(">>> ")
    if not line.startswith(QUOTES):
        return line, False
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n"), True


def is_command(text: str) -> bool:
    """Whether an unquoted message is a command. A message of several lines, for example a pasted
    one, is a command only if it sets the system prompt."""
    several_lines = "\n" in text.strip()
    return text.startswith("/set system " if several_lines else "/")


def _answer(chat: Chat, text: str, quoted: bool) -> bool:
    """Carry out a command or answer a message. Return False if the chat is over."""
    try:
        if is_command(text) and not quoted:
            return obey(chat, text.strip())
        chat.say(text)
    except Exception as error:
        if chat.debug and not isinstance(error, OffloadError):
            raise
        chat.display.write(f"{one_line(error)}\n")
    return True
