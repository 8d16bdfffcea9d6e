"""`offload generate`: an answer on stdout, or a file of answers to a file of prompts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import DONE
from offload.files import TIMELINE, asked_text, check_output, has_piped, piped_text
from offload.flags import add_model, add_options, option, options_from
from offload.lines import Speaker, printable
from offload.options import FALLBACK, AnswerOptions, LoadOptions, SharedOptions
from offload.pack.asked import begin_loading
from offload.quant.errors import OffloadError
from offload.units import MOST, between, positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.generation.answers import AnswersFile, AnswersOut
    from offload.generation.text import Answer
    from offload.generation.thinking import Voices
    from offload.sampling import Sampling

EXAMPLE = 'offload generate demo -p "Hi" > a.txt'
LINES = (".jsonl", ".ndjson")  # endings of files with a prompt in each line
PARALLEL = 8
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
        "text, or an object with a prompt or with messages, tools and chat_template_kwargs as in "
        "OpenAI's interface. If the command is stopped, running it again continues; it compares "
        "the prompts with those already answered, but not the other options",
        unset="stdout if FILE ends in .jsonl",
    )
    parallel: int | None = _several(
        "-np --parallel N",
        "how many prompts of a file are answered at once",
        unset=str(PARALLEL),
        parse=positive,
    )
    vote: int | None = _several(
        "--vote N",
        "sample N answers and print one whose result is the most frequent; the result of an answer "
        "is what it puts in \\boxed{}, what follows 'answer is', or its last line; an answer that "
        "-n cuts has no vote",
        parse=between(2, 1024),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    for kind in (LoadOptions, AnswerOptions, AnswerFileOptions):
        add_options(parser, kind)
    add_options(parser, SharedOptions, ["timeline"])


def asked_prompt(asked: AnswerOptions, *, piped: bool = False) -> str | None:
    """The prompt of -p and -f, or None if neither is given. Raises `OffloadError`.

    With `piped`, what is piped in counts too. As with ollama, a text comes first, then a blank line
    and the words of -p.
    """
    texts = [] if asked.file is None else [asked_text(asked.file, "prompt")]
    alone = asked.file is None and asked.prompt is None
    if piped and (has_piped() or (alone and not sys.stdin.isatty())):
        texts.insert(0, piped_text("prompt"))
    if asked.prompt is not None:
        texts.append(asked.prompt)
    if not texts:
        return None
    *before, last = [text for text in texts if text.strip()] or texts[:1]
    return "\n\n".join([*(text.rstrip("\n") for text in before), last])


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
    file = job.asked.file
    lines = file is not None and file.suffix.lower() in LINES
    return job.answer_file() if lines or job.own.output is not None else job.answer()


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
        if self.own.parallel is not None:
            raise OffloadError(
                "-np answers a file of prompts: give -f FILE.jsonl, or leave -np out"
            )
        prompt = asked_prompt(self.asked, piped=True)
        if not prompt:
            raise OffloadError("there is no prompt: give one with -p, -f or a pipe")
        if self.own.vote is not None and self.asked.temperature == 0:
            raise OffloadError(
                "--vote needs answers that differ: give a --temp above 0, or leave --temp out"
            )
        with self.loaded() as (model, tokenizer, load_seconds):
            from offload.generation.stream import (
                stopped_at,
                stream_generate,
                timings,
                verbose_rows,
            )

            encoder = _Encoder(self, tokenizer)
            ids = encoder({"prompt": prompt})
            if self.own.vote is not None:
                return self.vote(model, encoder, ids, self.own.vote)
            voices, step, speaker = encoder.voices(ids), None, self.speaker()
            for step in stream_generate(
                model,
                tokenizer,
                ids,
                max_new_tokens=self.most_tokens,
                stop_strings=self.asked.reverse_prompt,
                skip_special_tokens=encoder.skips,
                **vars(asked_sampling(self.asked, model)),
            ):
                for piece in voices.push(step.text):
                    speaker.show(piece)
            for piece in voices.finish():
                speaker.show(piece)
            speaker.finish()
        assert step is not None
        if cut := stopped_at(step):
            print(cut, file=sys.stderr)
        if self.asked.verbose:
            print(verbose_rows(step, load_seconds), file=sys.stderr)
        if self.asked.show_timings:
            print(f"\n{timings(step)}\n{step.experts.line()}", file=sys.stderr)
        return DONE

    def speaker(self) -> Speaker:
        """Prints the answer to stdout, and the thoughts before it to stderr."""
        write = partial(print, end="", flush=True)
        made = Speaker(
            write,
            lambda text: write(printable(text), file=sys.stderr),
            safe=sys.stdout.isatty(),  # text for a file is not changed
        )
        made.thoughts = not self.asked.hide_thoughts
        return made

    @contextlib.contextmanager
    def loaded(self) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase | None, float]]:
        """The model, its tokenizer, and the seconds that loading took; the model is closed after.

        What happens meanwhile is recorded for --timeline. Wrong values and files are errors before
        the model is loaded.
        """
        asked_sampling(self.asked, None)
        check_output(self.shared.timeline, TIMELINE)
        if self.own.raw and (flags := self.template_flags):
            raise OffloadError(f"--raw leaves out the chat template: leave {flags[0]} out, too")
        begin_loading(self.model_name, self.load)
        from offload.engine.handle import offload_of
        from offload.loading import load_and_tell
        from offload.trace.timeline import record_timeline

        model, tokenizer, seconds = load_and_tell(self.model_name, self.load)
        with contextlib.closing(offload_of(model)), record_timeline(model, self.shared.timeline):
            yield model, tokenizer, seconds

    @property
    def most_tokens(self) -> int:
        return MOST if self.asked.n_predict < 0 else self.asked.n_predict

    @property
    def template_flags(self) -> list[str]:
        """The flags given that need a chat template."""
        given = {
            "-sys": bool(self.asked.system_prompt),
            "--think": self.asked.think is not None,
            "--chat-template-kwargs": self.asked.template_arguments is not None,
        }
        return [flag for flag, is_given in given.items() if is_given]

    def complete(
        self, model: PreTrainedModel, encoder: _Encoder, prompts: list[list[int]], **more: Any
    ) -> list[list[Answer]]:
        """The answers to the ids of each prompt, made as one batch."""
        from offload.generation.batch import complete

        return complete(
            model,
            encoder.tokenizer,
            prompts,
            asked_sampling(self.asked, model),
            max_new_tokens=self.most_tokens,
            stop_strings=self.asked.reverse_prompt,
            skip_special_tokens=encoder.skips,
            **more,
        )

    def vote(
        self, model: PreTrainedModel, encoder: _Encoder, prompt: list[int], samples: int
    ) -> int:
        from offload.generation.batch import vote
        from offload.progress import Ticker

        with Ticker("vote") as ticker:

            def tell(answers: Sequence[Answer]) -> None:
                over = sum(answer.finish_reason is not None for answer in answers)
                tokens = sum(len(answer.tokens) for answer in answers)
                ticker.show(f"{over} of {samples} answers finished, {tokens} tokens")

            (answers,) = self.complete(
                model, encoder, [prompt], num_return_sequences=samples, watch=tell
            )
        texts = [encoder.apart(each)[1] for each in answers if each.finish_reason == "stop"]
        if not texts:
            longest = max(len(answer.tokens) for answer in answers)
            raise OffloadError(f"none of {samples} answers ended within {longest} tokens: raise -n")
        winner, tally = vote(texts)
        print(printable(texts[winner]) if sys.stdout.isatty() else texts[winner])
        for final, count in tally:
            print(f"{count:>4} of {samples}: {printable(final)[:80]}", file=sys.stderr)
        if cut := samples - len(texts):
            print(f"{cut:>4} of {samples}: cut by -n, without a vote", file=sys.stderr)
        most = tally[0][1]
        if (ties := sum(count == most for _, count in tally)) > 1:
            print(
                f"no agreement: {ties} different answers have {most} of {samples} votes each; the "
                "first of them is shown",
                file=sys.stderr,
            )
        return DONE

    def answer_file(self) -> int:
        """Answer every prompt of the file -f that has no answer in the file -o yet.

        Without -o, all answers go to stdout.
        """
        from offload.generation.answers import (
            AnswersFile,
            AnswersOut,
            not_followed,
            read_prompt_lines,
        )

        asked, output = self.asked, self.own.output
        if asked.file is None or asked.prompt is not None or self.own.vote is not None:
            what = "-o" if output is not None else f"{asked.file}"
            raise OffloadError(
                f"{what} answers the prompts of -f FILE, and cannot be combined with -p or --vote: "
                "give -f alone, or keep one answer with > FILE"
            )
        prompts = read_prompt_lines(asked.file)
        if ignored := not_followed(prompts):
            print(ignored, file=sys.stderr)
        with contextlib.closing(AnswersOut() if output is None else AnswersFile(output)) as file:
            done = file.done(prompts)
            if done:
                print(f"{done} of {len(prompts)} prompts are already answered", file=sys.stderr)
            if done < len(prompts):
                self.answer_rest(prompts, done, file)
        if output is not None:
            print(f"the answers are in {output}", file=sys.stderr)
        return DONE

    def answer_rest(
        self, prompts: list[dict[str, Any]], done: int, file: AnswersFile | AnswersOut
    ) -> None:
        with self.loaded() as (model, tokenizer, _):
            from offload.generation.prompt import check_length

            encoder, parallel = _Encoder(self, tokenizer), self.own.parallel or PARALLEL
            for begin in range(done, len(prompts), parallel):
                batch = prompts[begin : begin + parallel]
                ids = []
                for number, given in enumerate(batch, start=begin + 1):
                    try:
                        ids.append(encoder(given))
                        check_length(model, ids[-1])
                    except OffloadError as error:
                        where = f"{self.asked.file}, prompt {number}"
                        raise OffloadError(f"{where}: {error}") from None
                for given, (answer,) in zip(batch, self.complete(model, encoder, ids), strict=True):
                    thinking, text = encoder.apart(answer)
                    file.append(
                        given,
                        {
                            "answer": text,
                            **({"thinking": thinking} if thinking else {}),
                            "finish_reason": answer.finish_reason,
                            "prompt_tokens": len(answer.request.ids),
                            "generated_tokens": len(answer.tokens),
                        },
                    )
                print(f"{begin + len(batch)} of {len(prompts)} answered", file=sys.stderr)


class _Encoder:
    """Encodes prompts, and separates thoughts from answers.

    Prompts go through the chat template, unless there is none or --raw leaves it out.
    """

    def __init__(self, job: _Job, tokenizer: PreTrainedTokenizerBase | None) -> None:
        from offload.generation.prompt import check_switch
        from offload.generation.thinking import marks_are_special

        if tokenizer is None:
            raise OffloadError("the model has no tokenizer, so that it cannot read prompts")
        self.tokenizer, self._asked = tokenizer, job.asked
        self._templates = bool(tokenizer.chat_template) and not job.own.raw
        self.skips = not (self._templates and marks_are_special(tokenizer))  # special tokens
        self._why = "--raw leaves the chat template out"
        if not tokenizer.chat_template:
            self._why = f"{job.model_name} has no chat template"
            if others := [flag for flag in job.template_flags if flag != "-sys"]:
                raise OffloadError(f"{self._why}: leave {' and '.join(others)} out")
            if job.asked.system_prompt:
                print(f"{self._why}: -sys is put in front of the prompt", file=sys.stderr)
        else:
            check_switch(tokenizer, job.model_name, job.asked.think)

    def __call__(self, given: dict[str, Any]) -> list[int]:
        """The ids of a line of a prompt file."""
        from offload.generation.conversation import conversation_of
        from offload.generation.prompt import encode_prompt

        system = self._asked.system_prompt
        if self._templates:
            asked = conversation_of(given, system)
            return encode_prompt(
                self.tokenizer,
                asked.messages,
                think=self._asked.think,
                tools=asked.tools,
                arguments={**(self._asked.template_arguments or {}), **asked.arguments},
            )
        for name in ("messages", "tools", "chat_template_kwargs"):
            if name in given:
                raise OffloadError(f"{self._why}: give a prompt alone, without {name}")
        text = given["prompt"]
        return encode_prompt(self.tokenizer, f"{system}\n\n{text}" if system else text)

    def voices(self, prompt: list[int]) -> Voices:
        """What tells thoughts from the answer to `prompt`; without a template all is the answer."""
        from offload.generation.thinking import OneVoice, voices_for

        return voices_for(self.tokenizer, prompt) if self._templates else OneVoice()

    def apart(self, answer: Answer) -> tuple[str, str]:
        """The thoughts and the text of a whole answer."""
        from offload.generation.thinking import apart

        return apart(self.voices(answer.request.ids), answer.text)
