"""`offload ppl`: the perplexity of a text.

Knows: its flags and its line or JSON. Does not know: how it is measured (`offload.quality`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_model_flags, add_window_flags
from cli.model import asked_text, load_model


def add(commands: Commands) -> None:
    """The command and its flags."""
    ppl = commands.add("ppl", run, "perplexity on a text", "offload ppl demo -f book.txt")
    add_model_flags(ppl, context=512)
    ppl.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="the text, UTF-8 (else a piped stdin)"
    )
    add_window_flags(ppl)
    ppl.add_argument("--json", action="store_true", help="write JSON instead of the line")


def run(arguments: argparse.Namespace) -> int:
    text = asked_text(arguments.file)
    model, tokenizer, _ = load_model(arguments)
    from offload.engine.handle import offload_of
    from offload.progress import Ticker
    from offload.quality.check import measured_model
    from offload.quality.scoring import Sliding, encode_text, measure_perplexity

    sliding = Sliding.asked(arguments.ctx_size, arguments.stride)
    encoded = encode_text(tokenizer, text, str(arguments.file or "the piped text"))
    begin = time.perf_counter()
    with Ticker("perplexity") as ticker:
        result = measure_perplexity(model, encoded, sliding, ticker)
    seconds = time.perf_counter() - begin
    if arguments.json:
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
