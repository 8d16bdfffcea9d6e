"""What a line of a chat that begins with a slash may go on with.

Knows: commands and their words, saved conversations, files. Does not know: what commands do
(`offload.chat`).
"""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from offload.home import offload_home

SET = (
    "system",
    "verbose",
    "quiet",
    "think",
    "nothink",
    "thoughts",
    "panel",
    "num_predict",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
)
WORDS: dict[str, tuple[str, ...]] = {
    "?": (),
    "bye": (),
    "clear": (),
    "load": (),
    "read": (),
    "regen": (),
    "save": (),
    "set": SET,
    "set panel": ("on", "off"),
    "set thoughts": ("show", "hide"),
    "show": ("info", "parameters", "system", "experts"),
    "stats": (),
}


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
        before, space, word = text[1:].rpartition(" ")
        if before == "read" and space:
            yield from self._files.get_completions(Document(word), complete_event)
            return
        if before in ("load", "save") and space:
            words: Iterable[str] = saved_conversations()
        elif space:
            words = WORDS.get(before, ())
        else:
            words = [name for name in WORDS if " " not in name]
        for candidate in words:
            if candidate.startswith(word):
                yield Completion(candidate, -len(word))


def saved_conversations() -> list[str]:
    """Names that `/load` takes."""
    return sorted(file.stem for file in (offload_home() / "conversations").glob("*.json"))
