"""`offload chat`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass

from offload.errors import DONE, INTERRUPTED
from offload.flags import add_model, add_options, option, options_from
from offload.generation.command import asked_prompt, asked_sampling
from offload.options import AnswerOptions, LoadOptions, SharedOptions
from offload.pack.asked import begin_loading
from offload.quant.errors import OffloadError

EXAMPLE = "offload chat demo --expert-slots 25%"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `offload chat` alone."""

    single_turn: bool = option(
        "-st --single-turn", "answer one prompt (-p or -f) and exit", default=False
    )
    hide_thoughts: bool = option(
        "--hide-thoughts", "show only the answer that follows a model's thoughts", default=False
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    for kind in (LoadOptions, AnswerOptions, ChatOptions):
        add_options(parser, kind)
    add_options(parser, SharedOptions, ["threads"])


def run(arguments: argparse.Namespace) -> int:
    """Talk until the user leaves, or answer one prompt with --single-turn."""
    asked, mode = options_from(arguments, AnswerOptions), options_from(arguments, ChatOptions)
    prompt = asked_prompt(asked)
    if mode.single_turn and prompt is None:
        raise OffloadError("--single-turn needs a prompt: give one with -p or -f")
    asked_sampling(asked, None)  # raises for a wrong value before the model is loaded
    options = options_from(arguments, LoadOptions)
    begin_loading(arguments.model, options, chats=True)
    from offload.chat.chat import Chat
    from offload.chat.commands import converse
    from offload.chat.terminal import display, reader
    from offload.engine.handle import offload_of
    from offload.loading import load_and_tell

    threads = options_from(arguments, SharedOptions).threads
    model, tokenizer, load_seconds = load_and_tell(arguments.model, options, threads)
    if tokenizer is None or not tokenizer.chat_template:
        raise OffloadError(f"{arguments.model} has no chat template: use offload generate --raw")

    chat = Chat(
        model,
        tokenizer,
        asked_sampling(asked, model),
        display(),
        system=asked.system_prompt,
        max_new_tokens=None if asked.n_predict < 0 else asked.n_predict,
        stop_strings=asked.reverse_prompt,
        timings=asked.show_timings,
        verbose=asked.verbose,
        load_seconds=load_seconds,
        debug=arguments.debug,
    )
    stats = offload_of(model).stats()
    print(
        f"{stats.slots} slots for {stats.total_experts} experts; /? lists the commands, /bye exits",
        file=sys.stderr,
    )
    chat.display.thoughts = not mode.hide_thoughts
    with contextlib.closing(offload_of(model)):
        if prompt is None or not mode.single_turn:
            converse(chat, reader(), prompt)
            return DONE
        chat.say(prompt)
    return INTERRUPTED if chat.stopped else DONE
