"""The `offload` command.

Knows: flags, what goes to stdout and what to stderr, exit codes. Does not know: tensors. What needs
torch is imported by the command that uses it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from offload.errors import OffloadError, one_line, shortened
from offload.files import read_text, user_path
from offload.streams import check_streams, give_up_unwritable
from offload.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from offload.bench import Result
    from offload.sampling import Sampling

MOST = 2**31 - 1  # of tokens and repetitions
MOST_THREADS = 1024  # OpenMP ends the process when the system refuses it a thread
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    debug = False
    try:
        check_streams()
        try:
            arguments = build_parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from there
        if arguments.command is None:
            build_parser().print_help(sys.stderr)
            return USAGE
        debug = arguments.debug
        logging.basicConfig(format="offload: %(message)s", level=logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        result: int = arguments.run(arguments)
        sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        give_up_unwritable()
        return DONE
    except Exception as error:
        text = one_line(error)
        if isinstance(error, OSError) and sys.stdout in give_up_unwritable():
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(
            USAGE,
            f"offload: error: {shortened(message)} "
            f"(offload {self.prog.partition(' ')[2]} --help)\n",
        )


def build_parser() -> argparse.ArgumentParser:
    """Every command and flag."""
    parser = _Parser(
        prog="offload", description="Run Mixture-of-Experts models whose experts do not fit."
    )
    parser.add_argument("--version", action="version", version=f"offload {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], help_text: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
        return command

    chat = add("chat", _chat, "talk to a model", "offload chat demo --expert-slots 25%")
    _add_model_flags(chat)
    _add_sampling_flags(chat)
    chat.add_argument(
        "-st", "--single-turn", action="store_true", help="answer once (-p) and leave"
    )

    generate = add(
        "generate",
        _generate,
        "answer one prompt on stdout",
        'offload generate demo -p "Hi" > a.txt',
    )
    _add_model_flags(generate)
    _add_sampling_flags(generate)
    generate.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, no chat template"
    )

    bench = add("bench", _bench, "measure tokens/second", "offload bench demo -p 512 -n 128 -r 5")
    _add_model_flags(bench)
    bench.add_argument(
        "-p", "--n-prompt", type=_count, default=512, metavar="N", help="prefill tokens (512)"
    )
    bench.add_argument(
        "-n", "--n-gen", type=_count, default=128, metavar="N", help="decoded tokens (128)"
    )
    bench.add_argument(
        "-pg", type=_pair, metavar="P,N", help="also prefill P and decode N in one test"
    )
    bench.add_argument(
        "-d", "--n-depth", type=_count, default=0, metavar="N", help="tokens before the test"
    )
    bench.add_argument(
        "-r", "--repetitions", type=_positive, default=5, metavar="N", help="of each test (5)"
    )
    bench.add_argument("-o", "--output", choices=("md", "json"), default="md", help="format (md)")
    bench.add_argument("--no-warmup", action="store_true", help="time the first run too")
    bench.add_argument(
        "--random", action="store_true", help="random tokens, as llama-bench, not real text"
    )

    _add_timeline(generate)
    _add_timeline(bench)

    quantize = add(
        "quantize", _quantize, "make a pack", "offload quantize demo ./demo-q4 --bits q4"
    )
    quantize.add_argument(
        "model", metavar="SRC", help="checkpoint folder, .gguf file, hub id, or demo"
    )
    quantize.add_argument("destination", metavar="DST", type=Path, help="folder of the pack, new")
    _add_recipe_flags(quantize)
    _add_budget_flags(quantize.add_argument_group("what --bits fit must fit in"))
    _add_source_flags(quantize)
    _add_quality_commands(add)

    trace = add("trace", _usage, "look at a recorded run", "offload trace show run.trace")
    trace.set_defaults(command=None)
    _add_trace_commands(trace)
    return parser


def _add_trace_commands(parser: argparse.ArgumentParser) -> None:
    """`show`, `replay`, `simulate` and `plot`."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    show = commands.add_parser("show", help="its text, its routing, layer by layer")
    show.set_defaults(run=_trace_show)
    replay = commands.add_parser(
        "replay",
        help="what other caches would have done",
        epilog="example: offload trace replay run.trace --policy lru,lfru --expert-slots 10%,25%",
    )
    replay.set_defaults(run=_trace_replay)
    replay.add_argument(
        "--policy", type=_names, default=[], metavar="NAMES", help="as for chat, or belady"
    )
    replay.add_argument("--allocation", type=_names, default=["shared"], metavar="NAMES")
    replay.add_argument(
        "--expert-slots", type=_names, default=[], metavar="N,..", help="numbers or shares"
    )
    replay.add_argument(
        "--lookahead",
        type=_names,
        default=["live"],
        metavar="NAMES",
        help="none, live (as recorded), router, previous, transitions, union (live)",
    )
    replay.add_argument(
        "--layers-ahead", type=_positive, default=1, metavar="N", help="1 to 3 layers (1)"
    )
    replay.add_argument("--per-layer", action="store_true", help="each layer's hits and guesses")
    for command in (show, replay):
        command.add_argument("trace", metavar="FILE", help="what --trace wrote, or synthetic:MODEL")
        command.add_argument(
            "--debug", action="store_true", help="show a traceback when something fails"
        )
    _add_simulate(commands)
    _add_plot(commands)


def _add_simulate(actions: argparse._SubParsersAction[_Parser]) -> None:
    help_text = "predict tokens/second on a machine"
    simulate = actions.add_parser(
        "simulate",
        help=help_text,
        description=help_text,
        epilog='example: offload trace simulate chat.trace --hardware "RTX 4090" '
        "--expert-slots 25%",
    )
    simulate.set_defaults(run=_simulate)
    _add_trace_file(simulate, "recorded with --trace, or synthetic:MODEL")
    simulate.add_argument(
        "--hardware",
        default="here",
        metavar="NAME",
        help="a card, like 3060, 4090, 2x4090, a100; here measures this machine (here)",
    )
    simulate.add_argument(
        "--software", default="host-planned", metavar="NAME", help="host-planned or device-planned"
    )
    simulate.add_argument(
        "--lookahead",
        default="router",
        metavar="NAME",
        help="none, live (as recorded), router, previous, transitions, union (router)",
    )
    simulate.add_argument(
        "--dense", metavar="SIZE", help="dense weights a token reads (what the trace says)"
    )
    simulate.add_argument(
        "--ram", metavar="SIZE", help="RAM for experts; the rest is on disk (all)"
    )
    _add_timeline(simulate)


def _add_plot(actions: argparse._SubParsersAction[_Parser]) -> None:
    help_text = "experts by layers: resident, hits, misses"
    plot = actions.add_parser(
        "plot",
        help=help_text,
        description=help_text,
        epilog="example: offload trace plot chat.trace --expert-slots 25% -o experts.png",
    )
    plot.set_defaults(run=_plot)
    _add_trace_file(plot, "recorded with --trace, or synthetic:MODEL")
    plot.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw to a file instead")


def _add_trace_file(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback when something fails"
    )
    parser.add_argument("trace", metavar="FILE", help=help_text)
    parser.add_argument(
        "--expert-slots",
        default="25%",
        metavar="N",
        help="resident experts, a number or a share (25%%)",
    )
    parser.add_argument("--policy", default="lfru", metavar="NAME", help="who is evicted (lfru)")
    parser.add_argument(
        "--allocation", default="shared", metavar="NAME", help="how layers share slots (shared)"
    )


def _add_timeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="write compute and copies as a JSON file for ui.perfetto.dev",
    )


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantisation")
    group.add_argument(
        "--bits",
        metavar="RULES",
        help="q8, q6, q5, q4, q3, q2, mixtral-offloading, fit (the most that is all resident), or "
        "rules PART=BITS or layers.A-B.PART=BITS with commas between, a later one wins; PART: "
        "experts, attention, shared, mlp, head, embeddings, or dense for all but the first and "
        "last; BITS: 2, 3, 4, 5, 6, 8 or 16, with group size and 8-bit scales like 4g32, 2g16s8",
    )
    group.add_argument(
        "--expert-bits", type=int, metavar="N", help="2, 3, 4, 5, 6, 8, or 16 = as stored (4)"
    )
    group.add_argument("--dense-bits", type=int, metavar="N", help="the same for the rest (16)")
    group.add_argument(
        "--group-size", type=int, metavar="N", help="weights sharing a scale: 16 to 256 (64)"
    )


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--local-files-only", action="store_true", help="do not ask the hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def _add_budget_flags(group: argparse._ArgumentGroup, context: int = 4096) -> None:
    group.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1 or cpu (cuda if there is one)"
    )
    group.add_argument(
        "--vram", metavar="SIZE", help="GPU memory to use, like 20GiB (90%% of what is free)"
    )
    group.add_argument(
        "--ram", metavar="SIZE", help="RAM to use, like 48GiB (90%% of what is free)"
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=_positive,
        default=context,
        metavar="N",
        help=f"context ({context})",
    )


def _add_model_flags(parser: argparse.ArgumentParser, context: int = 4096) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, .gguf file, pack, hub id, or demo"
    )
    group = parser.add_argument_group("memory")
    _add_budget_flags(group, context)
    group.add_argument(
        "--expert-slots", metavar="N", help="resident experts, a number or a share like 25%%"
    )
    group.add_argument(
        "--policy",
        default="lfru",
        metavar="NAME",
        help="who is evicted: lru, slru, lfru, lfu, fifo (lfru)",
    )
    group.add_argument(
        "--allocation",
        default="shared",
        metavar="NAME",
        help="which layer gives a slot: shared, global, quota (shared)",
    )
    group.add_argument(
        "--lookahead",
        action=argparse.BooleanOptionalAction,
        help="load what the router will probably want next (while it pays)",
    )
    group.add_argument(
        "--predictor",
        default="router",
        metavar="NAME",
        help="who guesses that: router, previous, transitions, union (router)",
    )
    group.add_argument(
        "--layers-ahead", type=_positive, default=1, metavar="N", help="1 to 3 layers (1)"
    )
    group.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load first what was hot in the run before (on)",
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="record what the routers choose (offload trace)"
    )
    group.add_argument("-t", "--threads", type=_threads, metavar="N", help="CPU threads")
    group.add_argument("--pack-dir", metavar="DIR", help="where packs are kept")
    _add_recipe_flags(parser)
    _add_source_flags(parser)


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt and sampling")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file"
    )
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", default="", help="system prompt")
    group.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=-1,
        metavar="N",
        help="most new tokens (-1: no limit)",
    )
    group.add_argument("-s", "--seed", type=int, metavar="N", help="of the sampling (random)")
    group.add_argument(
        "--temp", type=float, metavar="X", help="temperature; 0 is greedy (the model's, else 0.8)"
    )
    group.add_argument("--top-k", type=int, metavar="N", help="0 is off (the model's, else 40)")
    group.add_argument("--top-p", type=float, metavar="X", help="(the model's, else 0.95)")
    group.add_argument("--min-p", type=float, metavar="X", help="(the model's, else 0.05)")
    group.add_argument(
        "--repeat-penalty", type=float, metavar="X", help="1 is off (the model's, else 1)"
    )
    group.add_argument(
        "-r", "--reverse-prompt", action="append", default=[], metavar="TEXT", help="stop string"
    )
    group.add_argument("--verbose", action="store_true", help="all timings after an answer")
    group.add_argument(
        "--show-timings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="timings after an answer",
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def _between(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
    return value


def _count(text: str) -> int:
    return _between(text, 0, MOST)


def _positive(text: str) -> int:
    return _between(text, 1, MOST)


def _threads(text: str) -> int:
    return _between(text, 1, MOST_THREADS)


def _pair(text: str) -> tuple[int, int]:
    prompt, _, generated = text.partition(",")
    return _positive(prompt), _positive(generated)


def _load(
    arguments: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, float]:
    """The model, its tokenizer, and the seconds it took."""
    begin = time.perf_counter()
    if "temp" in arguments:
        _sampling(arguments, None)  # a wrong value is told before the model is loaded
        if arguments.n_predict == 0:
            raise OffloadError("--n-predict is 0: give at least 1, or -1 for no limit")
    from offload.loading import load
    from offload.planning import set_threads

    if arguments.threads:
        set_threads(arguments.threads)
    model, tokenizer = load(
        arguments.model,
        device=arguments.device,
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
        trace=arguments.trace,
        context=arguments.ctx_size,
        pack_dir=arguments.pack_dir,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.model == "demo":
        from offload.demo import NOTE

        print(NOTE, file=sys.stderr)
    return model, tokenizer, time.perf_counter() - begin


def _sampling(arguments: argparse.Namespace, model: PreTrainedModel | None) -> Sampling:
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


def _prompt(arguments: argparse.Namespace) -> str | None:
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


def _generate(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    if prompt is None and not sys.stdin.isatty():
        prompt = read_text(sys.stdin, "the piped prompt")
    if not prompt:
        raise OffloadError("there is no prompt: give one with -p, -f or a pipe")
    model, tokenizer, load_seconds = _load(arguments)
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
    sampling = _sampling(arguments, model)
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


def _chat(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    if arguments.single_turn and prompt is None:
        raise OffloadError("--single-turn needs a prompt: give one with -p or -f")
    model, tokenizer, load_seconds = _load(arguments)
    from offload.chat import Chat, converse
    from offload.handle import offload_of
    from offload.terminal import reader

    if tokenizer is None or not tokenizer.chat_template:
        raise OffloadError(f"{arguments.model} has no chat template: use offload generate --raw")

    def write(text: str) -> None:
        print(text, end="", flush=True)

    chat = Chat(
        model,
        tokenizer,
        _sampling(arguments, model),
        write,
        system=arguments.system_prompt,
        max_new_tokens=None if arguments.n_predict < 0 else arguments.n_predict,
        stop_strings=tuple(arguments.reverse_prompt),
        timings=arguments.show_timings,
        verbose=arguments.verbose,
        load_seconds=load_seconds,
        debug=arguments.debug,
    )
    stats = offload_of(model).stats()
    print(
        f"{stats.slots} of {stats.total_experts} experts resident; /? lists the commands, /bye "
        f"leaves",
        file=sys.stderr,
    )
    with contextlib.closing(offload_of(model)):
        if prompt is not None:
            chat.say(prompt)
        if not arguments.single_turn:
            converse(chat, reader())
    return DONE


def _bench(arguments: argparse.Namespace) -> int:
    model, tokenizer, _ = _load(arguments)
    from offload.bench import Test, run
    from offload.handle import offload_of
    from offload.report import bits_name
    from offload.timeline import recording

    depth = arguments.n_depth
    tests = [Test(arguments.n_prompt, 0, depth)] if arguments.n_prompt else []
    tests += [Test(0, arguments.n_gen, depth)] if arguments.n_gen else []
    tests += [Test(arguments.pg[0], arguments.pg[1], depth)] if arguments.pg else []
    if not tests:
        raise OffloadError("there is nothing to measure: -p, -n and -pg are all 0")
    offload = offload_of(model)
    common = {
        "build": __version__,
        "cpu": platform.processor() or platform.machine(),
        "backend": offload.options.device.type.upper(),
        "model": offload.pack.info.source,
        "model_type": model.config.model_type,
        "model_size": offload.pack.total_bytes,
        "model_n_params": offload.pack.parameters,
        "bits": bits_name(offload.pack.info),
        "policy": offload.options.policy,
        "lookahead": offload.options.lookahead,
        "text": "random" if arguments.random else "real",
    }
    results = run(
        model,
        tokenizer,
        tests,
        repetitions=arguments.repetitions,
        warmup=not arguments.no_warmup,
        random=arguments.random,
    )
    with contextlib.closing(offload), recording(model, arguments.timeline):
        if arguments.output == "json":
            print(json.dumps([{**common, **result.to_json()} for result in results], indent=2))
        else:
            _print_table(common, results)
    return DONE


COLUMNS = "model size params backend test t/s slots resident_% hit_% MiB/token link_%"


def _print_table(common: dict[str, Any], results: Iterator[Result]) -> None:
    names = [name.replace("_", " ") for name in COLUMNS.split()]
    print(f"| {' | '.join(names)} |")
    print(f"| {' | '.join('---' if i in (0, 3) else '---:' for i in range(len(names)))} |")
    for result in results:
        print(f"| {' | '.join(_row(common, result))} |", flush=True)


def _row(common: dict[str, Any], result: Result) -> list[str]:
    experts = result.experts
    return [
        f"{common['model']} {common['bits']}",
        f"{common['model_size'] / 2**30:.2f} GiB",
        f"{common['model_n_params'] / 1e9:.2f} B",
        common["backend"],
        result.test.name,
        f"{result.avg_ts:.2f} ± {result.stddev_ts:.2f}",
        str(experts.slots),
        f"{experts.slots / experts.total_experts:.0%}",
        f"{experts.counts.hit_rate:.1%}",
        f"{experts.mib_per_token:.1f}",
        f"{result.link_share:.0%}",
    ]


def _usage(arguments: argparse.Namespace) -> int:
    return USAGE


def _trace_show(arguments: argparse.Namespace) -> int:
    from offload.traces import show

    for line in show(arguments.trace):
        print(line)
    return DONE


def _trace_replay(arguments: argparse.Namespace) -> int:
    from offload.traces import replays

    lines = replays(
        arguments.trace,
        arguments.policy,
        arguments.allocation,
        arguments.expert_slots,
        arguments.lookahead,
        arguments.layers_ahead,
        per_layer=arguments.per_layer,
    )
    for line in lines:
        print(line, flush=True)
    return DONE


def _simulate(arguments: argparse.Namespace) -> int:
    from offload.simulation import Question, answer

    question = Question(
        arguments.trace,
        arguments.hardware,
        arguments.expert_slots,
        arguments.policy,
        arguments.allocation,
        arguments.software,
        arguments.lookahead,
        arguments.dense,
        arguments.ram,
        arguments.timeline,
    )
    print("\n".join(answer(question)))
    return DONE


def _plot(arguments: argparse.Namespace) -> int:
    from offload.picture import plot

    drawn = plot(
        arguments.trace,
        arguments.expert_slots,
        arguments.policy,
        arguments.allocation,
        arguments.output,
    )
    if drawn:
        print(drawn)
    return DONE


def _quantize(arguments: argparse.Namespace) -> int:
    from offload.budget import Memory
    from offload.packs import find_or_make_pack
    from offload.planning import Planner, find_device
    from offload.recipe import AskedBits
    from offload.report import pack_line

    destination = user_path(arguments.destination)
    if destination.name in ("", ".."):
        raise OffloadError(f"DST is {destination}: give the name of a new folder")
    asked = AskedBits(
        arguments.bits, arguments.expert_bits, arguments.dense_bits, arguments.group_size
    )
    device = find_device(arguments.device)
    memory = Memory.of(device, arguments.vram, arguments.ram)
    path = find_or_make_pack(
        arguments.model,
        asked.recipe(),
        device=device,
        plan=Planner(device, memory, context=arguments.ctx_size) if asked.fit else None,
        destination=destination,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(pack_line(path), file=sys.stderr)
    print(path)
    return DONE


def _add_quality_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`ppl` and `check`."""
    ppl = add("ppl", _ppl, "perplexity on a text", "offload ppl demo -f book.txt")
    _add_model_flags(ppl, context=512)
    ppl.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="the text, UTF-8 (else a piped stdin)"
    )
    _add_window_flags(ppl)
    ppl.add_argument("--json", action="store_true", help="write JSON instead of the line")

    check = add(
        "check",
        _check,
        "how far a model is from a reference: KL divergence, top-1 agreement, perplexity",
        "offload check demo --bits q4 --against demo --save-baseline demo-q4.json",
    )
    _add_model_flags(check, context=512)
    group = check.add_argument_group("comparison")
    group.add_argument(
        "--against",
        required=True,
        metavar="REFERENCE",
        help="checkpoint (run at 16 bits, for which a pack as large as it is written), pack, hub "
        "id, or demo",
    )
    group.add_argument(
        "--plain", action="store_true", help="run the reference by transformers alone, in memory"
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="texts, each under a line `--- NAME` (prose, code, maths, dialogue, Hebrew)",
    )
    group.add_argument(
        "--baseline", type=Path, metavar="FILE", help="fail when a figure is worse than it allows"
    )
    group.add_argument(
        "--save-baseline", type=Path, metavar="FILE", help="write the figures for --baseline"
    )
    _add_window_flags(check)
    check.add_argument("--json", action="store_true", help="write JSON instead of a table")


def _add_window_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride",
        type=_positive,
        metavar="N",
        help="new tokens a window of --ctx-size, the others are context (half)",
    )


def _text(file: Path | None) -> str:
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


def _ppl(arguments: argparse.Namespace) -> int:
    text = _text(arguments.file)
    model, tokenizer, _ = _load(arguments)
    from offload.handle import offload_of
    from offload.progress import Ticker
    from offload.quality.perplexity import measure_perplexity
    from offload.quality.scoring import Sliding, encode_text
    from offload.quality.subject import subject_of

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
            "model": subject_of(model, arguments.model).to_json(),
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(result)
    print(offload_of(model).stats().line(), file=sys.stderr)
    offload_of(model).close()
    return DONE


def _check(arguments: argparse.Namespace) -> int:
    from offload.progress import Ticker
    from offload.quality.baseline import read_baseline, save_baseline
    from offload.quality.check import check, reference_bits
    from offload.quality.comparison import table
    from offload.quality.prompts import read_prompts
    from offload.quality.recording import Source
    from offload.quality.scoring import Sliding
    from offload.quality.tolerance import TOLERANCES

    prompts = read_prompts(arguments.prompts)
    # A file that cannot be used is told before two models are run.
    baseline = read_baseline(arguments.baseline) if arguments.baseline else None
    if arguments.save_baseline and not arguments.save_baseline.resolve().parent.is_dir():
        raise OffloadError(f"there is no folder for {arguments.save_baseline}: make it first")
    other = {
        "model": arguments.against,
        "revision": arguments.revision if arguments.against == arguments.model else None,
        "bits": reference_bits(arguments.against),
        "expert_bits": None,
        "dense_bits": None,
        "group_size": None,
    }
    against = argparse.Namespace(**{**vars(arguments), **other})

    def plain() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from offload.quality.plain import load_plain

        return load_plain(
            against.model,
            device=against.device,
            revision=against.revision,
            local_files_only=against.local_files_only,
            trust_remote_code=against.trust_remote_code,
        )

    with Ticker("check") as ticker:
        result = check(
            Source(arguments.model, lambda: _load(arguments)[:2]),
            Source(against.model, plain if arguments.plain else lambda: _load(against)[:2]),
            prompts,
            Sliding.asked(arguments.ctx_size, arguments.stride),
            ticker,
        )
    changes = baseline.worse(result) if baseline else ()
    if baseline and baseline.settings != result.model.settings:
        print(f"the baseline was measured with {baseline.settings}", file=sys.stderr)
    if arguments.json:
        worse = None if baseline is None else [asdict(change) for change in changes]
        print(json.dumps({**result.to_json(), "worse": worse}, indent=2, ensure_ascii=False))
    else:
        print(table([*result.named(), ("all", result.overall)]))
    if changes:
        what = "; ".join(map(str, changes))
        raise OffloadError(f"worse than {arguments.baseline} allows: {what}")
    if baseline:
        print(f"no worse than {arguments.baseline} allows", file=sys.stderr)
    if arguments.save_baseline:
        save_baseline(
            arguments.save_baseline, result, baseline.tolerances if baseline else TOLERANCES
        )
        print(f"figures saved in {arguments.save_baseline}", file=sys.stderr)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
