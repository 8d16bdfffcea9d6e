"""What several commands make of their flags: a model, its sampling, a prompt or a text.

Knows: which argument of the runtime each flag is. Does not know: what a command does with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from offload.quant.errors import OffloadError

from offload.files import read_text, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.sampling import Sampling


def load_model(
    arguments: argparse.Namespace, *, note: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, float]:
    """The model, its tokenizer, and the seconds it took; with `note` the demo says what it is."""
    begin = time.perf_counter()
    if "temp" in arguments:
        asked_sampling(arguments, None)  # a wrong value is told before the model is loaded
        if arguments.n_predict == 0:
            raise OffloadError("--n-predict is 0: give at least 1, or -1 for no limit")
    from offload.budget.resolve import set_threads
    from offload.engine.handle import offload_of
    from offload.loading import load

    if arguments.threads:
        set_threads(arguments.threads)
    model, tokenizer = load(
        arguments.model,
        device=arguments.device,
        gpus=arguments.gpus,
        bits=arguments.bits,
        expert_bits=arguments.expert_bits,
        dense_bits=arguments.dense_bits,
        group_size=arguments.group_size,
        expert_slots=arguments.expert_slots,
        vram=arguments.vram,
        ram=arguments.ram,
        policy=arguments.policy,
        allocation=arguments.allocation,
        lookahead=arguments.lookahead,
        predictor=arguments.predictor,
        layers_ahead=arguments.layers_ahead,
        warm_start=arguments.warm_start,
        engine=arguments.engine,
        trace=arguments.trace,
        context=arguments.ctx_size,
        ubatch_size=arguments.ubatch_size,
        pack_dir=arguments.pack_dir,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        trust_remote_code=arguments.trust_remote_code,
    )
    for share in offload_of(model).options.shares:
        print(share.line(), file=sys.stderr)
    if note and arguments.model == "demo":
        from offload.model.demo import NOTE

        print(NOTE, file=sys.stderr)
    return model, tokenizer, time.perf_counter() - begin


def asked_sampling(arguments: argparse.Namespace, model: PreTrainedModel | None) -> Sampling:
    from offload.sampling import Sampling, resolve_sampling

    return resolve_sampling(
        None if model is None else model.generation_config,
        temperature=arguments.temp,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repeat_penalty,
        seed=arguments.seed,
        fallback=Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    )


def asked_prompt(arguments: argparse.Namespace) -> str | None:
    """The prompt of -p, -f or a piped stdin; None when there is none."""
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.file is not None:
        try:
            with user_path(arguments.file).open(encoding="utf-8") as handle:
                return read_text(handle, "the prompt")
        except (OSError, OffloadError) as error:
            raise OffloadError(f"cannot read the prompt from {arguments.file}: {error}") from None
    return None


def asked_text(file: Path | None) -> str:
    """The text of -f or a piped stdin."""
    if file is None and sys.stdin.isatty():
        raise OffloadError("there is no text: give one with -f or a pipe, there is no default")
    try:
        if file is None:
            text = read_text(sys.stdin, "the piped text")
        else:
            with user_path(file).open(encoding="utf-8") as handle:
                text = read_text(handle, "the text")
    except (OSError, OffloadError) as error:
        raise OffloadError(f"cannot read the text from {file or 'stdin'}: {error}") from None
    if not text:  # told before the model is loaded
        raise OffloadError(f"the text from {file or 'stdin'} is empty: give one of a page or more")
    return text
