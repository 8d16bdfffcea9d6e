"""Flags that several commands share.

Knows: their names, defaults and help. Does not know: what is done with them (`cli.model`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.values import positive, threads


def add_model_flags(parser: argparse.ArgumentParser, context: int = 4096) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, .gguf file, pack, hub id, or demo"
    )
    group = parser.add_argument_group("memory")
    add_budget_flags(group, context)
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
        help="load what the router will probably want next (while it pays; where a device plans, "
        "on)",
    )
    group.add_argument(
        "--predictor",
        default="router",
        metavar="NAME",
        help="who guesses that: router, previous, transitions, union (router)",
    )
    group.add_argument(
        "--layers-ahead", type=positive, default=1, metavar="N", help="1 to 3 layers (1)"
    )
    group.add_argument(
        "--engine",
        default="auto",
        metavar="NAME",
        help="who plans a token's steps: host, device, auto (auto: a CUDA device where it can)",
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
    group.add_argument("-t", "--threads", type=threads, metavar="N", help="CPU threads")
    group.add_argument("--pack-dir", metavar="DIR", help="where packs are kept")
    add_recipe_flags(parser)
    add_source_flags(parser)


def add_budget_flags(group: argparse._ArgumentGroup, context: int = 4096) -> None:
    group.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1 or cpu (cuda if there is one)"
    )
    group.add_argument(
        "--gpus", metavar="N,..", help="cards that share the model, like 0,1 (one card)"
    )
    group.add_argument(
        "--vram",
        metavar="SIZE",
        help="GPU memory to use, like 20GiB, of each card or 20GiB,10GiB (90%% of what is free)",
    )
    group.add_argument(
        "--ram", metavar="SIZE", help="RAM to use, like 48GiB (90%% of what is free)"
    )
    group.add_argument(
        "-c",
        "--ctx-size",
        type=positive,
        default=context,
        metavar="N",
        help=f"context ({context})",
    )
    group.add_argument(
        "-ub",
        "--ubatch-size",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens of a prompt that are read at once (2048)",
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
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


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--local-files-only", action="store_true", help="do not ask the hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
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


def add_window_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="new tokens a window of --ctx-size, the others are context (half)",
    )


def add_timeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="write compute and copies as a JSON file for ui.perfetto.dev",
    )


def add_trace_file(parser: argparse.ArgumentParser, help_text: str) -> None:
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
