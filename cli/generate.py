"""`offload generate`: one answer on stdout.

Knows: where the prompt comes from, what goes to which stream. Does not know: how tokens are made.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_model_flags, add_sampling_flags, add_timeline
from cli.model import asked_prompt, asked_sampling, load_model
from offload.errors import OffloadError
from offload.files import read_text


def add(commands: Commands) -> None:
    """The command and its flags."""
    generate = commands.add(
        "generate",
        run,
        "answer one prompt on stdout",
        'offload generate demo -p "Hi" > a.txt',
    )
    add_model_flags(generate)
    add_sampling_flags(generate)
    generate.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, no chat template"
    )
    add_timeline(generate)


def run(arguments: argparse.Namespace) -> int:
    prompt = asked_prompt(arguments)
    if prompt is None and not sys.stdin.isatty():
        prompt = read_text(sys.stdin, "the piped prompt")
    if not prompt:
        raise OffloadError("there is no prompt: give one with -p, -f or a pipe")
    model, tokenizer, load_seconds = load_model(arguments)
    from offload.generation import Prompt, stream_generate
    from offload.handle import offload_of
    from offload.report import timings, verbose_rows
    from offload.timeline import recording

    full: Prompt = prompt
    if tokenizer is not None and tokenizer.chat_template and not arguments.raw:
        system = (
            [{"role": "system", "content": arguments.system_prompt}]
            if arguments.system_prompt
            else []
        )
        full = [*system, {"role": "user", "content": prompt}]
    sampling = asked_sampling(arguments, model)
    step = None
    with contextlib.closing(offload_of(model)), recording(model, arguments.timeline):
        for step in stream_generate(
            model,
            tokenizer,
            full,
            max_new_tokens=arguments.ctx_size if arguments.n_predict < 0 else arguments.n_predict,
            stop_strings=arguments.reverse_prompt,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
        ):
            print(step.text, end="", flush=True)
    print(flush=True)
    assert step is not None
    if arguments.verbose:
        print(verbose_rows(step, load_seconds), file=sys.stderr)
    if arguments.show_timings:
        print(f"\n{timings(step)}\n{step.experts.line()}", file=sys.stderr)
    return DONE
