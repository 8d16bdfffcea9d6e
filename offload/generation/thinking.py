"""Tells a reasoning model's thoughts from its answer by the marks around them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from offload.generation.text import held_back

# Opening and closing marks of, in this order: Qwen3, DeepSeek-R1 and GLM; Mistral; Seed-OSS; Kimi;
# Cohere; gpt-oss (the harmony format, whose messages each name their channel); Gemma 4.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought\n", "<channel|>"),
)
# These enclose an answer. A harmony message of another channel, like a call of a tool, keeps what
# stands before its text, because that names the tool.
DROPPED = (
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "<|start|>assistant",
)


class Piece(NamedTuple):
    """Some text, and whether it is a thought or part of the answer."""

    text: str
    thought: bool


class Voices:
    """Splits text that arrives piece by piece into thoughts and answer.

    Thoughts come before the answer. Inside the answer, a mark spelled out as ordinary text, for
    example in an explanation of such marks, counts as text; a mark that is a special token still
    opens thoughts.
    """

    def __init__(self, prompt: str = "", specials: Sequence[str] = ()) -> None:
        """`prompt`: the end of the prompt, which may already open the thoughts. `specials`: the
        texts of special tokens, which are dropped unless they are marks."""
        marks = {mark for pair in MARKS for mark in pair}
        self._dropped = tuple(DROPPED) + tuple(text for text in specials if text not in marks)
        self._tokens = tuple(mark for mark, _ in MARKS if mark.startswith(tuple(specials)))
        self._answering = False  # whether any text of the answer has arrived
        self._close: str | None = None  # the mark that ends the current thoughts; None: the answer
        self._held = ""  # text that may turn out to be the beginning of a mark
        self._fresh = True  # no text has arrived since the last mark
        for opening, closing in MARKS:
            if prompt.rstrip().endswith(opening.rstrip()):
                self._close = closing

    def push(self, text: str) -> Iterator[Piece]:
        """Take more `text`, and yield the pieces whose voice is now certain."""
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
        """Yield the text that was held back, because the answer is over."""
        rest, self._held = self._held, ""
        yield from self._piece(rest)

    def _first_mark(self) -> tuple[int, str] | None:
        """Return position and text of the first mark, unless it may still become a longer one."""
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
        """Whether `mark` counts as a mark after the text `before`, which was not yielded yet."""
        if self._close is not None or mark in self._tokens or mark in self._dropped:
            return True
        return not before.strip()

    def _pass(self, mark: str) -> None:
        if mark == self._close:
            self._close, self._fresh = None, True
        elif (closing := dict(MARKS).get(mark)) is not None:
            self._close, self._fresh = closing, True

    def _piece(self, text: str) -> Iterator[Piece]:
        if self._fresh:  # a mark stands on its own line, so line breaks after it are dropped
            text = text.lstrip("\n")
        if text:
            self._fresh = False
            self._answering |= self._close is None and not text.isspace()
            yield Piece(text, self._close is not None)


class OneVoice(Voices):
    """All text is the answer, whatever marks it has."""

    def push(self, text: str) -> Iterator[Piece]:
        yield Piece(text, False)


def marks_are_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the marks are special tokens, which decoding leaves out unless told otherwise."""
    specials = tuple(tokenizer.all_special_tokens)
    return any(opening.startswith(specials) for opening, _ in MARKS)


def voices_for(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> Voices:
    """What tells thoughts from answers in text that follows the ids of `prompt`.

    Where `marks_are_special`, the text must be decoded with its special tokens.
    """
    special = marks_are_special(tokenizer)
    end = str(tokenizer.decode(prompt[-16:]))
    return Voices(end, tokenizer.all_special_tokens if special else ())


def apart(voices: Voices, text: str) -> tuple[str, str]:
    """The thoughts and the answer in a whole `text`."""
    said = {True: "", False: ""}  # is it a thought? -> text
    for piece in (*voices.push(text), *voices.finish()):
        said[piece.thought] += piece.text
    return said[True], said[False]
