"""`offload generate`: an answer on stdout, or a file of answers to a file of prompts.

Knows: where prompts come from, what goes to which stream. Does not know: how tokens are made.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.quant.errors import OffloadError

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_model_flags, add_sampling_flags, add_timeline
from cli.model import asked_prompt, asked_sampling, load_model
from cli.values import between, positive
from offload.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.generation.answers import AnswersFile
    from offload.generation.prompt import Prompt

MOST_VOTES = 1024


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
    several = generate.add_argument_group("several answers")
    several.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="answer each line of -f FILE, which is JSON: a text, or an object with a prompt or "
        "messages; the same command goes on where it was stopped (the prompts are compared, the "
        "other flags are not)",
    )
    several.add_argument(
        "-np",
        "--parallel",
        type=positive,
        default=8,
        metavar="N",
        help="prompts in one batch (8)",
    )
    several.add_argument(
        "--vote",
        type=votes,
        metavar="N",
        help="the answer that most of N samples come to: what is boxed, follows 'answer is', or "
        "is their last line",
    )
    add_timeline(generate)


def votes(text: str) -> int:
    return between(text, 2, MOST_VOTES)


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        return _answer_file(arguments)
    prompt = asked_prompt(arguments)
    if prompt is None and not sys.stdin.isatty():
        prompt = read_text(sys.stdin, "the piped prompt")
    if not prompt:
        raise OffloadError("there is no prompt: give one with -p, -f or a pipe")
    if arguments.vote is not None and arguments.temp == 0:
        raise OffloadError("--vote needs samples that differ: give a --temp above 0, or none")
    model, tokenizer, load_seconds = load_model(arguments)
    from offload.chat.report import timings, verbose_rows
    from offload.engine.handle import offload_of
    from offload.generation.stream import stream_generate
    from offload.lines import printable
    from offload.trace.timeline import recording

    full = _full(arguments, tokenizer, {"prompt": prompt})
    if arguments.vote is not None:
        return _vote(arguments, model, tokenizer, full)
    shown = printable if sys.stdout.isatty() else str  # a file gets the text as it is
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
            print(shown(step.text), end="", flush=True)
    print(flush=True)
    assert step is not None
    if arguments.verbose:
        print(verbose_rows(step, load_seconds), file=sys.stderr)
    if arguments.show_timings:
        print(f"\n{timings(step)}\n{step.experts.line()}", file=sys.stderr)
    return DONE


def _full(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase | None,
    given: dict[str, Any],
) -> Prompt:
    """The text itself, or messages for the model's template."""
    from offload.generation.answers import messages_of

    if tokenizer is not None and tokenizer.chat_template and not arguments.raw:
        return messages_of(given, arguments.system_prompt)
    if "messages" in given:
        raise OffloadError(f"{arguments.model} has no chat template: give prompts, not messages")
    return str(given["prompt"])


def _options(arguments: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "sampling": asked_sampling(arguments, model),
        "max_new_tokens": arguments.ctx_size if arguments.n_predict < 0 else arguments.n_predict,
        "stop_strings": arguments.reverse_prompt,
    }


def _vote(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
) -> int:
    from offload.engine.handle import offload_of
    from offload.generation.batch import complete, vote
    from offload.lines import printable
    from offload.trace.timeline import recording

    with contextlib.closing(offload_of(model)), recording(model, arguments.timeline):
        if tokenizer is None:
            raise OffloadError("the model has no tokenizer: there are no texts to vote on")
        options = _options(arguments, model)
        made = complete(model, tokenizer, [prompt], num_return_sequences=arguments.vote, **options)
    texts = [answer.text for answer in made[0]]
    winner, tally = vote(texts)
    print(printable(texts[winner]) if sys.stdout.isatty() else texts[winner])
    for final, count in tally:
        print(f"{count:>4} of {len(texts)}: {printable(final)[:80]}", file=sys.stderr)
    return DONE


def _answer_file(arguments: argparse.Namespace) -> int:
    from offload.generation.answers import AnswersFile, read_prompt_lines

    if arguments.file is None or arguments.prompt is not None or arguments.vote is not None:
        raise OffloadError("-o answers the prompts of -f FILE: give that, no -p and no --vote")
    prompts = read_prompt_lines(arguments.file)
    with contextlib.closing(AnswersFile(arguments.output)) as file:
        done = file.done(prompts)
        if done:
            print(f"{done} of {len(prompts)} prompts are answered already", file=sys.stderr)
        if done < len(prompts):
            _answer_rest(arguments, prompts, done, file)
    print(f"{len(prompts)} answers in {arguments.output}", file=sys.stderr)
    return DONE


def _answer_rest(
    arguments: argparse.Namespace, prompts: list[dict[str, Any]], done: int, file: AnswersFile
) -> None:
    model, tokenizer, _ = load_model(arguments)
    from offload.engine.handle import offload_of
    from offload.generation.batch import complete
    from offload.generation.prompt import check_length, encode_prompt
    from offload.trace.timeline import recording

    with contextlib.closing(offload_of(model)), recording(model, arguments.timeline):
        if tokenizer is None:
            raise OffloadError("the model has no tokenizer: there are no texts to answer")
        options = _options(arguments, model)
        for begin in range(done, len(prompts), arguments.parallel):
            batch = prompts[begin : begin + arguments.parallel]
            ids = []
            for number, given in enumerate(batch, start=begin + 1):
                try:
                    ids.append(encode_prompt(tokenizer, _full(arguments, tokenizer, given)))
                    check_length(model, ids[-1])
                except OffloadError as error:
                    raise OffloadError(f"{arguments.file}, prompt {number}: {error}") from None
            made = complete(model, tokenizer, ids, **options)
            for given, (answer,) in zip(batch, made, strict=True):
                file.append(
                    given,
                    {
                        "answer": answer.text,
                        "finish_reason": answer.finish_reason,
                        "prompt_tokens": answer.prompt_tokens,
                        "generated_tokens": len(answer.tokens),
                    },
                )
            print(f"{begin + len(batch)} of {len(prompts)} answered", file=sys.stderr)
