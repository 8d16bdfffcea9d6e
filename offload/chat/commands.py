"""What a user types into a chat: messages, and slash commands with their help lines."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.text import Text

from offload.cache.trace.heatmap import draw_for, resident_in, squeezed
from offload.chat.chat import Chat
from offload.chat.saved import SavedChat
from offload.engine.handle import Offload, offload_of
from offload.errors import ChatError
from offload.files import read_text, user_path
from offload.generation.stream import GenerationResponse
from offload.lines import one_line
from offload.pack.recipe import bits_name
from offload.quant.errors import OffloadError
from offload.sampling import PARAMETERS

QUOTES = '"""'
# Words in capitals stand for a value that the user types; words joined by | are alternatives.
USAGE = (
    ("/set system TEXT", "set the system prompt"),
    ("/set NAME VALUE", "set a sampling parameter (/show parameters)"),
    ("/set seed random", "use a new random seed for every answer again"),
    ("/set num_predict COUNT", "most new tokens in an answer; -1 means as many as fit"),
    ("/set verbose|quiet", "show all timings after an answer, or none"),
    ("/set think|nothink", "switch thinking on or off, if the model has such a switch"),
    ("/set thoughts show|hide", "show or hide what a model thinks before it answers"),
    ("/set panel on|off", "show speed, hits and experts below an answer while it comes"),
    ("/show info|parameters|system|experts", "show what is running, and how"),
    ("/stats", "show the experts' statistics so far"),
    ("/save NAME", "save the conversation, its system prompt and its settings"),
    ("/load NAME", "go back to a saved conversation"),
    ("/read FILE", "send the text of a file as a message"),
    ("/regen", "answer the last message again"),
    ("/clear", "forget the conversation"),
    ("/?", "show this list (also /help)"),
    ("/bye", "leave (also Ctrl-D)"),
)
KEYS = (
    (QUOTES, "begin and end a message of several lines, or one that starts with /"),
    ("Ctrl-C", "stop the answer"),
)
HELP = "\n".join(f"  {usage:<37} {what}" for usage, what in USAGE + KEYS)


def _words() -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {"": (), "set": tuple(PARAMETERS)}
    for usage, _ in USAGE:
        before: list[str] = []
        for word in usage[1:].split():
            if word.isupper():
                break
            path = " ".join(before)
            words[path] = tuple(dict.fromkeys((*words.get(path, ()), *word.split("|"))))
            before.append(word)
    return words


WORDS = _words()  # words typed so far (without the slash) -> words that may follow, for completion


def converse(chat: Chat, read: Callable[[str], str], first: str | None = None) -> None:
    """Answer `first`, if it is given, then read and answer messages until `/bye` or the end of the
    input (`EOFError`).

    An error in an answer or a command is shown in one line and the chat goes on. An error in
    reading or writing ends the chat, because nobody is there to talk to."""
    waiting = [] if first is None else [(first, True)]
    while True:
        try:
            text, quoted = waiting.pop() if waiting else read_message(read)
            if not text.strip():
                continue
            if not _take(chat, text, quoted):
                return
        except EOFError:
            chat.display.write("\n")
            return
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # some people press it more than once
                chat.display.write("\n(/bye or Ctrl-D leaves)\n")


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """Read one message with `read(prompt)`, and whether three quotes enclose it."""
    line = read(">>> ")
    if not line.startswith(QUOTES):
        return line, False
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n"), True


def _take(chat: Chat, text: str, quoted: bool) -> bool:
    """Carry out a command or answer a message. Return False if the chat is over.

    A message of several lines, for example a pasted one, is a command only if it sets the system
    prompt.
    """
    several_lines = "\n" in text.strip()
    try:
        if not quoted and text.startswith("/set system " if several_lines else "/"):
            return obey(chat, text.strip())
        chat.say(text)
    except Exception as error:
        if chat.debug and not isinstance(error, OffloadError):
            raise
        chat.display.write(f"{one_line(error)}\n")
    return True


def obey(chat: Chat, line: str) -> bool:
    """Carry out a command line, and return False if it ends the chat. Raises `ChatError`."""
    name, _, rest = line[1:].partition(" ")
    if name == "bye":
        return False
    command = COMMANDS.get(name)
    if command is None:
        raise ChatError(
            f"there is no command /{name}: /? lists them; a message that begins with a slash goes "
            'between """'
        )
    command(chat, rest.strip())
    return True


def _help(chat: Chat, _: str) -> None:
    chat.display.write(HELP + "\n")


def _clear(chat: Chat, _: str) -> None:
    chat.clear()
    chat.display.write("The conversation is forgotten.\n")


def _regen(chat: Chat, _: str) -> None:
    chat.answer_again()


def _read(chat: Chat, rest: str) -> None:
    file = user_path(rest)
    try:
        if not file.is_file():  # reading a device or a pipe might never end
            raise ChatError(f"there is no file {rest!r}")
        with file.open(encoding="utf-8-sig") as handle:
            text = read_text(handle, "the file")
    except (OSError, OffloadError) as error:
        raise ChatError(f"cannot read {file}: {error}") from None
    chat.say(text)


def _save(chat: Chat, rest: str) -> None:
    file = SavedChat(chat.system, chat.sampling, chat.messages, chat.settings).save(rest)
    chat.display.write(f"Saved as {file}\n")


def _load(chat: Chat, rest: str) -> None:
    saved = SavedChat.load(rest)
    chat.clear()
    chat.messages, chat.sampling, chat.system = saved.messages, saved.sampling, saved.system
    if saved.settings is not None:
        chat.settings = saved.settings
    chat.display.write(f"Loaded {len(saved.messages)} messages.\n")


def _stats(chat: Chat, _: str) -> None:
    stats = offload_of(chat.model).stats()
    counts = stats.counts
    chat.display.write(
        f"{stats.line()}\n"
        f"requests {counts.requests}, hits {counts.hits}, misses {counts.misses}, "
        f"evictions {counts.evictions}, look-ahead loads {counts.lookahead_loads}\n"
        f"loaded {stats.bytes_loaded / 2**20:.1f} MiB at {stats.link_gb_per_s:.1f} GB/s, "
        f"waited {counts.wait_seconds:.2f} s, {stats.tokens} tokens\n"
    )


def _set(chat: Chat, rest: str) -> None:
    name, _, value = rest.partition(" ")
    value = value.strip()
    if name in ("verbose", "quiet", "think", "nothink") and value:
        raise ChatError(f"/set {name} takes nothing after it, not {value!r}")
    if name == "system":
        chat.system = value
    elif name in ("verbose", "quiet"):
        chat.verbose = chat.timings = name == "verbose"
    elif name in ("think", "nothink"):
        chat.think = name == "think"
    elif name == "thoughts":
        chat.display.thoughts = _switch(name, value, "show", "hide")
    elif name == "panel":
        _set_panel(chat, _switch(name, value, "on", "off"))
    elif name == "num_predict":
        count = _number(name, value, int)
        chat.max_new_tokens = count if count > 0 else None
    elif name in PARAMETERS:
        drawn = name == "seed" and value == "random"
        given: dict[str, Any] = {name: None if drawn else _number(name, value, PARAMETERS[name])}
        chat.sampling = replace(chat.sampling, **given)
    else:
        raise ChatError(f"there is nothing called {name!r} to set: /? lists what there is")


def _set_panel(chat: Chat, on: bool) -> None:
    if on and not chat.display.live:
        raise ChatError("a panel needs a terminal that can be drawn on")
    handle = offload_of(chat.model)
    chat.display.panel = (lambda: _panel(chat.last, handle)) if on else None


def _panel(response: GenerationResponse | None, handle: Offload) -> Text:
    """Speed in tokens/s, hits, MiB loaded a token, and a map of the resident experts. Drawing takes
    a few milliseconds for thousands of experts."""
    if response is None:
        return Text()
    experts = [layer.num_experts for layer in handle.pack.info.layers]
    line = (
        f"{response.generation_tokens} tokens, {response.generation_tps:.1f} t/s, "
        f"hits {response.experts.counts.hit_rate:.1%}, "
        f"{response.experts.mib_per_token:.1f} MiB/token"
    )
    resident = resident_in(handle.engine.cache, experts)
    return Text(f"{line}\n{squeezed(resident)}", style="dim")


def _switch(name: str, value: str, yes: str, no: str) -> bool:
    if value not in (yes, no):
        raise ChatError(f"/set {name} {yes} or /set {name} {no}")
    return value == yes


def _number(name: str, value: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (ValueError, OverflowError):
        allowed = "a number" if kind is float else "a whole number"
        allowed += " or random" if name == "seed" else ""
        raise ChatError(f"{name} must be {allowed}, not {value!r}") from None


def _show(chat: Chat, rest: str) -> None:
    handle = offload_of(chat.model)
    if rest == "info":
        info, fit = handle.pack.info, handle.fit
        text = (
            f"{info.source}: {chat.model.config.model_type}, {len(info.layers)} MoE layers, "
            f"{info.total_experts} experts; bits: {bits_name(info)}\n"
            f"pack {handle.pack.path}\n{handle.stats().slots} slots for experts on "
            f"{' and '.join(map(str, fit.devices))}, computing in "
            f"{str(fit.dtype).removeprefix('torch.')}, context {fit.options.context}"
        )
    elif rest == "parameters":
        text = _parameters(chat)
    elif rest == "system":
        text = chat.system or "(none: the template's own)"
    elif rest == "experts":
        text = draw_for(sys.stdout, handle.heat_map())
    else:
        raise ChatError("/show info, /show parameters, /show system or /show experts")
    chat.display.write(text + "\n")


def _parameters(chat: Chat) -> str:
    settings = chat.settings
    rows: dict[str, object] = {name: getattr(chat.sampling, name) for name in PARAMETERS}
    if chat.sampling.seed is None:
        rows["seed"] = "random"
    rows["num_predict"] = settings.num_predict or -1
    rows["think"] = {None: "as the model has it", True: "yes", False: "no"}[settings.think]
    rows["thoughts"] = "show" if settings.thoughts else "hide"
    rows["stop"] = ", ".join(map(repr, settings.stop)) or "none"
    return "\n".join(f"{name:<20}{value}" for name, value in rows.items())


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "?": _help,
    "help": _help,
    "clear": _clear,
    "load": _load,
    "read": _read,
    "regen": _regen,
    "save": _save,
    "set": _set,
    "show": _show,
    "stats": _stats,
}
