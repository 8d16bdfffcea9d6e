"""`offload plan`: what a model would take and how fast it would be, before it is fetched.

Knows: its flags, and the command that carries a plan out. Does not know: the arithmetic
(`offload.plan`).
"""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from cli.commands import Commands
from cli.exit_codes import DONE
from cli.flags import add_recipe_flags, add_source_flags
from cli.values import positive
from offload.errors import BudgetError

UBATCH = 2048  # as for other commands

if TYPE_CHECKING:
    from offload.plan.plan import Plan
    from offload.plan.target import Target


def add(commands: Commands) -> None:
    """The command and its flags."""
    plan = commands.add(
        "plan",
        run,
        "what fits, which bits, how fast: from config and index alone",
        'offload plan mistralai/Mixtral-8x7B-v0.1 --gpu "RTX 4090" --ram 64GiB',
    )
    plan.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, .gguf file, pack, hub id, or demo"
    )
    group = plan.add_argument_group("machine")
    group.add_argument(
        "--gpu",
        metavar="NAME",
        help="a card, like 3060 or 4090 (what is here); then --vram and "
        "--ram are what there is, of which 90%% is used",
    )
    group.add_argument("--gpus", type=positive, metavar="N", help="number of cards (1)")
    group.add_argument("--device", metavar="NAME", help="of this machine: cuda, cuda:1 or cpu")
    group.add_argument("--vram", metavar="SIZE", help="GPU memory of a card, like 20GiB")
    group.add_argument("--ram", metavar="SIZE", help="RAM, like 48GiB (90%% of what is free)")
    group.add_argument(
        "-c", "--ctx-size", type=positive, default=4096, metavar="N", help="context (4096)"
    )
    group.add_argument(
        "-ub",
        "--ubatch-size",
        type=positive,
        default=UBATCH,
        metavar="N",
        help=f"tokens of a prompt that are read at once ({UBATCH})",
    )
    group.add_argument(
        "--expert-slots", metavar="N", help="resident experts, a number or a share like 25%%"
    )
    group.add_argument(
        "--trace", metavar="FILE", help="predict for routing recorded with --trace, not for made-up"
    )
    add_recipe_flags(plan)
    add_source_flags(plan)
    plan.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="format (text)"
    )


def run(arguments: argparse.Namespace) -> int:
    from offload.pack.recipe import AskedBits
    from offload.plan.outline import outline
    from offload.plan.plan import Question, make_plan
    from offload.plan.report import lines, to_json
    from offload.trace.show import open_trace

    bits = AskedBits(
        arguments.bits, arguments.expert_bits, arguments.dense_bits, arguments.group_size
    )
    trace = open_trace(arguments.trace) if arguments.trace else None
    model = outline(
        arguments.model,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        trust_remote_code=arguments.trust_remote_code,
    )
    question = Question(
        bits, arguments.expert_slots, arguments.ctx_size, arguments.ubatch_size, trace
    )
    plan = make_plan(model, _target(arguments), question)
    command = _command(arguments, plan)
    if arguments.output == "json":
        print(json.dumps(to_json(plan, command, trace is not None), indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(plan, command, trace is not None)))
    if plan.chosen is None:
        if plan.remedy:
            raise BudgetError(f"nothing fits: plan with {plan.remedy}, that does")
        raise BudgetError(f"nothing fits: {plan.rows[-1].refusal}")
    return DONE


def _target(arguments: argparse.Namespace) -> Target:
    from offload.plan.target import named_machine, this_machine

    if arguments.gpu is None:
        return this_machine(arguments.device, arguments.vram, arguments.ram, arguments.gpus)
    if arguments.device is not None:
        raise BudgetError("--device is of this machine: leave it out, or --gpu")
    return named_machine(arguments.gpu, arguments.vram, arguments.ram, arguments.gpus)


def _command(arguments: argparse.Namespace, plan: Plan) -> str:
    """What carries `plan` out, on the machine it is for."""
    words = ["offload", "chat", arguments.model]
    for name in ("bits", "expert_bits", "dense_bits", "group_size", "expert_slots", "revision"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    settled = arguments.bits is not None or arguments.expert_bits is not None
    if plan.chosen is not None and plan.outline.made is None and not settled:
        words += ["--expert-bits", str(plan.chosen.bits.bits)]
    words += ["-c", str(arguments.ctx_size)]
    if arguments.ubatch_size != UBATCH:
        words += ["-ub", str(arguments.ubatch_size)]
    if plan.target.here:
        for name in ("device", "vram", "ram"):
            value = getattr(arguments, name)
            if value is not None:
                words += [f"--{name}", value]
    if plan.target.cards > 1:
        words += ["--gpus", ",".join(map(str, range(plan.target.cards)))]
    for name in ("local_files_only", "trust_remote_code"):
        if getattr(arguments, name):
            words.append(f"--{name.replace('_', '-')}")
    return shlex.join(words)
