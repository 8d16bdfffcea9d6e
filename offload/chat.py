"""A conversation in a terminal: what is said, what is set, and the commands that begin with a
slash.

Knows: messages, parameters, commands. Does not know: terminals; lines come in and text goes out
through two callables, so that a test can be the terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.errors import OffloadError, one_line
from offload.files import read_text, user_path
from offload.generation import GenerationResponse, Message, stream_generate
from offload.handle import offload_of
from offload.home import offload_home
from offload.report import bits_name, experts_map, timings, verbose_rows
from offload.sampling import Sampling

HELP = """\
  /set system TEXT         set the system prompt
  /set NAME VALUE          set a sampling parameter (/show parameters) or num_predict
  /set verbose|quiet       show all timings after an answer, or none
  /show info|parameters|system|experts
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
    write: Callable[[str], None]
    system: str = ""
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    timings: bool = True
    verbose: bool = False
    load_seconds: float = 0.0
    debug: bool = False  # an error that is not ours ends the chat with its traceback
    messages: list[Message] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Send a message and write the answer as it comes. Ctrl-C keeps what was said so far."""
        self._answer([*self.messages, {"role": "user", "content": text}])

    def _answer(self, messages: list[Message]) -> None:
        """Answer `messages`, which become the conversation, with the answer, once there is one.

        Whatever ends it before leaves the conversation as it was: the question may be asked again.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        last: GenerationResponse | None = None
        said = ""
        try:
            for last in self._stream([*system, *messages]):
                said += last.text
                self.write(last.text)
        except KeyboardInterrupt:
            self.write("\n(stopped)")
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self.write("\n")
        if last is not None and self.verbose:
            self.write(verbose_rows(last, self.load_seconds) + "\n")
        if last is not None and self.timings:
            self.write(f"\n{timings(last)}\n{last.experts.line()}\n")

    def _stream(self, messages: list[Message]) -> Iterator[GenerationResponse]:
        return stream_generate(
            self.model,
            self.tokenizer,
            messages,
            max_new_tokens=self.max_new_tokens or offload_of(self.model).options.context,
            stop_strings=self.stop_strings,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            repetition_penalty=self.sampling.repetition_penalty,
            seed=self.sampling.seed,
        )

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False means leave. Raises `ChatError`."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name == "bye":
            return False
        handler = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if name == "?" or name == "help":
            self.write(HELP + "\n")
        elif handler is None:
            raise ChatError(f"there is no command /{name}: /? lists them")
        else:
            handler(rest)
        return True

    def _do_clear(self, _: str) -> None:
        self.messages.clear()
        self.write("The conversation is forgotten.\n")

    def _do_regen(self, _: str) -> None:
        if not self.messages:
            raise ChatError("nothing was said yet: there is no answer to make again")
        answered = self.messages[-1]["role"] == "assistant"
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
        part = file.with_suffix(".part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(json.dumps(data, indent=1, ensure_ascii=False).encode())
            part.replace(file)
        except (OSError, UnicodeEncodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ChatError(f"cannot write {file}: {reason}") from None
        self.write(f"Saved as {file}\n")

    def _do_load(self, rest: str) -> None:
        file = _session_file(rest)
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]
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
        self.messages, self.sampling = messages, sampling
        self.write(f"Loaded {len(messages)} messages.\n")

    def _do_stats(self, _: str) -> None:
        stats = offload_of(self.model).stats()
        counts = stats.counts
        self.write(
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
        elif name == "num_predict":
            count = _number(name, value, int)
            self.max_new_tokens = count if count > 0 else None
        elif name in PARAMETERS:
            self.sampling = replace(self.sampling, **{name: _number(name, value, PARAMETERS[name])})
        else:
            raise ChatError(f"there is nothing called {name!r} to set: /? lists what there is")

    def _do_show(self, rest: str) -> None:
        offload = offload_of(self.model)
        if rest == "info":
            info, options = offload.pack.info, offload.options
            self.write(
                f"{info.source}: {self.model.config.model_type}, {len(info.layers)} MoE layers, "
                f"{info.total_experts} experts; bits: {bits_name(info)}\n"
                f"pack {offload.pack.path}\n{options.slots} experts resident on {options.device}, "
                f"computing in {str(options.dtype).removeprefix('torch.')}, context "
                f"{options.context}\n"
            )
        elif rest == "parameters":
            rows = (f"{name:<20}{getattr(self.sampling, name)}" for name in PARAMETERS)
            self.write("\n".join(rows) + "\n")
        elif rest == "system":
            self.write((self.system or "(none: the template's own)") + "\n")
        elif rest == "experts":
            self.write(experts_map(offload.engine.cache, offload.pack.info) + "\n")
        else:
            raise ChatError("/show info, /show parameters, /show system or /show experts")


def _session_file(name: str) -> Path:
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ChatError("give the conversation a name of letters, digits, dots and dashes")
    return offload_home() / "conversations" / f"{name}.json"


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
            chat.write("\n")
            return
        except KeyboardInterrupt:
            chat.write("\n(/bye or Ctrl-D leaves)\n")


def _obey(chat: Chat, text: str, quoted: bool) -> bool:
    """Carry out a command or answer a message; False means leave."""
    try:
        if text.startswith("/") and not quoted:
            return chat.command(text.strip())
        chat.say(text)
    except Exception as error:
        if chat.debug and not isinstance(error, OffloadError):
            raise
        chat.write(f"{one_line(error)}\n")
    return True
