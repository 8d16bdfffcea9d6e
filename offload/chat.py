"""A conversation in a terminal: what is said, what is set, and the commands that begin with a
slash.

Knows: messages, parameters, commands. Does not know: terminals; lines come in and text goes out
through two callables, so that a test can be the terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.context import NEARLY_FULL, first_kept
from offload.display import Display
from offload.errors import OffloadError, one_line
from offload.files import read_text, user_path, write_whole
from offload.generation import GenerationResponse, Message, encode_prompt, stream_generate
from offload.handle import offload_of
from offload.home import offload_home
from offload.prompt_cache import PromptCache
from offload.report import bits_name, experts_map, live_panel, timings, verbose_rows
from offload.sampling import Sampling
from offload.thinking import Voices, marks_are_special

HELP = """\
  /set system TEXT         set the system prompt
  /set NAME VALUE          set a sampling parameter (/show parameters) or num_predict
  /set verbose|quiet       show all timings after an answer, or none
  /show info|parameters|system|experts
  /set think|nothink       ask the model to think first, or not to (models that know how)
  /set thoughts show|hide  what a model thinks before it answers
  /set panel on|off        speed, hits and experts below an answer while it comes
  /stats                   the experts' figures so far
  /save NAME, /load NAME   keep this conversation, or go back to one
  /read FILE               send a file's text as a message
  /regen                   answer the last message again
  /clear                   forget the conversation
  /bye                     leave (also Ctrl-D)
  \"\"\"                      begins and ends a message of several lines; Ctrl-C stops an answer"""
PARAMETERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
NAME = re.compile(r"[\w.-]+")
UNUSABLE = (ValueError, OverflowError, RecursionError)  # what JSON and its numbers may raise


class ChatError(OffloadError):
    """A command that cannot be carried out."""


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
    load_seconds: float = 0.0
    debug: bool = False  # an error that is not ours ends the chat with its traceback
    messages: list[Message] = field(default_factory=list)
    begin: int = 0  # of `messages` that still are in the context
    think: bool | None = None  # asked of the template; None: as the template has it
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    _last: GenerationResponse | None = None  # of the answer that is coming, or came

    def say(self, text: str) -> None:
        """Send a message and write the answer as it comes. Ctrl-C keeps what was said so far."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def _answer(self, messages: list[Message]) -> None:
        """Answer `messages`, which become the conversation, with the answer, once there is one.

        Whatever ends it before leaves the conversation as it was: the question may be asked again.
        """
        ids = self._make_room(messages)
        special = marks_are_special(self.tokenizer)
        voices = Voices(
            str(self.tokenizer.decode(ids[-16:])),
            self.tokenizer.all_special_tokens if special else (),
        )
        self._last = None
        said = {False: "", True: ""}  # the answer, and the thoughts before it
        stopped = False
        try:
            for response in self._stream(ids, skip_special_tokens=not special):
                self._last = response
                for piece in voices.push(response.text):
                    said[piece.thought] += piece.text
                    self.display.show(piece)
            for piece in voices.finish():
                said[piece.thought] += piece.text
                self.display.show(piece)
        except KeyboardInterrupt:
            stopped = True
        except BaseException:
            if said[False] or said[True]:
                self.display.finish()
            raise
        self.display.finish()
        answer = {"role": "assistant", "content": said[False]}
        if said[True]:
            answer["thinking"] = said[True]
        self.messages = [*messages, answer]
        if stopped:
            self.display.write("(stopped)\n")
        if self._last is not None:
            self._tell_figures(self._last)

    def _tell_figures(self, last: GenerationResponse) -> None:
        if self.verbose:
            self.display.write(verbose_rows(last, self.load_seconds) + "\n")
        if self.timings:
            self.display.write(f"\n{timings(last)}\n{last.experts.line()}\n")
        context = offload_of(self.model).options.context
        used = last.prompt_tokens + last.generation_tokens
        if used > NEARLY_FULL * context:
            self.display.write(
                f"({used} of {context} tokens of context are used: the oldest turns will leave; "
                "--ctx-size makes room, /clear begins anew)\n"
            )

    def _make_room(self, messages: list[Message]) -> list[int]:
        """The ids of the messages that fit; says how many no longer do."""
        context = offload_of(self.model).options.context
        begin = first_kept(messages, min(self.begin, len(messages) - 1), context, self._encode)
        if begin > self.begin:
            self.display.write(f"(the oldest {begin} messages no longer fit into the context)\n")
        self.begin = begin
        return self._encode(messages[begin:])

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

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False means leave. Raises `ChatError`."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "bye":
            return False
        handler = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if name == "?" or name == "help":
            self.display.write(HELP + "\n")
        elif handler is None:
            raise ChatError(f"there is no command /{name}: /? lists them")
        else:
            handler(rest)
        return True

    def _do_clear(self, _: str) -> None:
        self.messages.clear()
        self.begin = 0
        self.display.write("The conversation is forgotten.\n")

    def _do_regen(self, _: str) -> None:
        if not self.messages:
            raise ChatError("nothing was said yet: there is no answer to make again")
        answered = self.messages[-1]["role"] == "assistant"
        self.begin = 0
        self._answer(self.messages[:-1] if answered else self.messages)

    def _do_read(self, rest: str) -> None:
        file = user_path(rest)
        try:
            if not file.is_file():  # reading from a device or a pipe might never end
                raise ChatError(f"there is no file {rest!r}")
            with file.open(encoding="utf-8") as handle:
                text = read_text(handle, "the file")
        except (OSError, OffloadError) as error:
            raise ChatError(f"cannot read {file}: {error}") from None
        self.say(text)

    def _do_save(self, rest: str) -> None:
        file = _session_file(rest)
        data = {
            "system": self.system,
            "parameters": {name: getattr(self.sampling, name) for name in PARAMETERS},
            "messages": self.messages,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(data, indent=1, ensure_ascii=False).encode())
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChatError(f"cannot write {file}: {reason}") from None
        self.display.write(f"Saved as {file}\n")

    def _do_load(self, rest: str) -> None:
        file = _session_file(rest)
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])}
                | ({"thinking": str(m["thinking"])} if "thinking" in m else {})
                for m in data["messages"]
            ]
            given: dict[str, Any] = {
                name: None if data["parameters"][name] is None else kind(data["parameters"][name])
                for name, kind in PARAMETERS.items()
            }
            sampling = replace(self.sampling, **given)
            self.system = str(data["system"])
        except OSError:
            raise ChatError(f"there is no saved conversation {rest!r} ({file})") from None
        except (LookupError, TypeError, AttributeError, *UNUSABLE) as error:
            raise ChatError(f"{file} is not a saved conversation ({error!r})") from None
        self.messages, self.sampling, self.begin = messages, sampling, 0
        self.display.write(f"Loaded {len(messages)} messages.\n")

    def _do_stats(self, _: str) -> None:
        stats = offload_of(self.model).stats()
        counts = stats.counts
        self.display.write(
            f"{stats.line()}\nrequests {counts.requests}, hits {counts.hits}, misses "
            f"{counts.misses}, "
            f"evictions {counts.evictions}, look-ahead loads {counts.lookahead_loads}\n"
            f"loaded {stats.bytes_loaded / 2**20:.1f} MiB at {stats.link_gb_per_s:.1f} GB/s, "
            f"waited "
            f"{counts.wait_seconds:.2f} s, {stats.tokens} tokens\n"
        )

    def _do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name == "system":
            self.system = value.strip()
        elif name in ("verbose", "quiet"):
            self.verbose = self.timings = name == "verbose"
        elif name in ("think", "nothink"):
            self.think = name == "think"
        elif name == "thoughts":
            self.display.thoughts = _switch(name, value, "show", "hide")
        elif name == "panel":
            self._set_panel(_switch(name, value, "on", "off"))
        elif name == "num_predict":
            count = _number(name, value, int)
            self.max_new_tokens = count if count > 0 else None
        elif name in PARAMETERS:
            self.sampling = replace(self.sampling, **{name: _number(name, value, PARAMETERS[name])})
        else:
            raise ChatError(f"there is nothing called {name!r} to set: /? lists what there is")

    def _set_panel(self, on: bool) -> None:
        if on and not self.display.live:
            raise ChatError("a panel needs a terminal that can be drawn on")
        self.display.panel = self._panel if on else None

    def _panel(self) -> Text:
        return live_panel(self._last, offload_of(self.model))

    def _do_show(self, rest: str) -> None:
        offload = offload_of(self.model)
        if rest == "info":
            info, options = offload.pack.info, offload.options
            self.display.write(
                f"{info.source}: {self.model.config.model_type}, {len(info.layers)} MoE layers, "
                f"{info.total_experts} experts; bits: {bits_name(info)}\n"
                f"pack {offload.pack.path}\n{options.slots} experts resident on "
                f"{' and '.join(map(str, options.devices))}, "
                f"computing in {str(options.dtype).removeprefix('torch.')}, context "
                f"{options.context}\n"
            )
        elif rest == "parameters":
            rows = (f"{name:<20}{getattr(self.sampling, name)}" for name in PARAMETERS)
            self.display.write("\n".join(rows) + "\n")
        elif rest == "system":
            self.display.write((self.system or "(none: the template's own)") + "\n")
        elif rest == "experts":
            self.display.write(experts_map(offload.engine.cache, offload.pack.info) + "\n")
        else:
            raise ChatError("/show info, /show parameters, /show system or /show experts")


def _session_file(name: str) -> Path:
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ChatError("give the conversation a name of letters, digits, dots and dashes")
    return offload_home() / "conversations" / f"{name}.json"


def _switch(name: str, value: str, yes: str, no: str) -> bool:
    if value.strip() not in (yes, no):
        raise ChatError(f"/set {name} {yes} or /set {name} {no}")
    return value.strip() == yes


def _number(name: str, value: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise ChatError(f"{name} must be a number, not {value!r}") from None


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """One message from `read(prompt)`, and whether three quotes began and ended it."""
    line = read(">>> ")
    if not line.startswith('"""'):
        return line, False
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n"), True


def converse(chat: Chat, read: Callable[[str], str]) -> None:
    """Read and answer until `/bye` or the end of the input (`EOFError`).

    An error in an answer or a command is told in one line and the chat goes on; one in reading or
    writing ends it, since there is nobody to talk to.
    """
    while True:
        try:
            text, quoted = read_message(read)
            if not text.strip():
                continue
            if not _obey(chat, text, quoted):
                return
        except EOFError:
            chat.display.write("\n")
            return
        except KeyboardInterrupt:
            chat.display.write("\n(/bye or Ctrl-D leaves)\n")


def _obey(chat: Chat, text: str, quoted: bool) -> bool:
    """Carry out a command or answer a message; False means leave."""
    try:
        if text.startswith("/") and not quoted:
            return chat.command(text.strip())
        chat.say(text)
    except Exception as error:
        if chat.debug and not isinstance(error, OffloadError):
            raise
        chat.display.write(f"{one_line(error)}\n")
    return True
