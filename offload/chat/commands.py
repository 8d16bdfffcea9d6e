"""What a user types into a chat: messages, and slash commands with their help lines."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.chat import figures
from offload.chat.display import Rendered
from offload.chat.markdown import code_blocks
from offload.chat.saved import SavedChat, is_saved, listing
from offload.errors import ChatError
from offload.files import asked_text, user_path, write_whole
from offload.lines import did_you_mean, one_line
from offload.quant.errors import OffloadError
from offload.sampling import PARAMETERS

if TYPE_CHECKING:
    from offload.chat.chat import Chat

QUOTES = '"""'
# Words in capitals stand for a value that the user types; one in brackets may be left out.
USAGE = (
    ("/set NAME VALUE", "change a setting (/set alone lists them)"),
    ("/show WHAT", "show info, parameters, system, template or experts"),
    ("/stats", "cache statistics of the experts"),
    ("/save NAME", "save the conversation with its settings"),
    ("/load [NAME]", "continue a saved conversation, or list them"),
    ("/read FILE", "send the text of a file as a message"),
    ("/regen", "answer the last message again"),
    ("/copy [N]", "copy the last answer, or its code block N"),
    ("/write FILE [N]", "write the last answer, or its code block N, to a file"),
    ("/clear", "clear the conversation"),
    ("/?", "show this list (also /help)"),
    ("/bye", "quit (also /exit, /quit, Ctrl-D)"),
)
KEYS = (
    (QUOTES, "around a message of several lines, or one that starts with /"),
    ("Alt-Enter", "begin a new line in a message"),
    ("Ctrl-C", "stop the answer"),
    ("Ctrl-R, Tab", "search earlier messages, complete a command"),
)
SETTINGS = {
    "system": ("TEXT", "system prompt"),
    "temperature": ("X", "0: always the likeliest token"),
    "top_k": ("N", "only the N likeliest tokens (0: off)"),
    "top_p": ("X", "only tokens that add up to X (1: off)"),
    "min_p": ("X", "none below X times the best (0: off)"),
    "repeat_penalty": ("X", "against repetition (1: off)"),
    "seed": ("N|random", "random: a new one for every answer"),
    "num_predict": ("N", "maximum tokens per answer (-1: no limit)"),
    "stop": ('"A" "B"', "texts that end an answer"),
    "verbose|quiet": ("", "all timings after an answer, or none"),
    "think|nothink": ("", "think before an answer, or not"),
    "thoughts": ("show|hide", "the model's thoughts"),
    "panel": ("on|off", "speed and expert map during answers"),
}
SHOWN = ("info", "parameters", "system", "template", "experts")
OTHER_NAMES = {"repetition_penalty": "repeat_penalty"}
# Settings of ollama that cannot be changed here -> what to do.
ELSEWHERE = {
    "num_ctx": "the context size is fixed while the model is loaded: start the chat with -c N",
    "num_thread": "the number of threads is fixed: start the chat with -t N",
    "num_gpu": "as many experts as fit are kept in memory: start the chat with --expert-slots N",
    "repeat_last_n": "repeat_penalty looks at the whole conversation: 1 turns it off",
    "format": "answers in a given format are not supported: ask for it in the message",
}
LEAVING, HELP_WORDS = ("/bye", "/exit", "/quit"), ("/?", "/help")


def _words() -> dict[str, tuple[str, ...]]:
    commands = [*LEAVING, *HELP_WORDS, *(usage.split()[0] for usage, _ in USAGE)]
    words = {"": tuple(dict.fromkeys(word[1:] for word in commands)), "show": SHOWN, "set": ()}
    for name, (values, _) in SETTINGS.items():
        words["set"] += tuple(name.split("|"))
        words[f"set {name}"] = tuple(word for word in values.split("|") if word.islower())
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
                chat.display.note("\n(press Ctrl-D or type /bye to quit)\n")


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
        chat.display.note(f"{one_line(error)}\n")
    return True


def obey(chat: Chat, line: str) -> bool:
    """Carry out a command line, and return False if it ends the chat. Raises `ChatError`."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name not in COMMANDS and f"/{name}" not in LEAVING:
        meant = f" (did you mean /show {name}?)" if name in SHOWN else did_you_mean(name, WORDS[""])
        raise ChatError(
            f'Unknown command /{name}{meant}: /? lists them, and """ around a text lets it start '
            "with /"
        )
    if rest and name not in TAKING:
        raise ChatError(f"/{name} takes nothing after it, not {rest!r}")
    if name not in COMMANDS:
        return False
    COMMANDS[name](chat, rest)
    return True


def _help(chat: Chat, _: str) -> None:
    chat.display.table((*USAGE, *KEYS))


def _clear(chat: Chat, _: str) -> None:
    chat.clear()
    chat.display.write("Conversation cleared.\n")


def _read(chat: Chat, rest: str) -> None:
    if not rest:
        raise ChatError("Usage: /read FILE")
    with contextlib.suppress(PermissionError):  # which `asked_text` tells
        if not user_path(rest).is_file():  # reading a device or a pipe might never end
            raise ChatError(f"there is no file {rest!r}")
    chat.say(asked_text(Path(rest), "message"))


def _copy(chat: Chat, rest: str) -> None:
    text = _excerpt(chat, rest, "/copy")
    if not isinstance(chat.display, Rendered):
        raise ChatError("there is no terminal that could copy: use /write FILE")
    chat.display.copy(text)
    chat.display.write(
        f"Copied {_lines(text)}, if this terminal lets programs do so (OSC 52); /write FILE "
        "always works\n"
    )


def _write(chat: Chat, rest: str) -> None:
    before, _, number = rest.rpartition(" ")
    name, number = (before, number) if before and number.isdecimal() else (rest, "")
    if not name:
        raise ChatError("Usage: /write FILE, or /write FILE N for code block N")
    text, file = _excerpt(chat, number, f"/write {name}"), user_path(name)
    if os.path.lexists(file):
        raise ChatError(f"{file} exists: choose another name")
    try:
        write_whole(file, f"{text}\n".encode())
    except OSError as error:
        raise ChatError(f"cannot write {file}: {error.strerror or error}") from None
    chat.display.write(f"Wrote {_lines(text)} to {file}\n")


def _excerpt(chat: Chat, number: str, command: str) -> str:
    """The last answer, or its code block `number`."""
    answers = [str(m["content"]) for m in chat.messages if m["role"] == "assistant"]
    if not answers:
        raise ChatError("There is no answer yet")
    if not number:
        return answers[-1]
    blocks = dict(enumerate(code_blocks(answers[-1]), 1))
    if not number.isdecimal() or int(number) not in blocks:
        have = f"{command} 1 to {command} {len(blocks)}" if len(blocks) > 1 else f"{command} 1"
        raise ChatError(f"Usage: {have}" if blocks else "The last answer has no code block")
    return blocks[int(number)]


def _lines(text: str) -> str:
    count = text.count("\n") + 1
    return f"{count} line{'s' * (count > 1)}"


def _save(chat: Chat, rest: str) -> None:
    replaces = is_saved(rest)
    if replaces and rest != chat.name:
        raise ChatError(
            f"{rest} is another saved conversation: choose another name, or /load {rest} first"
        )
    file = SavedChat(chat.system, chat.sampling, chat.messages, chat.settings).save(rest)
    chat.name = rest
    chat.display.write(f"Saved as {file}{', in place of its earlier state' * replaces}\n")


def _load(chat: Chat, rest: str) -> None:
    if not rest:
        rows = listing()
        if not rows:
            raise ChatError("No conversation is saved yet. Usage: /save NAME")
        chat.display.table(rows)
        return
    saved = SavedChat.load(rest)
    chat.clear()
    chat.messages, chat.sampling, chat.system = saved.messages, saved.sampling, saved.system
    chat.name = rest
    if saved.settings is not None:
        chat.settings = saved.settings
    chat.display.write(f"Loaded {len(saved.messages)} messages.\n")
    chat.show_last_turn()


def _set(chat: Chat, rest: str) -> None:
    name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
    name, value = OTHER_NAMES.get(name, name), value.strip()
    if name in ("", "parameter"):
        _list_settings(chat)
        return
    if name in ELSEWHERE:
        raise ChatError(f"{name}: {ELSEWHERE[name]}")
    chat.display.write(f"{_change(chat, name, value)}\n")


def _change(chat: Chat, name: str, value: str) -> str:
    """Change a setting, and return what to tell the user."""
    pair = {"verbose": "quiet", "quiet": "verbose", "think": "nothink", "nothink": "think"}
    if name in pair and value:
        raise ChatError(f"Use /set {name} or /set {pair[name]}")
    if name == "system":
        chat.system = value
        return "Set the system prompt." if value else "The system prompt is the model's default."
    if name in ("verbose", "quiet"):
        chat.verbose = chat.timings = name == "verbose"
        return f"{'All' if chat.verbose else 'No'} timings are shown after an answer."
    if name in ("think", "nothink"):
        if not chat.can_think:
            raise ChatError("this model's template has no switch for thinking")
        chat.think = name == "think"
        return f"Thinking is {'on' if chat.think else 'off'}."
    if name == "thoughts":
        chat.display.thoughts = _switch(name, value, "show", "hide")
    elif name == "panel":
        _set_panel(chat, _switch(name, value, "on", "off"))
    elif name == "num_predict":
        count = _number(name, value, int)
        if count < -1 or count == 0:
            raise ChatError(f"num_predict is {count}: it must be at least 1, or -1 for no limit")
        chat.max_new_tokens = count if count > 0 else None
    elif name == "stop":
        chat.stop_strings = _texts(value)
    elif name in SETTINGS:
        chat.sampling = _sampling(chat, name, value)
    else:
        names = "|".join(SETTINGS).replace("|", ", ")
        raise ChatError(
            f"Unknown setting {name!r}{did_you_mean(name, WORDS['set'])}. Settings: {names}"
        )
    return f"Set {name} to {_values(chat)[name]}."


def _sampling(chat: Chat, name: str, value: str) -> Any:
    names = {short: long for long, short in OTHER_NAMES.items()}
    field = names.get(name, name)
    drawn = name == "seed" and value == "random"
    given: dict[str, Any] = {field: None if drawn else _number(name, value, PARAMETERS[field])}
    return replace(chat.sampling, **given)


def _texts(value: str) -> tuple[str, ...]:
    """Texts in quotes, or one text without."""
    if not value.startswith(('"', "'")):
        return (value,) if value else ()
    try:
        return tuple(shlex.split(value))
    except ValueError:
        raise ChatError('a quotation mark is missing: /set stop "A" "B"') from None


def _set_panel(chat: Chat, on: bool) -> None:
    if on and not chat.display.live:
        raise ChatError("a panel needs a terminal that can be drawn on")
    panel = figures.Panel(chat.offload)
    chat.display.panel = (lambda: panel.draw(chat.last)) if on else None


def _switch(name: str, value: str, yes: str, no: str) -> bool:
    if value not in (yes, no):
        raise ChatError(f"Use /set {name} {yes} or /set {name} {no}")
    return value == yes


def _number(name: str, value: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (ValueError, OverflowError):
        allowed = "a number" if kind is float else "a whole number"
        allowed += " or random" if name == "seed" else ""
        raise ChatError(f"{name} must be {allowed}, not {value!r}") from None


def _show(chat: Chat, rest: str) -> None:
    if rest == "info":
        chat.display.write(figures.info(chat.offload, chat.model.config.model_type))
    elif rest == "parameters":
        values = _values(chat)
        skipped = ("system", "verbose|quiet", "panel")
        chat.display.table([(name, text) for name, text in values.items() if name not in skipped])
    elif rest == "system":
        chat.display.write((chat.system or "(not set: model default)") + "\n")
    elif rest == "template":
        chat.display.write(f"{chat.tokenizer.chat_template}\n")
    elif rest == "experts":
        chat.display.write(figures.expert_map(chat.offload))
    else:
        raise ChatError(f"Usage: /show {'|'.join(SHOWN)}")


def _list_settings(chat: Chat) -> None:
    values = _values(chat)
    chat.display.table(
        [(f"/set {name} {usage}", values[name], what) for name, (usage, what) in SETTINGS.items()]
    )


def _values(chat: Chat) -> dict[str, str]:
    """The value of each of `SETTINGS`, as text."""
    settings = chat.settings
    values = {OTHER_NAMES.get(name, name): getattr(chat.sampling, name) for name in PARAMETERS}
    if chat.sampling.seed is None:
        values["seed"] = "random"
    values["system"] = "set" if chat.system else "not set"
    values["num_predict"] = settings.num_predict or -1
    values["stop"] = ", ".join(map(repr, settings.stop)) or "none"
    values["verbose|quiet"] = "verbose" if chat.verbose else "speed" if chat.timings else "quiet"
    values["think|nothink"] = {None: "model default", True: "on", False: "off"}[settings.think]
    values["thoughts"] = "show" if settings.thoughts else "hide"
    values["panel"] = "on" if chat.display.panel else "off"
    texts = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return {name: texts[name] for name in SETTINGS}


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "?": _help,
    "help": _help,
    "clear": _clear,
    "copy": _copy,
    "load": _load,
    "read": _read,
    "regen": lambda chat, _: chat.answer_again(),
    "save": _save,
    "set": _set,
    "show": _show,
    "stats": lambda chat, _: chat.display.write(figures.statistics(chat.offload)),
    "write": _write,
}
TAKING = [usage[1:].split()[0] for usage, _ in USAGE if " " in usage]  # take words after them
