"""`offload ppl` and `offload check`: how well a model predicts text, also against a reference."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import DONE
from offload.files import BASELINE, asked_text, check_output, check_readable
from offload.flags import add_model, add_options, option, options_from
from offload.options import LoadOptions, SharedOptions
from offload.pack.asked import begin_loading, check_asked
from offload.quant.errors import OffloadError

if TYPE_CHECKING:
    from offload.quality.check import Loaded

_comparison = partial(option, group="comparison")


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Options of `offload ppl` alone."""

    file: Path | None = option("-f --file FILE", "UTF-8 text file", unset="stdin")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `offload check` alone."""

    against: str = _comparison(
        "--against REFERENCE",
        "the reference: a checkpoint, a pack, a hub id, or demo. A checkpoint is run at 16 bits, "
        "for which a pack as large as the checkpoint is written",
        unset="required",
    )
    plain: bool = _comparison(
        "--plain", "run the reference with transformers alone, all of it in memory", default=False
    )
    prompts: Path | None = _comparison(
        "--prompts FILE",
        "texts to compare on, each below a line `--- NAME`",
        unset="prose, code, maths, dialogue and Hebrew",
    )
    baseline: Path | None = _comparison(
        "--baseline FILE", "fail if a figure is worse than FILE allows"
    )
    save_baseline: Path | None = _comparison(
        "--save-baseline FILE", "write the figures to FILE, for --baseline"
    )


def _add_arguments(parser: argparse.ArgumentParser, own: type) -> None:
    add_model(parser)
    add_options(parser, LoadOptions, context=512)
    add_options(parser, own)
    add_options(parser, SharedOptions, ["stride", "json"])


class PerplexityCommand:
    """`offload ppl`: the perplexity of a text."""

    EXAMPLE = "offload ppl demo -f book.txt"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        _add_arguments(parser, PerplexityOptions)

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        """Print the perplexity as a line or as JSON, and return the exit code."""
        file = options_from(arguments, PerplexityOptions).file
        options = options_from(arguments, LoadOptions)
        shared = options_from(arguments, SharedOptions)
        text = _scored_text(file)
        begin_loading(arguments.model, options)
        from offload.engine.handle import offload_of
        from offload.loading import load_and_tell
        from offload.progress import Ticker
        from offload.quality.check import measured_model
        from offload.quality.scoring import Sliding, encode_text, measure_perplexity

        model, tokenizer, _ = load_and_tell(arguments.model, options)
        sliding = Sliding.asked(options.context, shared.stride)
        encoded = encode_text(tokenizer, text, str(file or "the piped text"))
        begin = time.perf_counter()
        with Ticker("perplexity") as ticker:
            result = measure_perplexity(model, encoded, sliding, ticker)
        seconds = time.perf_counter() - begin
        if shared.json:
            report = {
                "perplexity": result.perplexity.value,
                "perplexity_error": result.perplexity.error,
                "nll": result.nll.value,
                "tokens": result.tokens,
                "window": sliding.window,
                "stride": sliding.stride,
                "seconds": seconds,
                "model": asdict(measured_model(model, arguments.model)),
            }
            print(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            print(result)
        print(offload_of(model).stats().line(), file=sys.stderr)
        offload_of(model).close()
        return DONE


def _scored_text(file: Path | None) -> str:
    """The text of -f or of a piped stdin. Raises `OffloadError`."""
    if file is None and sys.stdin.isatty():
        raise OffloadError("there is no text: give one with -f or a pipe")
    text = asked_text(file, "text")
    if not text:  # checked before the model is loaded
        raise OffloadError(f"the text from {file or 'stdin'} is empty: give a page or more")
    return text


class CheckCommand:
    """`offload check`: a model against its reference, and against its own earlier figures."""

    EXAMPLE = "offload check demo --bits q4 --against demo --save-baseline q4.json"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        _add_arguments(parser, CheckOptions)

    @staticmethod
    def run(arguments: argparse.Namespace) -> int:
        """Print how far the models differ, and return the exit code.

        Raises `OffloadError` if a figure is worse than the baseline allows.
        """
        asked = options_from(arguments, CheckOptions)
        options = options_from(arguments, LoadOptions)
        shared = options_from(arguments, SharedOptions)
        for file in (asked.prompts, asked.baseline):
            check_readable(file)
        check_output(asked.save_baseline, BASELINE)
        check_asked(asked.against, options)
        begin_loading(arguments.model, options)
        from offload.loading import load_and_tell
        from offload.progress import Ticker
        from offload.quality.baseline import TOLERANCES, read_baseline, save_baseline
        from offload.quality.check import (
            ModelLoader,
            compare_models,
            load_plain,
            read_prompts,
            reference_bits,
        )
        from offload.quality.comparison import table
        from offload.quality.scoring import Sliding

        prompts = read_prompts(asked.prompts)
        # A file that cannot be used is an error before two models are run.
        baseline = read_baseline(asked.baseline) if asked.baseline else None
        reference = replace(
            options,
            trace=None,  # a file holds one run, the model's
            revision=options.revision if asked.against == arguments.model else None,
            bits=reference_bits(asked.against, options.pack_dir),
            expert_bits=None,
            dense_bits=None,
            group_size=None,
        )

        def load_model() -> Loaded:
            return load_and_tell(arguments.model, options)[:2]

        def load_reference() -> Loaded:
            if not asked.plain:
                return load_and_tell(asked.against, reference)[:2]
            return load_plain(asked.against, reference)

        with Ticker("check") as ticker:
            result = compare_models(
                ModelLoader(arguments.model, load_model),
                ModelLoader(asked.against, load_reference),
                prompts,
                Sliding.asked(options.context, shared.stride),
                ticker,
            )
        changes = baseline.worse(result) if baseline else ()
        if baseline and baseline.settings != result.model.settings:
            print(f"the baseline was measured with {baseline.settings}", file=sys.stderr)
        if shared.json:
            worse = None if baseline is None else [asdict(change) for change in changes]
            whole = {**result.to_json(), "worse": worse}
            print(json.dumps(whole, indent=2, ensure_ascii=False))
        else:
            print(table([*result.named(), ("all", result.overall)]))
        if changes:
            what = "; ".join(map(str, changes))
            raise OffloadError(f"worse than {asked.baseline} allows: {what}")
        if baseline:
            print(f"no figure is worse than {asked.baseline} allows", file=sys.stderr)
        if asked.save_baseline:
            tolerances = baseline.tolerances if baseline else TOLERANCES
            save_baseline(asked.save_baseline, result, tolerances)
            print(f"the figures are saved in {asked.save_baseline}", file=sys.stderr)
        return DONE
