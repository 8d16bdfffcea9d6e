"""`offload chat`: a conversation.

Knows: its flags; what is said before it begins. Does not know: conversations (`offload.chat`).
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from offload.quant.errors import OffloadError

from cli.commands import Commands
from cli.exit_codes import DONE, INTERRUPTED
from cli.flags import add_model_flags, add_sampling_flags
from cli.model import asked_prompt, asked_sampling, load_model


def add(commands: Commands) -> None:
    """The command and its flags."""
    chat = commands.add("chat", run, "talk to a model", "offload chat demo --expert-slots 25%")
    add_model_flags(chat)
    add_sampling_flags(chat)
    chat.add_argument(
        "-st", "--single-turn", action="store_true", help="answer once (-p) and leave"
    )
    chat.add_argument(
        "--hide-thoughts", action="store_true", help="show only what follows a model's thoughts"
    )


def run(arguments: argparse.Namespace) -> int:
    prompt = asked_prompt(arguments)
    if arguments.single_turn and prompt is None:
        raise OffloadError("--single-turn needs a prompt: give one with -p or -f")
    model, tokenizer, load_seconds = load_model(arguments)
    from offload.chat.chat import Chat
    from offload.chat.loop import converse
    from offload.chat.terminal import display, reader
    from offload.engine.handle import offload_of

    if tokenizer is None or not tokenizer.chat_template:
        raise OffloadError(f"{arguments.model} has no chat template: use offload generate --raw")

    chat = Chat(
        model,
        tokenizer,
        asked_sampling(arguments, model),
        display(),
        system=arguments.system_prompt,
        max_new_tokens=None if arguments.n_predict < 0 else arguments.n_predict,
        stop_strings=tuple(arguments.reverse_prompt),
        timings=arguments.show_timings,
        verbose=arguments.verbose,
        load_seconds=load_seconds,
        debug=arguments.debug,
    )
    stats = offload_of(model).stats()
    print(
        f"{stats.slots} slots for {stats.total_experts} experts; /? lists the commands, /bye "
        f"leaves",
        file=sys.stderr,
    )
    chat.display.thoughts = not arguments.hide_thoughts
    with contextlib.closing(offload_of(model)):
        if prompt is None or not arguments.single_turn:
            converse(chat, reader(), prompt)
            return DONE
        chat.say(prompt)
    return INTERRUPTED if chat.stopped else DONE
