"""`offload chat`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.errors import DONE, INTERRUPTED
from offload.flags import add_model, add_options, option, options_from
from offload.generation.command import asked_prompt, asked_sampling
from offload.options import AnswerOptions, LoadOptions
from offload.pack.asked import begin_loading, check_asked, say_loading
from offload.quant.errors import OffloadError

if TYPE_CHECKING:
    from offload.chat.chat import Chat
    from offload.chat.display import Display

EXAMPLE = "offload chat demo --expert-slots 25%"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `offload chat` alone."""

    single_turn: bool = option(
        "-st --single-turn", "answer one prompt (-p or -f) and exit", default=False
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    for kind in (LoadOptions, AnswerOptions, ChatOptions):
        add_options(parser, kind)


def run(arguments: argparse.Namespace) -> int:
    """Talk until the user leaves, or answer one prompt with --single-turn."""
    asked, mode = options_from(arguments, AnswerOptions), options_from(arguments, ChatOptions)
    prompt = asked_prompt(asked, piped=mode.single_turn)
    if mode.single_turn and not prompt:
        raise OffloadError("--single-turn needs a prompt: give one with -p, -f or a pipe")
    asked_sampling(asked, None)  # raises for a wrong value before the model is loaded
    options = options_from(arguments, LoadOptions)
    check_asked(arguments.model, options)
    say_loading(arguments.model)
    from offload.chat.commands import converse
    from offload.chat.keyboard import is_interactive, silent
    from offload.chat.opening import Opening
    from offload.chat.terminal import display, reader

    shown = display(single_turn=mode.single_turn)
    shown.thoughts = not asked.hide_thoughts
    with silent(shown.moved), contextlib.ExitStack() as stack:
        read = Opening(shown, prompt) if shown.live and is_interactive() else reader()
        with read if isinstance(read, Opening) else contextlib.nullcontext():
            chat = _loaded(arguments, options, asked, shown)
        if isinstance(read, Opening) and read.left:
            return DONE
        stack.enter_context(contextlib.closing(chat.offload))
        if prompt is None or not mode.single_turn:
            converse(chat, read, prompt)
            return DONE
        chat.say(prompt)
    return INTERRUPTED if chat.stopped else DONE


def _loaded(
    arguments: argparse.Namespace, options: LoadOptions, asked: AnswerOptions, shown: Display
) -> Chat:
    """A chat with the model, and a line about it on stderr. Raises `OffloadError`."""
    begin_loading(arguments.model, options, said=True, chats=True)
    from offload.chat.chat import Chat
    from offload.generation.prompt import check_switch
    from offload.loading import load_and_tell

    model, tokenizer, load_seconds = load_and_tell(arguments.model, options, note=True)
    if tokenizer is None or not tokenizer.chat_template:
        raise OffloadError(f"{arguments.model} has no chat template: use offload generate --raw")
    check_switch(tokenizer, arguments.model, asked.think)
    chat = Chat(
        model,
        tokenizer,
        asked_sampling(asked, model),
        shown,
        system=asked.system_prompt,
        max_new_tokens=None if asked.n_predict < 0 else asked.n_predict,
        stop_strings=asked.reverse_prompt,
        timings=asked.show_timings,
        verbose=asked.verbose,
        load_seconds=load_seconds,
        debug=arguments.debug,
        think=asked.think,
        template_arguments=asked.template_arguments,
    )
    stats = chat.offload.stats()
    hint = "" if options_from(arguments, ChatOptions).single_turn else ". /? for help, /bye to quit"
    share = f"{stats.slots / stats.total_experts:.0%}"
    print(f"{stats.residency()} ({share}){hint}", file=sys.stderr)
    return chat
