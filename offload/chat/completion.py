"""What a line of a chat that begins with a slash may go on with.

Knows: prompt_toolkit's completions, saved conversations, files. Does not know: which words there
are (`offload.chat_words`).
"""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from offload.chat.chat_words import WORDS
from offload.chat.saved import saved_names


class Slashes(Completer):
    """Completes slash commands; nothing in messages."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        if text.startswith("/read "):  # a file's name may have spaces
            file = Document(text.removeprefix("/read ").lstrip())
            yield from self._files.get_completions(file, complete_event)
            return
        before, _, word = text[1:].rpartition(" ")
        names = before in ("load", "save")
        for candidate in saved_names() if names else WORDS.get(before.strip(), ()):
            if candidate.startswith(word):
                yield Completion(candidate, -len(word))
