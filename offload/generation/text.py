"""From token ids to text, piece by piece.

Knows: that a character may need several tokens, and that a stop string may be cut anywhere. Does
not know: models.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoding puts where bytes do not make a character (yet)


class TextStream:
    """Turns tokens into text that never holds part of a character nor anything of a stop string."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, so that spaces between tokens come out right
        self._shown = 0  # tokens whose text was taken
        self._held = ""  # text that may turn out to begin a stop string
        self.stopped = False  # a stop string was met

    def push(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        self._ids.append(token)
        return self._emit(self._new_text())

    def finish(self) -> str:
        """What was held back when generation ends; bytes that never became a character are
        dropped."""
        if self.stopped:
            return ""
        text = self._decode(self._context, len(self._ids))
        shown = self._decode(self._context, self._shown)
        rest = self._emit(text[len(shown) :].rstrip(INCOMPLETE))
        rest, self._held = rest + self._held, ""
        self._shown = len(self._ids)
        return rest

    def _new_text(self) -> str:
        shown = self._decode(self._context, self._shown)
        text = self._decode(self._context, len(self._ids))
        if text.endswith(INCOMPLETE) or len(text) <= len(shown):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip_special)
        )

    def _emit(self, new: str) -> str:
        if not self._stops:
            return new
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that may turn out to begin one of `marks`."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-size:]) and len(mark) > size for mark in marks):
            return size
    return 0
