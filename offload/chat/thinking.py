"""A reasoning model's answer in two voices: what it thinks, and what it says.

Knows: the marks that models put around their thoughts. Does not know: how either is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from offload.generation.text import held_back

# Opening and closing marks: Qwen3, DeepSeek-R1, GLM; Mistral; Seed-OSS; gpt-oss (harmony, whose
# final message may also come without any thoughts before it); Gemma 4.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    ("<|channel>thought\n", "<channel|>"),
)
DROPPED = ("<|channel|>final<|message|>",)  # opens an answer that no thoughts precede


class Piece(NamedTuple):
    """Some text, and whose it is."""

    text: str
    thought: bool


class Voices:
    """Tells thoughts from the answer in text that comes piece by piece.

    Thoughts come before the answer. In it a mark that is text, as in an explanation of such marks,
    is text; one that is a special token still opens thoughts.
    """

    def __init__(self, prompt: str = "", specials: Sequence[str] = ()) -> None:
        """`prompt`: the end of what the model was given, which may open its thoughts already;
        `specials`: special tokens' texts, to be dropped where they are no marks."""
        marks = {mark for pair in MARKS for mark in pair}
        self._dropped = tuple(DROPPED) + tuple(text for text in specials if text not in marks)
        self._tokens = tuple(mark for mark, _ in MARKS if mark.startswith(tuple(specials)))
        self._answering = False  # something of the answer was said
        self._close: str | None = None  # the mark that ends the thoughts being read
        self._held = ""  # may turn out to begin a mark
        self._fresh = True  # nothing was said since the voice changed
        for opening, closing in MARKS:
            if prompt.rstrip().endswith(opening.rstrip()):
                self._close = closing

    def push(self, text: str) -> Iterator[Piece]:
        """What is certain after more `text`."""
        self._held += text
        while (met := self._first_mark()) is not None:
            at, mark = met
            yield from self._piece(self._held[:at])
            self._held = self._held[at + len(mark) :]
            self._pass(mark)
        certain = len(self._held) - held_back(self._held, self._awaited())
        yield from self._piece(self._held[:certain])
        self._held = self._held[certain:]

    def finish(self) -> Iterator[Piece]:
        """What was held back when the answer ends."""
        rest, self._held = self._held, ""
        yield from self._piece(rest)

    def _first_mark(self) -> tuple[int, str] | None:
        """Where the first mark is that is not the beginning of a longer one."""
        marks = self._awaited()
        found = [
            (at, -len(mark), mark)
            for mark in marks
            if (at := self._held.find(mark)) >= 0 and self._counts(mark, self._held[:at])
        ]
        if not found:
            return None
        at, _, mark = min(found)
        rest = self._held[at:]
        if any(len(other) > len(rest) and other.startswith(rest) for other in marks):
            return None
        return at, mark

    def _awaited(self) -> tuple[str, ...]:
        if self._close is not None:
            return (self._close,)
        openings = self._tokens if self._answering else (opening for opening, _ in MARKS)
        return (*openings, *self._dropped)

    def _counts(self, mark: str, before: str) -> bool:
        """Whether `mark` is one after the text `before`, which was not said yet."""
        if self._close is not None or mark in self._tokens or mark in self._dropped:
            return True
        return not before.strip()

    def _pass(self, mark: str) -> None:
        if mark == self._close:
            self._close, self._fresh = None, True
        elif (closing := dict(MARKS).get(mark)) is not None:
            self._close, self._fresh = closing, True

    def _piece(self, text: str) -> Iterator[Piece]:
        if self._fresh:  # marks stand on lines of their own
            text = text.lstrip("\n")
        if text:
            self._fresh = False
            self._answering |= self._close is None and not text.isspace()
            yield Piece(text, self._close is not None)


def marks_are_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether marks are special tokens, which decoding would leave out."""
    specials = tuple(tokenizer.all_special_tokens)
    return any(opening.startswith(specials) for opening, _ in MARKS)
