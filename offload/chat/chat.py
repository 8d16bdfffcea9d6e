"""A conversation: what was said, and how the next answer is made and shown.

Knows: messages, parameters, what is left when an answer breaks off. Does not know: terminals
(`offload.display`, `offload.terminal`), commands (`offload.chat_commands`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.chat.display import Display
from offload.chat.report import timings, verbose_rows
from offload.chat.saved import Settings
from offload.chat.thinking import Voices, marks_are_special
from offload.engine.handle import offload_of
from offload.errors import ChatError
from offload.generation.prompt_cache import PromptCache
from offload.generation.stream import GenerationResponse, Message, encode_prompt, stream_generate
from offload.sampling import Sampling

NEARLY_FULL = 0.85  # of the context: said before turns have to leave
LEFT_FREE = 0.25  # of it, once some have: or each turn would cost a new prefill of all others
MOST_RESERVED = 512  # tokens kept for the answer, at most an eighth of the context


def reserve(context: int) -> int:
    """Tokens of the context that a prompt leaves to its answer."""
    return min(MOST_RESERVED, context // 8)


def fit(
    messages: Sequence[Message],
    begin: int,
    context: int,
    encode: Callable[[Sequence[Message]], list[int]],
) -> tuple[int, list[int]]:
    """Where the messages to send begin, and their ids: at `begin`, or later where from there on
    they do not fit into `context` tokens.

    Whole turns leave, a turn being a user's message and what follows it. The last one stays: that
    it may be too long by itself is for the caller to say. With n turns to choose from log2(n) + 2
    beginnings are encoded: a long conversation takes a while each time.
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
    load_seconds: float = 0.0  # that the next answer's figures have in them
    debug: bool = False  # an error that is not ours ends the chat with its traceback
    messages: list[Message] = field(default_factory=list)
    begin: int = 0  # of `messages` that still are in the context
    think: bool | None = None  # asked of the template; None: as the template has it
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    stopped: bool = False  # whether Ctrl-C ended the last answer
    last: GenerationResponse | None = None  # of the answer that is coming, or came

    def say(self, text: str) -> None:
        """Send a message and write the answer as it comes. Ctrl-C keeps what was said so far."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def answer_again(self) -> None:
        """Replace the last answer, or give the one that is missing. Raises `ChatError`."""
        if not self.messages:
            raise ChatError("nothing was said yet: there is no answer to make again")
        answered = self.messages[-1]["role"] == "assistant"
        self._answer(self.messages[:-1] if answered else self.messages)

    def clear(self) -> None:
        """Forget what was said; what was set stays."""
        self.messages, self.begin = [], 0

    @property
    def settings(self) -> Settings:
        """What is set beside sampling and system prompt."""
        return Settings(self.max_new_tokens, self.think, self.display.thoughts, self.stop_strings)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.max_new_tokens, self.think = settings.num_predict, settings.think
        self.display.thoughts, self.stop_strings = settings.thoughts, settings.stop

    def _answer(self, messages: list[Message]) -> None:
        """Answer `messages`, which become the conversation, with the answer, once there is one.

        Whatever ends it before leaves the conversation as it was: the question may be asked again.
        """
        begin, ids = self._make_room(messages)
        special = marks_are_special(self.tokenizer)
        voices = Voices(
            str(self.tokenizer.decode(ids[-16:])),
            self.tokenizer.all_special_tokens if special else (),
        )
        self.last = None
        said = {False: "", True: ""}  # the answer, and the thoughts before it
        self.stopped = False
        try:
            for response in self._stream(ids, skip_special_tokens=not special):
                self.last = response
                for piece in voices.push(response.text):
                    said[piece.thought] += piece.text
                    self.display.show(piece)
            for piece in voices.finish():
                said[piece.thought] += piece.text
                self.display.show(piece)
        except KeyboardInterrupt:
            self.stopped = True
        except BaseException:
            if said[False] or said[True]:
                self.display.finish()
            raise
        self.display.finish()
        answer = {"role": "assistant", "content": said[False]}
        if said[True]:
            answer["thinking"] = said[True]
        self.messages, self.begin = [*messages, answer], begin
        if self.stopped:
            self.display.write("(stopped)\n")
        if self.last is not None:
            self._tell_figures(self.last)

    def _tell_figures(self, last: GenerationResponse) -> None:
        if self.verbose:
            self.display.write(verbose_rows(last, self.load_seconds) + "\n")
        self.load_seconds = 0.0  # the first answer had it
        if self.timings:
            self.display.write(f"\n{timings(last)}\n{last.experts.line()}\n")
        context = offload_of(self.model).options.context
        used = last.prompt_tokens + last.generation_tokens
        if used > NEARLY_FULL * context:
            self.display.write(
                f"({used} of {context} tokens of context are used: the oldest turns will leave; "
                "--ctx-size makes room, /clear begins anew)\n"
            )

    def _make_room(self, messages: list[Message]) -> tuple[int, list[int]]:
        """Where the messages that fit begin, and their ids; says how many no longer do."""
        context = offload_of(self.model).options.context
        begin, ids = fit(messages, min(self.begin, len(messages) - 1), context, self._encode)
        if begin > self.begin:
            self.display.write(f"(the oldest {begin} messages no longer fit into the context)\n")
        return begin, ids

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [{"role": m["role"], "content": m["content"]} for m in messages]
        return encode_prompt(self.tokenizer, [*system, *said], think=self.think)

    def _stream(self, ids: list[int], skip_special_tokens: bool) -> Iterator[GenerationResponse]:
        return stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens or offload_of(self.model).options.context,
            stop_strings=self.stop_strings,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            repetition_penalty=self.sampling.repetition_penalty,
            seed=self.sampling.seed,
            skip_special_tokens=skip_special_tokens,
            prompt_cache=self.prompt_cache,
        )
