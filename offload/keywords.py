"""Keywords of Python: a wrong one gets a hint, and messages name keywords instead of flags."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Collection, Iterable

from offload.errors import OptionError
from offload.flags import is_switch, options_of
from offload.options import AnswerOptions, LoadOptions
from offload.quant.errors import OffloadError

# What other libraries and programs call our keywords.
ELSEWHERE = {
    "bits": "load_in_4bit load_in_8bit quantization quantization_config q_bits",
    "context": "ctx_size n_ctx num_ctx context_length max_seq_len max_model_len max_kv_size",
    "device": "device_map",
    "dtype": "torch_dtype",
    "gpus": "tensor_split tensor_parallel_size",
    "max_new_tokens": "max_tokens max_length max_completion_tokens n_predict num_predict",
    "num_return_sequences": "n best_of num_samples",
    "repetition_penalty": "repeat_penalty",
    "stop_strings": "stop stop_sequences stop_words reverse_prompt",
    "temperature": "temp do_sample",
    "threads": "n_threads num_threads",
    "ubatch_size": "n_ubatch n_batch batch_size prefill_step_size",
    "vram": "max_memory gpu_memory_utilization n_gpu_layers",
}
IN_PYTHON = {"n_predict": "max_new_tokens", "reverse_prompt": "stop_strings"}  # fields -> keywords
VALUE = r"[ =]((?:\d[\w.,%]*)\b%?|auto|host|device|fit|q\d)"


def check_names(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise `OptionError` for a name in `given` that is not among the `known` keywords."""
    for name in given:
        if name not in known:
            near = [ours for ours, theirs in ELSEWHERE.items() if name in theirs.split()]
            near = [ours for ours in near if ours in known] or difflib.get_close_matches(
                name, known
            )
            hint = f"write {near[0]}=" if near else f"help({function}) lists the keywords"
            raise OptionError(f"{function}() has no keyword {name!r}: {hint}")


@functools.cache
def _keywords() -> dict[str, tuple[str, bool, bool]]:
    """Long flag -> keyword, whether it is a switch, whether its values are numbers."""
    return {
        spelling.flags[-1]: (
            IN_PYTHON.get(each.name, each.name),
            is_switch(each),
            str(each.type).removesuffix(" | None") in ("int", "float"),
        )
        for kind in (LoadOptions, AnswerOptions)
        for each, spelling in options_of(kind)
        if spelling.flags
    }


def in_keywords(text: str) -> str:
    """`text` with the keywords of Python in place of flags: `context=64` for `--ctx-size 64`."""

    def keyword(match: re.Match[str]) -> str:
        off, word, value = match.groups()
        if f"--{word}" not in _keywords():
            return match[0]
        name, switch, number = _keywords()[f"--{word}"]
        if switch:
            return f"{name}={not off}{match[0][match.end(2) - match.start() :]}"
        if value is None:
            return f"{name}="
        return f"{name}={value}" if number or value.isdecimal() else f'{name}="{value}"'

    return re.sub(rf"(?<![\w-])--(no-)?([a-z]+(?:-[a-z]+)*)(?:{VALUE})?", keyword, text)


class _Reworded(logging.Filter):
    """Gives lines of the log the words that errors have."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = OffloadError.reworded(record.getMessage()), None
        return True


_reworded = _Reworded()


def speak_python() -> None:
    """From now on, errors and the log name options as they are written in Python."""
    OffloadError.reworded = in_keywords
    logging.getLogger("offload").addFilter(_reworded)  # adds it once
