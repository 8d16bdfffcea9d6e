"""The words of a chat's commands, once for its help and for its completion.

Knows: how each command is written, and what it is for in a line. Does not know: what commands do
(`offload.chat_commands`).
"""

from __future__ import annotations

from offload.sampling import PARAMETERS

# Words in capitals stand for what a user puts there; words joined by | are to choose from.
USAGE = (
    ("/set system TEXT", "set the system prompt"),
    ("/set NAME VALUE", "set a sampling parameter (/show parameters)"),
    ("/set seed random", "draw anew for each answer again"),
    ("/set num_predict COUNT", "tokens an answer has at most; -1: as many as fit"),
    ("/set verbose|quiet", "show all timings after an answer, or none"),
    ("/set think|nothink", "ask the model to think first, or not to (models that know how)"),
    ("/set thoughts show|hide", "what a model thinks before it answers"),
    ("/set panel on|off", "speed, hits and experts below an answer while it comes"),
    ("/show info|parameters|system|experts", "what is running, and how"),
    ("/stats", "the experts' figures so far"),
    ("/save NAME", "keep this conversation, its system prompt and all that is set"),
    ("/load NAME", "go back to a conversation that was saved"),
    ("/read FILE", "send a file's text as a message"),
    ("/regen", "answer the last message again"),
    ("/clear", "forget the conversation"),
    ("/?", "these lines (also /help)"),
    ("/bye", "leave (also Ctrl-D)"),
)
KEYS = (
    ('"""', "begins and ends a message of several lines, or one that begins with /"),
    ("Ctrl-C", "stops an answer"),
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


WORDS = _words()  # what may follow the words so far, "" being the slash
