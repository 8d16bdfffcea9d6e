"""The options of `load` and those that several commands share.

Each option states its default, unit, meaning and flags once. `load` takes the fields of
`LoadOptions` as keywords, and `offload.flags` makes command-line flags of the same fields. The
options of a single command are in its `command.py`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from offload.errors import BudgetError, OptionError, UnsupportedModelError
from offload.flags import check_values, described, option, path
from offload.units import (
    MOST,
    SHARE,
    UBATCH,
    between,
    check_size,
    count,
    parse_bytes,
    parse_gpus,
    parse_sizes,
    parse_slots,
    positive,
    seed,
)

if TYPE_CHECKING:
    import torch

POLICIES = ("lfru", "lru")
ENGINES = ("auto", "host", "device")
DTYPES = ("auto", "bfloat16", "float16", "float32")  # "auto" is what the config says
DEVICE = re.compile(r"cpu|cuda(:\d+)?")
CONTEXT = 4096  # tokens of a conversation, or the model's positions if they are fewer
POLICY_HELP = (
    "which expert to evict: the one used least by recency and frequency (lfru), or the one used "
    "longest ago (lru)"
)
# The sampling values that the user does not give, for a model whose files do not ask for sampling.
FALLBACK = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
SHARE_TEXT = f"{SHARE:.0%} of what is free"

_memory, _quantised = partial(option, group="memory"), partial(option, group="quantisation")
_source, _answer = partial(option, group="source"), partial(option, group="prompt and sampling")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Everything that can be asked of `load`.

    Raises `UnsupportedModelError` for an unknown policy or engine, `OptionError` for a value of
    a wrong type or out of range, and `BudgetError` for a device, a size, or a number of GPUs or
    expert slots that cannot be one.
    """

    device: str | torch.device | None = _memory(
        "--device NAME",
        "compute device: cuda, cuda:1 or cpu",
        unset="cuda if there is a GPU, else cpu",
    )
    gpus: str | Sequence[int | str] | None = _memory(
        "--gpus N,..",
        "numbers of the GPUs that share the model, like 0,1; --vram may then give a size for each "
        "of them, like 20GiB,10GiB",
        unset="one GPU",
    )
    vram: str | int | None = _memory(
        "--vram SIZE",
        "memory to use on each GPU, like 20GiB",
        unit="bytes if a number",
        unset=SHARE_TEXT,
    )
    ram: str | int | None = _memory(
        "--ram SIZE", "RAM to use, like 48GiB", unit="bytes if a number", unset=SHARE_TEXT
    )
    context: int = _memory(
        "-c --ctx-size N",
        "maximum tokens in a conversation, prompts and answers together; memory is reserved for "
        "them; 0 means as many as the model has positions",
        default=CONTEXT,
        unit="tokens",
        parse=count,
    )
    ubatch_size: int = _memory(
        "-ub --ubatch-size N",
        "prompt batch size: how many tokens of a prompt go through the model at once; with a "
        "larger one each expert is loaded less often",
        default=UBATCH,
        unit="tokens",
        parse=positive,
    )
    threads: int | None = _memory(
        "-t --threads N",
        "CPU threads",
        unset="torch's choice; fewer in chat and generate while other programs use the cores",
        parse=between(1, 1024),
    )
    expert_slots: int | float | str | None = _memory(
        "--expert-slots N",
        "how many experts, counted over all layers, are resident (held in the memory of the "
        "compute device): a number, or a share like 25%",
        unit="experts",
        unset="as many as fit",
    )
    policy: str = _memory("--policy NAME", POLICY_HELP, default=POLICIES[0])
    lookahead: bool | None = _memory(
        "--lookahead",
        "prefetch the experts that the router of the next layer will probably choose",
        unset="on while it helps; always on if the GPU decides (see --engine)",
    )
    engine: str = _memory(
        "--engine NAME",
        "where it is decided which experts to load for a token: on the CPU (host), on the GPU "
        "(device), or auto (on a CUDA GPU where that is possible, else on the CPU)",
        default="auto",
    )
    warm_start: bool = _memory(
        "--warm-start",
        "preload the experts that earlier runs used most, and record this run's for later ones",
        default=True,
    )
    trace: str | Path | None = _memory(
        "--trace FILE",
        "record in FILE which experts the routers choose (see offload trace)",
        parse=path,
    )
    pack_dir: str | Path | None = _memory(
        "--pack-dir DIR", "folder that packs are kept in", unset="$OFFLOAD_HOME/packs"
    )
    bits: str | None = _quantised(
        "--bits RULES",
        "bits of the weights: a preset, or rules separated by commas. Presets: q8, q6, q5, q4, q3, "
        "q2, mixtral-offloading, or fit (the most bits with which all experts are resident). A "
        "rule is PART=BITS or layers.A-B.PART=BITS, and a later rule wins over an earlier one. "
        "PART: experts, attention, shared, mlp, head, embeddings, or dense (attention, shared, mlp "
        "and head). BITS: 2, 3, 4, 5, 6, 8 or 16, with a group size and 8-bit scales if wanted, "
        "like 4g32 or 2g16s8",
    )
    expert_bits: int | None = _quantised(
        "--expert-bits N",
        "bits of the experts' weights: 2, 3, 4, 5, 6, 8, or 16 (as stored)",
        unit="bits",
        unset="those of the pack, else 4",
    )
    dense_bits: int | None = _quantised(
        "--dense-bits N",
        "bits of all other weights: 2, 3, 4, 5, 6, 8, or 16 (as stored)",
        unit="bits",
        unset="those of the pack, else 16",
    )
    group_size: int | None = _quantised(
        "--group-size N",
        "how many weights share a scale: 16, 32, 64, 128 or 256",
        unit="weights",
        unset="that of the pack, else 64",
    )
    revision: str | None = _source("--revision REV", "branch, tag or commit on the hub")
    local_files_only: bool = _source(
        "--local-files-only", "use only files that are on this machine, not the hub", default=False
    )
    trust_remote_code: bool = _source(
        "--trust-remote-code", "run Python code that comes with the model", default=False
    )
    dtype: str | torch.dtype | None = option(
        "",
        "type of the computation, like float16 (a text or torch's)",
        unset="what the checkpoint's config says",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if isinstance(self.dtype, str) and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        check_size(self.vram)
        check_size(self.ram)
        for what, name, known in (
            ("policy", self.policy, POLICIES),
            ("engine", self.engine, ENGINES),
        ):
            if name not in known:
                raise UnsupportedModelError(
                    f"there is no {what} {name!r}: choose {' or '.join(known)}"
                )
        if isinstance(self.device, str) and not DEVICE.fullmatch(self.device):
            raise BudgetError(
                f"device {self.device!r} is not supported: use cpu, cuda, or one like cuda:1"
            )
        parse_slots(self.expert_slots, 1)
        parse_bytes(self.ram)
        parse_sizes(self.vram, len(parse_gpus(self.gpus)) if self.gpus is not None else 1)


LoadOptions.__doc__ = f"{inspect.cleandoc(LoadOptions.__doc__ or '')}\n\n{described(LoadOptions)}\n"


class LoadKeywords(TypedDict, total=False):
    """`LoadOptions` for type checkers and editors."""

    device: str | torch.device | None
    gpus: str | Sequence[int | str] | None
    vram: str | int | None
    ram: str | int | None
    context: int
    ubatch_size: int
    threads: int | None
    expert_slots: int | float | str | None
    policy: str
    lookahead: bool | None
    engine: str
    warm_start: bool
    trace: str | Path | None
    pack_dir: str | Path | None
    bits: str | None
    expert_bits: int | None
    dense_bits: int | None
    group_size: int | None
    revision: str | None
    local_files_only: bool
    trust_remote_code: bool
    dtype: str | torch.dtype | None


# Parts of `LoadOptions` that some commands have without the rest.
BITS = ("bits", "expert_bits", "dense_bits", "group_size")
BUDGET = ("device", "gpus", "vram", "ram", "context", "ubatch_size")
HUB = ("revision", "local_files_only", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Options that several commands have; each command names those that it takes."""

    stride: int | None = option(
        "--stride N",
        "tokens scored per window; the rest of the window is context",
        unit="tokens",
        unset="half of --ctx-size",
        parse=positive,
    )
    timeline: Path | None = option(
        "--timeline FILE",
        "record when computation and copies ran in FILE, as JSON for ui.perfetto.dev",
    )
    json: bool = option("--json", "write JSON instead of text", default=False)


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: an object in JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not a JSON object like {{"a": true}}')
    return value


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options of `offload chat` and `offload generate`."""

    prompt: str | None = _answer(
        "-p --prompt TEXT", "the prompt; it follows the text of -f or of a pipe, if there is one"
    )
    file: Path | None = _answer(
        "-f --file FILE",
        "read the prompt from FILE; generate answers every line if the name ends in .jsonl",
    )
    system_prompt: str = _answer("-sys --system-prompt TEXT", "the system prompt", default="")
    n_predict: int = _answer(
        "-n --n-predict N",
        "maximum tokens to generate for an answer; -1 means as many as the context holds",
        default=-1,
        unit="tokens",
        parse=between(-1, MOST),
    )
    seed: int | None = _answer(
        "-s --seed N",
        "random seed; the same seed gives the same answer, and -1 draws one",
        unset="random",
        parse=seed,
    )
    temperature: float | None = _answer(
        "--temp X",
        "temperature of sampling; 0 always takes the likeliest token",
        unset=f"the model's, else {FALLBACK['temperature']}",
    )
    top_k: int | None = _answer(
        "--top-k N",
        "sample from the N likeliest tokens; 0 turns this off",
        unset=f"the model's, else {FALLBACK['top_k']}",
        unit="tokens",
    )
    top_p: float | None = _answer(
        "--top-p X",
        "sample from the likeliest tokens whose probabilities add up to X; 1 turns this off",
        unset=f"the model's, else {FALLBACK['top_p']}",
    )
    min_p: float | None = _answer(
        "--min-p X",
        "drop tokens that are less than X times as likely as the likeliest; 0 turns this off",
        unset=f"the model's, else {FALLBACK['min_p']}",
    )
    repetition_penalty: float | None = _answer(
        "--repeat-penalty X",
        "make tokens that occurred before less likely; 1 turns this off",
        unset="the model's, else 1",
    )
    reverse_prompt: tuple[str, ...] = _answer(
        "-r --reverse-prompt TEXT",
        "end an answer where TEXT appears; may be given several times",
        default=(),
        action="append",
    )
    think: bool | None = _answer(
        "--think",
        "let the model think before it answers, or not, if its chat template has a switch for this",
        unset="what the template says",
    )
    template_arguments: dict[str, Any] | None = _answer(
        "--chat-template-kwargs JSON",
        'arguments of the chat template, like \'{"reasoning_effort": "low"}\'',
        parse=json_object,
    )
    hide_thoughts: bool = _answer(
        "--hide-thoughts", "show only the answer that follows a model's thoughts", default=False
    )
    verbose: bool = _answer("--verbose", "show detailed timings after each answer", default=False)
    show_timings: bool = _answer(
        "--show-timings", "show two lines of timings after each answer", default=True
    )
