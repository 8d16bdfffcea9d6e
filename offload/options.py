"""Every option: its default, its unit, what it means and how it is written, each stated once.

`LoadOptions` serves Python and the command line alike: `load` takes its fields as keywords, and
`add_options` makes argparse arguments of the same fields. `Fit` is what the options come to on one
machine.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from offload.errors import UnsupportedModelError
from offload.units import (
    SHARE,
    UBATCH,
    between,
    count,
    gib,
    listed,
    pair,
    parse_slots,
    positive,
    switch,
)

if TYPE_CHECKING:
    import torch

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes of every command
POLICIES = ("lfru", "lru")
ENGINES = ("auto", "host", "device")
# What is sampled with where neither the user nor the model's files say anything.
FALLBACK = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
SHARE_TEXT = f"{SHARE:.0%} of what is free"

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Spelling:
    """How one option is written and explained."""

    flags: tuple[str, ...]  # empty: the option is for Python only
    metavar: str | None
    help: str
    group: str | None  # heading in --help
    unit: str  # what a number counts
    unset: str  # what the default None stands for
    parse: Callable[[str], Any]
    element: Callable[[str], Any]  # as `parse`, for one value of a list
    choices: tuple[str, ...] | None
    action: str  # append or extend: the option may be given several times


def option(
    usage: str,
    default: Any,
    help: str,
    *,
    group: str | None = None,
    unit: str = "",
    unset: str = "",
    parse: Callable[[str], Any] = str,
    element: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    action: str = "store",
) -> Any:
    """A dataclass field that is also a command-line option, written like `-c --ctx-size N`."""
    words = usage.split()
    flags = tuple(word for word in words if word.startswith("-"))
    metavar = words[-1] if len(words) > len(flags) else None
    spelling = Spelling(
        flags, metavar, help, group, unit, unset, parse, element or parse, choices, action
    )
    return field(default=default, metadata={"spelling": spelling})


# Options under a heading of --help.
_memory, _quantised = partial(option, group="memory"), partial(option, group="quantisation")
_source, _answer = partial(option, group="source"), partial(option, group="prompt and sampling")
_several, _test = partial(option, group="several answers"), partial(option, group="tests")
_output, _machine = partial(option, group="output"), partial(option, group="machine")
_comparison = partial(option, group="comparison")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Everything that can be asked of `load`.

    Raises `UnsupportedModelError` for an unknown policy or engine, `BudgetError` for text that is
    no number of expert slots.
    """

    device: str | torch.device | None = _memory(
        "--device NAME", None, "compute device: cuda, cuda:1 or cpu", unset="cuda if there is a GPU"
    )
    gpus: str | Sequence[int | str] | None = _memory(
        "--gpus N,..", None, "GPUs that share the model, like 0,1", unset="one GPU"
    )
    vram: str | int | None = _memory(
        "--vram SIZE",
        None,
        "memory to use on each GPU, like 20GiB, or one size for each like 20GiB,10GiB",
        unit="bytes if a number",
        unset=SHARE_TEXT,
    )
    ram: str | int | None = _memory(
        "--ram SIZE",
        None,
        "RAM to use, like 48GiB",
        unit="bytes if a number",
        unset=SHARE_TEXT,
    )
    context: int = _memory(
        "-c --ctx-size N",
        4096,
        "longest conversation, for which memory is reserved",
        unit="tokens",
        parse=positive,
    )
    ubatch_size: int = _memory(
        "-ub --ubatch-size N",
        UBATCH,
        "tokens of a prompt that go through the model at once; more of them load each expert less "
        "often",
        unit="tokens",
        parse=positive,
    )
    expert_slots: int | str | None = _memory(
        "--expert-slots N",
        None,
        "resident experts over all layers, a number or a share like 25%",
        unit="experts",
        unset="as many as fit",
    )
    policy: str = _memory(
        "--policy NAME",
        POLICIES[0],
        "which expert is evicted: by recency and frequency (lfru) or by recency alone (lru)",
    )
    lookahead: bool | None = _memory(
        "--lookahead",
        None,
        "load the experts that the next layer's router will probably choose",
        unset="while it pays; always where the GPU plans",
    )
    engine: str = _memory(
        "--engine NAME",
        "auto",
        "where the steps of a token are planned: host, device, or auto (on a CUDA GPU where it "
        "can)",
    )
    warm_start: bool = _memory(
        "--warm-start",
        True,
        "begin with the experts that were used most in the run before, and remember those of this "
        "run",
    )
    trace: str | Path | None = _memory(
        "--trace FILE",
        None,
        "record in FILE which experts the routers choose (see offload trace)",
        parse=Path,
    )
    pack_dir: str | Path | None = _memory(
        "--pack-dir DIR", None, "folder in which packs are kept", unset="$OFFLOAD_HOME/packs"
    )
    bits: str | None = _quantised(
        "--bits RULES",
        None,
        "a preset: q8, q6, q5, q4, q3, q2, mixtral-offloading, or fit (the most bits with which "
        "all experts are resident); or rules PART=BITS or layers.A-B.PART=BITS with commas between "
        "them, of which a later one wins. PART: experts, attention, shared, mlp, head, embeddings, "
        "or dense for all but the first and the last. BITS: 2, 3, 4, 5, 6, 8 or 16, with group "
        "size and 8-bit scales like 4g32 or 2g16s8",
    )
    expert_bits: int | None = _quantised(
        "--expert-bits N",
        None,
        "bits of an expert's weights: 2, 3, 4, 5, 6, 8, or 16 (as stored)",
        unit="bits",
        unset="the pack's, else 4",
        parse=int,
        element=between(2, 16),
    )
    dense_bits: int | None = _quantised(
        "--dense-bits N",
        None,
        "bits of all other weights: 2, 3, 4, 5, 6, 8, or 16 (as stored)",
        unit="bits",
        unset="the pack's, else 16",
        parse=int,
    )
    group_size: int | None = _quantised(
        "--group-size N",
        None,
        "weights that share a scale, 16 to 256",
        unit="weights",
        unset="the pack's, else 64",
        parse=int,
    )
    revision: str | None = _source("--revision REV", None, "branch, tag or commit on the hub")
    local_files_only: bool = _source("--local-files-only", False, "do not ask the hub")
    trust_remote_code: bool = _source(
        "--trust-remote-code", False, "run Python code that comes with the model"
    )
    dtype: torch.dtype | None = option(
        "", None, "type of the computation", unset="what the checkpoint's config says"
    )

    def __post_init__(self) -> None:
        for what, name, known in (
            ("policy", self.policy, POLICIES),
            ("engine", self.engine, ENGINES),
        ):
            if name not in known:
                raise UnsupportedModelError(
                    f"there is no {what} {name!r}: choose {' or '.join(known)}"
                )
        parse_slots(self.expert_slots, 1)


class LoadKeywords(TypedDict, total=False):
    """`LoadOptions` for type checkers and editors."""

    device: str | torch.device | None
    gpus: str | Sequence[int | str] | None
    vram: str | int | None
    ram: str | int | None
    context: int
    ubatch_size: int
    expert_slots: int | str | None
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
    dtype: torch.dtype | None


# Parts of `LoadOptions` that a command has without the rest.
BITS = ("bits", "expert_bits", "dense_bits", "group_size")
BUDGET = ("device", "gpus", "vram", "ram", "context", "ubatch_size")
HUB = ("revision", "local_files_only", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """Options of every command that computes."""

    threads: int | None = _memory("-t --threads N", None, "CPU threads", parse=between(1, 1024))


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options of `offload chat` and `offload generate`."""

    prompt: str | None = _answer("-p --prompt TEXT", None, "the prompt")
    file: Path | None = _answer("-f --file FILE", None, "read the prompt from FILE", parse=Path)
    system_prompt: str = _answer("-sys --system-prompt TEXT", "", "system prompt")
    n_predict: int = _answer(
        "-n --n-predict N", -1, "most new tokens; -1 is no limit", unit="tokens", parse=int
    )
    seed: int | None = _answer(
        "-s --seed N", None, "seed of the sampling", unset="random", parse=int
    )
    temperature: float | None = _answer(
        "--temp X",
        None,
        "temperature; 0 always takes the likeliest token",
        unset=f"the model's, else {FALLBACK['temperature']}",
        parse=float,
    )
    top_k: int | None = _answer(
        "--top-k N",
        None,
        "sample from the K likeliest tokens; 0 is off",
        unset=f"the model's, else {FALLBACK['top_k']}",
        unit="tokens",
        parse=int,
    )
    top_p: float | None = _answer(
        "--top-p X",
        None,
        "sample from the likeliest tokens that have this probability together; 1 is off",
        unset=f"the model's, else {FALLBACK['top_p']}",
        parse=float,
    )
    min_p: float | None = _answer(
        "--min-p X",
        None,
        "leave out tokens less likely than this share of the likeliest; 0 is off",
        unset=f"the model's, else {FALLBACK['min_p']}",
        parse=float,
    )
    repetition_penalty: float | None = _answer(
        "--repeat-penalty X",
        None,
        "makes tokens less likely that came before; 1 is off",
        unset="the model's, else 1",
        parse=float,
    )
    reverse_prompt: tuple[str, ...] = _answer(
        "-r --reverse-prompt TEXT",
        (),
        "text that ends an answer when it appears; may be given several times",
        action="append",
    )
    verbose: bool = _answer("--verbose", False, "show all timings after an answer")
    show_timings: bool = _answer("--show-timings", True, "show two lines of timings after it")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `offload chat` alone."""

    single_turn: bool = option("-st --single-turn", False, "answer one prompt (-p or -f) and leave")
    hide_thoughts: bool = option(
        "--hide-thoughts", False, "show only what follows a model's thoughts"
    )


@dataclass(frozen=True, kw_only=True)
class TimelineOptions:
    """The option of commands whose run can be drawn as a timeline."""

    timeline: Path | None = option(
        "--timeline FILE",
        None,
        "write computation and copies over time to a JSON file for ui.perfetto.dev",
        parse=Path,
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `offload generate` alone."""

    raw: bool = option("--raw", False, "give the prompt as it is, without the chat template")
    output: Path | None = _several(
        "-o --output FILE",
        None,
        "answer each line of -f FILE, which is JSON: a text, or an object with a prompt or "
        "messages. The same command goes on where it was stopped (prompts are compared, the other "
        "options are not)",
        parse=Path,
    )
    parallel: int = _several("-np --parallel N", 8, "prompts in one batch", parse=positive)
    vote: int | None = _several(
        "--vote N",
        None,
        "give the answer that most of N samples come to: what is boxed, follows 'answer is', or is "
        "the last line",
        parse=between(2, 1024),
    )


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `offload bench` alone; names and defaults are llama-bench's."""

    n_prompt: tuple[int, ...] = _test(
        "-p --n-prompt N,..",
        (512,),
        "prompt tokens to read; 0 is no such test",
        unit="tokens",
        parse=listed(count),
        action="extend",
    )
    n_gen: tuple[int, ...] = _test(
        "-n --n-gen N,..",
        (128,),
        "tokens to generate; 0 is no such test",
        unit="tokens",
        parse=listed(count),
        action="extend",
    )
    n_depth: tuple[int, ...] = _test(
        "-d --n-depth N,..",
        (0,),
        "tokens that are in the context before each test",
        unit="tokens",
        parse=listed(count),
        action="extend",
    )
    pg: tuple[tuple[int, int], ...] = _test(
        "-pg P,N",
        (),
        "also read P tokens and generate N in one test; may be given several times",
        unit="tokens",
        parse=pair,
        action="append",
    )
    repetitions: int = _test("-r --repetitions N", 5, "runs of each test", parse=positive)
    no_warmup: bool = _test("--no-warmup", False, "time the first run too")
    random: bool = _test("--random", False, "read random tokens, as llama-bench does")
    output: str = _output("-o --output", "md", "format", choices=("md", "csv", "json", "jsonl"))
    plot: Path | None = _output(
        "--plot PNG",
        None,
        "draw tokens/s and hit rate over the share of resident experts",
        parse=Path,
    )
    compare: str | None = _output(
        "--compare FILE", None, "also give the ratio to what -o json wrote before"
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `offload plan` alone."""

    gpu: str | None = _machine(
        "--gpu NAME",
        None,
        "plan for a machine with this GPU, like 3060 or 4090; --vram and --ram are then what it "
        "has, of which 90% is used",
        unset="this machine",
    )
    cards: int | None = _machine("--gpus N", None, "number of GPUs", unset="1", parse=positive)
    routing: str | None = _machine(
        "--trace FILE",
        None,
        "forecast for the routing that --trace recorded in FILE",
        unset="made-up routing",
    )
    output: str = option("-o --output", "text", "format", choices=("text", "json"))


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """The option of commands that read a text in windows of --ctx-size tokens."""

    stride: int | None = option(
        "--stride N",
        None,
        "tokens of a window that are scored; those before them are context",
        unit="tokens",
        unset="half of --ctx-size",
        parse=positive,
    )


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """The option of commands that write text or JSON."""

    json: bool = option("--json", False, "write JSON")


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Options of `offload ppl` alone."""

    file: Path | None = option(
        "-f --file FILE", None, "the text, in UTF-8", unset="a piped stdin", parse=Path
    )


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `offload check` alone."""

    against: str = _comparison(
        "--against REFERENCE",
        None,
        "the reference: a checkpoint (run at 16 bits, for which a pack as large as the checkpoint "
        "is written), a pack, a hub id, or demo",
        unset="required",
    )
    plain: bool = _comparison(
        "--plain", False, "run the reference by transformers alone, all of it in memory"
    )
    prompts: Path | None = _comparison(
        "--prompts FILE",
        None,
        "texts, each under a line `--- NAME`",
        unset="prose, code, maths, dialogue and Hebrew",
        parse=Path,
    )
    baseline: Path | None = _comparison(
        "--baseline FILE", None, "fail when a figure is worse than this file allows", parse=Path
    )
    save_baseline: Path | None = _comparison(
        "--save-baseline FILE", None, "write the figures to a file for --baseline", parse=Path
    )


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Options of `offload trace replay`."""

    policy: tuple[str, ...] = option(
        "--policy NAMES",
        (),
        "which expert is evicted: lru, lfru, lfu, or belady (the optimum, with hindsight)",
        unset="as recorded",
        parse=listed(str),
    )
    expert_slots: tuple[str, ...] = option(
        "--expert-slots N,..",
        (),
        "resident experts, numbers or shares like 25%",
        unset="as recorded",
        parse=listed(str),
    )
    lookahead: tuple[str, ...] = option(
        "--lookahead NAMES",
        ("live",),
        "who guesses what is loaded ahead: none, live (as recorded) or router",
        parse=listed(str),
    )
    per_layer: bool = option("--per-layer", False, "show each layer's hits and guesses")


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `offload trace plot`."""

    expert_slots: str = option(
        "--expert-slots N", "25%", "resident experts, a number or a share", unit="experts"
    )
    policy: str = option(
        "--policy NAME",
        POLICIES[0],
        "which expert is evicted: by recency and frequency (lfru) or by recency alone (lru)",
    )
    output: Path | None = option(
        "-o --output PNG", None, "draw to a file", unset="the terminal", parse=Path
    )


def options_of(kind: type) -> Iterator[tuple[Field[Any], Spelling]]:
    """The fields of the dataclass `kind` with their spelling, in order."""
    return ((each, each.metadata["spelling"]) for each in fields(kind))


def names_of(kind: type) -> list[str]:
    """The names of the fields of the dataclass `kind`."""
    return [each.name for each in fields(kind)]


def has_no(each: Field[Any]) -> bool:
    """Whether the option `each` is a switch that is also written `--no-...`."""
    return str(each.type).startswith("bool") and each.default is not False


def default_text(default: Any, spelling: Spelling) -> str:
    """A default as people read it; "" where nothing need be said."""
    if default is None or default == ():
        return spelling.unset
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def add_options(
    parser: argparse.ArgumentParser,
    kind: type,
    names: Iterable[str] | None = None,
    *,
    group: str | None = None,
    several: bool = False,
    helps: dict[str, str] | None = None,
    **defaults: Any,
) -> None:
    """Give `parser` the options of the dataclass `kind`, or those of `names`.

    `group`: a heading in place of the options' own; `several`: each takes a list with commas;
    `helps`: texts in place of the options' own; `defaults`: this command's own defaults. Options
    that the user leaves out are left out of the namespace, so that the default stays the
    dataclass's.
    """
    groups = {each.title: each for each in parser._action_groups}
    chosen = None if names is None else set(names)
    for each, spelling in options_of(kind):
        if not spelling.flags or (chosen is not None and each.name not in chosen):
            continue
        title = group or spelling.group
        place: argparse._ActionsContainer = parser
        if title is not None:
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            place = groups[title]
        default = defaults.get(each.name, each.default)
        told = default_text(default, spelling) if each.default is not False else ""
        text = (helps or {}).get(each.name, spelling.help) + (f" ({told})" if told else "")
        settings: dict[str, Any] = {
            "dest": each.name,
            "default": defaults.get(each.name, argparse.SUPPRESS),
            "help": text.replace("%", "%%"),
        }
        is_switch = str(each.type).startswith("bool")
        if is_switch and several:
            _add_switches(place, spelling, settings)
        elif is_switch:
            settings["action"] = argparse.BooleanOptionalAction if has_no(each) else "store_true"
            place.add_argument(*spelling.flags, **settings)
        else:
            parse = listed(spelling.element) if several else spelling.parse
            place.add_argument(
                *spelling.flags,
                **settings,
                type=parse,
                metavar=f"{spelling.metavar},.." if several else spelling.metavar,
                action=spelling.action,
                choices=spelling.choices,
                required=spelling.unset == "required",
            )


def _add_switches(
    place: argparse._ActionsContainer, spelling: Spelling, settings: dict[str, Any]
) -> None:
    """A switch as a list of on, off and auto; the flag alone is on, --no-... is off."""
    (flag,) = spelling.flags
    place.add_argument(
        flag, **settings, type=listed(switch), nargs="?", const=[True], metavar="on,off,auto"
    )
    off = {**settings, "help": "the same as off", "action": "store_const", "const": [False]}
    place.add_argument(f"--no-{flag.removeprefix('--')}", **off)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the model that a command runs."""
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, .gguf file, pack, hub id, or demo"
    )


def options_from(
    arguments: argparse.Namespace, kind: type[Kind], *, without: Iterable[str] = ()
) -> Kind:
    """The dataclass `kind` filled with what the user gave."""
    names = {each.name for each, _ in options_of(kind)} - set(without)
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def combinations(arguments: argparse.Namespace, names: Sequence[str]) -> list[LoadOptions]:
    """Options for every combination of the lists given for `names`; the last changes first.

    Raises `OffloadError` for one that could not be loaded.
    """
    base = options_from(arguments, LoadOptions, without=names)
    lists = [getattr(arguments, name, [getattr(base, name)]) for name in names]
    return [
        replace(base, **dict(zip(names, one, strict=True))) for one in itertools.product(*lists)
    ]


def words_of(options: LoadOptions, names: Iterable[str]) -> list[str]:
    """What a user writes for those of `names` that differ from the defaults."""
    spellings = {each.name: (each.default, spelling) for each, spelling in options_of(LoadOptions)}
    words: list[str] = []
    for name in names:
        value = getattr(options, name)
        default, spelling = spellings[name]
        flag = spelling.flags[0]
        if value is False and default is not False:
            words.append(flag.replace("--", "--no-"))
        elif value != default:
            words += [flag] if value is True else [flag, str(value)]
    return words


def described(kind: type) -> str:
    """The options of `kind` as lines for a docstring."""
    lines = []
    for each, spelling in options_of(kind):
        told = default_text(each.default, spelling)
        unit = "" if spelling.unit in spelling.help else f", in {spelling.unit}"
        text = f"{each.name}: {spelling.help}{unit}{f' ({told})' if told else ''}"
        lines.append(textwrap.fill(text, 92, initial_indent="- ", subsequent_indent="  "))
    return "\n".join(lines)


LoadOptions.__doc__ = f"{inspect.cleandoc(LoadOptions.__doc__ or '')}\n\n{described(LoadOptions)}\n"


@dataclass(frozen=True)
class Card:
    """One of several devices that share a model."""

    number: int
    device: torch.device
    memory: int  # bytes that may be used


@dataclass(frozen=True)
class Share:
    """What one card has of a model that several share."""

    number: int  # of the card
    blocks: range  # decoder layers
    moe_layers: int  # of these
    experts: int
    slots: int
    dense: int  # bytes
    kv_cache: int  # bytes
    workspace: int  # bytes

    def line(self) -> str:
        """As people read it."""
        layers = f"{len(self.blocks)} layer{'s' * (len(self.blocks) > 1)}"
        return (
            f"card {self.number}: {layers}, {self.slots} slots for {self.experts} experts, beside "
            f"{gib(self.dense)} of dense weights and {gib(self.kv_cache)} of KV cache"
        )


@dataclass(frozen=True)
class Fit:
    """What was asked, and what it comes to on this machine: nothing is left to be decided."""

    options: LoadOptions
    device: torch.device  # of inputs and logits; with several cards the first
    dtype: torch.dtype
    slots: int
    staging: int  # rows past the slots, through which a prompt's experts are streamed
    ubatch: int  # tokens of a prompt that go through the model at once
    ram: int  # bytes for experts in host memory
    cards: tuple[Card, ...] = ()  # where there are several
    shares: tuple[Share, ...] = ()  # what each of them has

    @property
    def caching(self) -> tuple[tuple[Card, Share], ...]:
        """The cards that have experts, as a rule all."""
        both = zip(self.cards, self.shares, strict=True)
        return tuple((card, share) for card, share in both if share.experts)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device, each once."""
        return tuple(dict.fromkeys(card.device for card in self.cards)) or (self.device,)
