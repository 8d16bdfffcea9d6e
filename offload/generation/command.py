"""`offload generate`: an answer on stdout, or a file of answers to a file of prompts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import DONE
from offload.files import asked_text, read_text
from offload.flags import add_model, add_options, option, options_from
from offload.lines import printable
from offload.options import FALLBACK, AnswerOptions, LoadOptions, SharedOptions
from offload.pack.asked import begin_loading
from offload.quant.errors import OffloadError
from offload.units import MOST, between, positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.generation.answers import AnswersFile
    from offload.generation.prompt import Prompt
    from offload.sampling import Sampling

EXAMPLE = 'offload generate demo -p "Hi" > a.txt'
_several = partial(option, group="several answers")


@dataclass(frozen=True, kw_only=True)
class AnswerFileOptions:
    """Options of `offload generate` alone."""

    raw: bool = option(
        "--raw", "give the prompt as it is, without the chat template", default=False
    )
    output: Path | None = _several(
        "-o --output FILE",
        "answer every line of -f FILE and write the answers to this file. Each line is JSON: a "
        "text, or an object with a prompt or messages. If the command is stopped, running it again "
        "continues; it compares the prompts with those already answered, but not the other options",
    )
    parallel: int = _several(
        "-np --parallel N", "how many prompts of -o are answered at once", default=8, parse=positive
    )
    vote: int | None = _several(
        "--vote N",
        "sample N answers and print one whose result is the most frequent; the result of an answer "
        "is what it puts in \\boxed{}, what follows 'answer is', or its last line",
        parse=between(2, 1024),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    for kind in (LoadOptions, AnswerOptions, AnswerFileOptions):
        add_options(parser, kind)
    add_options(parser, SharedOptions, ["threads", "timeline"])


def asked_prompt(asked: AnswerOptions) -> str | None:
    """The prompt of -p or -f, or None if neither is given. Raises `OffloadError`."""
    if asked.prompt is not None or asked.file is None:
        return asked.prompt
    return asked_text(asked.file, "prompt")


def asked_sampling(asked: AnswerOptions, model: PreTrainedModel | None) -> Sampling:
    """Sampling parameters from the flags, otherwise from the files of `model`, otherwise defaults.

    `model` is None before it is loaded. Raises `OffloadError` for a value that cannot be used.
    """
    from offload.sampling import PARAMETERS, Sampling, resolve_sampling

    if asked.n_predict == 0:
        raise OffloadError(
            "--n-predict is 0: give at least 1, or -1 for as many as the context holds"
        )
    given: dict[str, Any] = {name: getattr(asked, name) for name in PARAMETERS}
    config = None if model is None else model.generation_config
    fallback: dict[str, Any] = FALLBACK
    return resolve_sampling(config, **given, fallback=Sampling(**fallback))


def run(arguments: argparse.Namespace) -> int:
    """Answer one prompt or a file of prompts, and return the exit code."""
    job = _Job(arguments)
    return job.answer_file() if job.own.output is not None else job.answer()


class _Job:
    """One run of the command, with its options."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model_name: str = arguments.model
        self.load = options_from(arguments, LoadOptions)
        self.shared = options_from(arguments, SharedOptions)
        self.asked = options_from(arguments, AnswerOptions)
        self.own = options_from(arguments, AnswerFileOptions)

    def answer(self) -> int:
        """Print the answer to one prompt, or with --vote the most frequent of several answers."""
        prompt = asked_prompt(self.asked)
        if prompt is None and not sys.stdin.isatty():
            prompt = read_text(sys.stdin, "the piped prompt")
        if not prompt:
            raise OffloadError("there is no prompt: give one with -p, -f or a pipe")
        if self.own.vote is not None and self.asked.temperature == 0:
            raise OffloadError(
                "--vote needs answers that differ: give a --temp above 0, or leave --temp out"
            )
        with self.loaded() as (model, tokenizer, load_seconds):
            from offload.generation.stream import stream_generate, timings, verbose_rows

            full = self.full_prompt(tokenizer, {"prompt": prompt})
            if self.own.vote is not None:
                return self.vote(model, tokenizer, full, self.own.vote)
            shown = printable if sys.stdout.isatty() else str  # text for a file is not changed
            sampling = asked_sampling(self.asked, model)
            step = None
            for step in stream_generate(
                model,
                tokenizer,
                full,
                max_new_tokens=self.most_tokens,
                stop_strings=self.asked.reverse_prompt,
                **vars(sampling),
            ):
                print(shown(step.text), end="", flush=True)
        print(flush=True)
        assert step is not None
        if self.asked.verbose:
            print(verbose_rows(step, load_seconds), file=sys.stderr)
        if self.asked.show_timings:
            print(f"\n{timings(step)}\n{step.experts.line()}", file=sys.stderr)
        return DONE

    @contextlib.contextmanager
    def loaded(self) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase | None, float]]:
        """The model, its tokenizer, and the seconds that loading took; the model is closed after.

        What happens meanwhile is recorded for --timeline.
        """
        asked_sampling(self.asked, None)  # fails on a wrong value before the model is loaded
        begin_loading(self.model_name, self.load)
        from offload.engine.handle import offload_of
        from offload.loading import load_and_tell
        from offload.trace.timeline import record_timeline

        model, tokenizer, seconds = load_and_tell(self.model_name, self.load, self.shared.threads)
        with contextlib.closing(offload_of(model)), record_timeline(model, self.shared.timeline):
            yield model, tokenizer, seconds

    @property
    def most_tokens(self) -> int:
        return MOST if self.asked.n_predict < 0 else self.asked.n_predict

    def full_prompt(
        self, tokenizer: PreTrainedTokenizerBase | None, given: dict[str, Any]
    ) -> Prompt:
        """Messages for the chat template, or the text if there is no template or with --raw."""
        from offload.generation.answers import messages_of

        if tokenizer is not None and tokenizer.chat_template and not self.own.raw:
            return messages_of(given, self.asked.system_prompt)
        if "messages" in given:
            raise OffloadError(
                f"{self.model_name} has no chat template: give a prompt in place of messages"
            )
        return str(given["prompt"])

    def options(self, model: PreTrainedModel) -> dict[str, Any]:
        """The options of `complete` that hold for every batch."""
        return {
            "sampling": asked_sampling(self.asked, model),
            "max_new_tokens": self.most_tokens,
            "stop_strings": self.asked.reverse_prompt,
        }

    def vote(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Prompt,
        samples: int,
    ) -> int:
        from offload.generation.batch import complete, vote

        if tokenizer is None:
            raise OffloadError("the model has no tokenizer: there are no texts to vote on")
        options = self.options(model)
        (answers,) = complete(model, tokenizer, [prompt], num_return_sequences=samples, **options)
        texts = [answer.text for answer in answers]
        winner, tally = vote(texts)
        print(printable(texts[winner]) if sys.stdout.isatty() else texts[winner])
        for final, count in tally:
            print(f"{count:>4} of {len(texts)}: {printable(final)[:80]}", file=sys.stderr)
        return DONE

    def answer_file(self) -> int:
        """Answer every prompt of the file -f that has no answer in the file -o yet."""
        from offload.generation.answers import AnswersFile, read_prompt_lines

        asked, output = self.asked, self.own.output
        assert output is not None
        if asked.file is None or asked.prompt is not None or self.own.vote is not None:
            raise OffloadError("-o answers the prompts of -f FILE: give -f, without -p and --vote")
        prompts = read_prompt_lines(asked.file)
        with contextlib.closing(AnswersFile(output)) as file:
            done = file.done(prompts)
            if done:
                print(f"{done} of {len(prompts)} prompts are already answered", file=sys.stderr)
            if done < len(prompts):
                self.answer_rest(prompts, done, file)
        print(f"{len(prompts)} answers in {output}", file=sys.stderr)
        return DONE

    def answer_rest(self, prompts: list[dict[str, Any]], done: int, file: AnswersFile) -> None:
        with self.loaded() as (model, tokenizer, _):
            from offload.generation.batch import complete
            from offload.generation.prompt import check_length, encode_prompt

            if tokenizer is None:
                raise OffloadError("the model has no tokenizer, so that it cannot read prompts")
            options = self.options(model)
            for begin in range(done, len(prompts), self.own.parallel):
                batch = prompts[begin : begin + self.own.parallel]
                ids = []
                for number, given in enumerate(batch, start=begin + 1):
                    try:
                        ids.append(encode_prompt(tokenizer, self.full_prompt(tokenizer, given)))
                        check_length(model, ids[-1])
                    except OffloadError as error:
                        where = f"{self.asked.file}, prompt {number}"
                        raise OffloadError(f"{where}: {error}") from None
                made = complete(model, tokenizer, ids, **options)
                for given, (answer,) in zip(batch, made, strict=True):
                    file.append(
                        given,
                        {
                            "answer": answer.text,
                            "finish_reason": answer.finish_reason,
                            "prompt_tokens": len(answer.request.ids),
                            "generated_tokens": len(answer.tokens),
                        },
                    )
                print(f"{begin + len(batch)} of {len(prompts)} answered", file=sys.stderr)
