"""An answer grows token by token, in whole characters and up to the first stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from offload.generation.prompt import Request

INCOMPLETE = "\ufffd"  # decoding shows this for bytes that do not (yet) form a character


class TextStream:
    """Turns tokens into text, without any part of a stop string or of an unfinished character."""

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
        # Decoding starts at the token `_context`, because the spaces between tokens depend on
        # the tokens before.
        self._context = 0
        self._shown = 0  # number of tokens whose text was returned
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False  # a stop string was found

    def push(self, token: int) -> str:
        """Add a token and return the text that has become certain, which may be empty."""
        self._ids.append(token)
        return self._emit(self._new_text())

    def finish(self) -> str:
        """Return the text that was held back, at the end of an answer.

        Bytes that never became a character are dropped.
        """
        if self.stopped:
            return ""
        rest = self._emit(self._new_text(at_end=True))
        rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self, *, at_end: bool = False) -> str:
        shown = self._decode(self._context, self._shown)
        text = self._decode(self._context, len(self._ids))
        if at_end:
            text = text.rstrip(INCOMPLETE)
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


class Answer:
    """The tokens and the text of an answer, and the reason why it ended."""

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase | None,
        ends: frozenset[int],
        skip_special_tokens: bool = True,
    ) -> None:
        """A token of `ends` ends the answer. Without a `tokenizer` its text stays empty."""
        self.request = request
        self.tokens: list[int] = []  # with the one that ends the sequence
        self.text = ""
        self.finish_reason: str | None = None  # "stop" (a token or a stop string) or "length"
        self._ends = ends
        self._stream = None
        if tokenizer is not None:
            self._stream = TextStream(tokenizer, request.stops, skip_special_tokens)

    @property
    def read(self) -> list[int]:
        """The prompt and the answer so far."""
        return self.request.ids + self.tokens

    def push(self, token: int) -> str:
        """Add a token and return the text that has become certain; the last token leaves none."""
        self.tokens.append(token)
        piece = "" if token in self._ends or self._stream is None else self._stream.push(token)
        if token in self._ends or (self._stream is not None and self._stream.stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._stream is not None:
            piece += self._stream.finish()
        self.text += piece
        return piece


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is the beginning of one of `marks`."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-size:]) and len(mark) > size for mark in marks):
            return size
    return 0
