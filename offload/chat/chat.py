"""The state of one conversation, and how its next answer is made and shown."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.chat.display import Display
from offload.chat.saved import Settings
from offload.engine.handle import Offload, offload_of
from offload.errors import ChatError
from offload.generation.conversation import Message
from offload.generation.prompt import PromptCache, can_switch_thinking, encode_prompt
from offload.generation.stream import (
    GenerationResponse,
    stopped_at,
    stream_generate,
    timings,
    verbose_rows,
)
from offload.generation.thinking import Piece, Voices, marks_are_special, voices_for
from offload.lines import printable, shortened
from offload.sampling import Sampling

NEARLY_FULL = 0.85  # share of the context in use at which the user is told that turns will leave
# When turns leave, this share of the context is freed at once. Freeing just enough would let every
# further turn push another one out, and each time the whole prompt would have to be read again.
LEFT_FREE = 0.25
MOST_RESERVED = 512  # tokens kept free for the answer; never more than an eighth of the context


def reserve(context: int) -> int:
    """Return how many tokens of the context a prompt must leave free for its answer."""
    return min(MOST_RESERVED, context // 8)


def fit(
    messages: Sequence[Message],
    begin: int,
    context: int,
    encode: Callable[[Sequence[Message]], list[int]],
) -> tuple[int, list[int]]:
    """Choose the first message to send, and return its index and the token ids from there on.

    The index is `begin` if everything from `begin` fits into `context` tokens; otherwise the oldest
    turns leave. Turns leave whole: a turn is a user's message and everything that follows it. The
    last turn always stays, even if it is too long by itself, which the caller must check. The
    search encodes at most log2(n) + 2 candidates for n turns, because encoding a long conversation
    is slow.
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


@dataclass
class Chat:
    """The state of one conversation."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    display: Display
    system: str = ""
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    timings: bool = True
    verbose: bool = False
    load_seconds: float = 0.0  # time spent loading the model, reported with the first answer
    debug: bool = False  # let an unexpected error end the chat with its traceback
    messages: list[Message] = field(default_factory=list)
    begin: int = 0  # index of the first message that still fits into the context
    think: bool | None = None  # passed to the chat template; None leaves the template's default
    template_arguments: dict[str, Any] | None = None  # others that the chat template gets
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    name: str | None = None  # under which this conversation was saved or loaded
    stopped: bool = False  # whether Ctrl-C ended the last answer
    last: GenerationResponse | None = None  # the newest response of the current or last answer

    def say(self, text: str) -> None:
        """Send a message and show the answer as it arrives. Ctrl-C keeps the text shown so far."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def answer_again(self) -> None:
        """Replace the last answer, or give the missing one. Raises `ChatError` when the
        conversation is empty."""
        if not self.messages:
            raise ChatError("Nothing to regenerate yet")
        answered = self.messages[-1]["role"] == "assistant"
        self._answer(self.messages[:-1] if answered else self.messages)

    def clear(self) -> None:
        """Forget the messages and keep the settings."""
        self.messages, self.begin, self.name = [], 0, None

    def show_last_turn(self) -> None:
        """Show the last question and its answer."""
        for message in self.messages[-2:]:
            if message["role"] == "user":
                self.display.note(f">>> {printable(shortened(message['content']))}\n")
            else:
                self.display.show(Piece(message["content"], thought=False))
                self.display.finish()

    @property
    def offload(self) -> Offload:
        """The model's experts."""
        return offload_of(self.model)

    @property
    def can_think(self) -> bool:
        """Whether the chat template has a switch for thinking."""
        return can_switch_thinking(self.tokenizer)

    @property
    def settings(self) -> Settings:
        """The settings of this chat other than sampling and system prompt."""
        return Settings(self.max_new_tokens, self.think, self.display.thoughts, self.stop_strings)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.max_new_tokens, self.think = settings.num_predict, settings.think
        self.display.thoughts, self.stop_strings = settings.thoughts, settings.stop

    def _answer(self, messages: list[Message]) -> None:
        """Answer `messages`; then `messages` and the answer become the conversation.

        If an error ends the answer, the conversation stays as it was and the question can be asked
        again.
        """
        context = self.offload.fit.options.context
        begin, ids = fit(messages, min(self.begin, len(messages) - 1), context, self._encode)
        special = marks_are_special(self.tokenizer)
        stream = self._stream(ids, skip_special_tokens=not special)
        if begin > self.begin:
            self.display.note(f"(the oldest {begin} messages no longer fit into the context)\n")
        voices = voices_for(self.tokenizer, ids)
        self.display.wait(f"Reading {len(ids)} tokens")
        self.last = None
        said = {False: "", True: ""}  # is it a thought? -> text so far
        self.stopped = False
        try:
            for piece in self._pieces(stream, voices):
                said[piece.thought] += piece.text
                self.display.show(piece)
        except KeyboardInterrupt:
            self.stopped = True
        except BaseException:
            self.display.rest()
            if said[False] or said[True]:
                self.display.finish()
            raise
        answer = {"role": "assistant", "content": said[False]}
        if said[True]:
            answer["thinking"] = said[True]
        # First, because one more Ctrl-C may come while the rest is shown.
        self.messages, self.begin = [*messages, answer], begin
        self.display.finish()
        if self.stopped:
            self.display.note("(stopped)\n")
        elif self.last is not None and (cut := stopped_at(self.last)):
            self.display.note(f"{cut}\n")
        if self.last is not None:
            self._tell_figures(self.last)

    def _tell_figures(self, last: GenerationResponse) -> None:
        if self.verbose:
            self.display.note(verbose_rows(last, self.load_seconds) + "\n")
        self.load_seconds = 0.0  # reported once, with the first answer
        if self.timings:
            self.display.note(f"\n{timings(last)}\n{last.experts.line()}\n")
        context = self.offload.fit.options.context
        used = last.prompt_tokens + last.generation_tokens
        if used > NEARLY_FULL * context:
            self.display.note(
                f"(context almost full: {used} of {context} tokens. The oldest turns will be "
                "dropped; /clear makes room, and chat -c N begins with more)\n"
            )

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [{"role": m["role"], "content": m["content"]} for m in messages]
        return encode_prompt(
            self.tokenizer, [*system, *said], think=self.think, arguments=self.template_arguments
        )

    def _stream(self, ids: list[int], *, skip_special_tokens: bool) -> Iterator[GenerationResponse]:
        """The steps of an answer. Raises `GenerationError` at once if it cannot be given."""
        return stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens or self.offload.fit.options.context,
            stop_strings=self.stop_strings,
            skip_special_tokens=skip_special_tokens,
            prompt_cache=self.prompt_cache,
            **vars(self.sampling),
        )

    def _pieces(self, stream: Iterator[GenerationResponse], voices: Voices) -> Iterator[Piece]:
        for response in stream:
            self.last = response
            yield from voices.push(response.text)
        yield from voices.finish()
