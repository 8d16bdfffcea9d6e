"""`offload plan`: the memory and speed of a model, told before it is downloaded."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from offload.errors import DONE, BudgetError
from offload.flags import MODEL_HELP, add_options, option, options_from, words_of
from offload.machine.hardware import Hardware, asked_hardware
from offload.model.names import DEMO, SHAPE_FILES, find_known
from offload.options import BITS, HUB, LoadOptions
from offload.pack.asked import begin_loading
from offload.trace.show import open_trace
from offload.units import parse_bytes

if TYPE_CHECKING:
    from offload.plan.plan import Plan
    from offload.plan.target import Target

EXAMPLE = "offload plan mistralai/Mixtral-8x7B-v0.1 --gpu 4090 --ram 64GiB"
SIZES = ("device", "vram", "ram", "context", "ubatch_size", "expert_slots")
MOST_CARDS = 64
_machine = partial(option, group="machine")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `offload plan` alone."""

    gpu: str | None = _machine(
        "--gpu NAME",
        "plan for another machine that has this GPU, like 3060 or 4090; --vram and --ram are then "
        "the sizes of its memory, of which 90% is used",
        unset="this machine",
    )
    gpus: str | None = _machine(
        "--gpus N,..",
        "numbers of the GPUs that share the model, like 0,1; with --gpu, how many such GPUs there "
        "are, like 2",
        unset="one GPU",
    )
    routing: str | None = _machine(
        "--trace FILE",
        "forecast the speed for the routing that --trace recorded in FILE",
        unset="assumed hit rates",
    )
    explain: bool = option(
        "--explain", "show what the figures assume, and which engine they are for", default=False
    )
    output: str = option(
        "-o --output", "format of the output", default="text", choices=("text", "json")
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{MODEL_HELP}; without it, a table of the models that people run",
    )
    add_options(parser, PlanOptions)
    add_options(parser, LoadOptions, SIZES, group="machine")
    add_options(parser, LoadOptions, (*BITS, *HUB))


def run(arguments: argparse.Namespace) -> int:
    """Write the plan. Raises `BudgetError` when nothing fits."""
    asked = options_from(arguments, PlanOptions)
    options = options_from(arguments, LoadOptions)
    named = _named(asked, options)
    if arguments.model is None and asked.routing is not None:
        raise BudgetError("--trace is of one model: name it")
    trace = open_trace(asked.routing) if asked.routing else None
    # RAM may be planned that this machine does not have. Nothing is fetched of a known model.
    is_known = arguments.model is None or find_known(arguments.model, options) is not None
    begin_loading(
        arguments.model or DEMO, replace(options, ram=None), () if is_known else SHAPE_FILES
    )
    from offload.budget.resolve import find_place
    from offload.plan.outline import outline
    from offload.plan.plan import make_plan
    from offload.plan.report import lines, to_json
    from offload.plan.target import named_machine, this_machine

    place = None if named else find_place(options)
    model = outline(arguments.model, options) if arguments.model else None
    target = named_machine(*named, options) if named else this_machine(place or find_place(options))
    if model is None:
        return _survey(target, options, asked.output)
    plan = make_plan(model, target, options, trace)
    command = _command(arguments.model, plan)
    if asked.output == "json":
        print(json.dumps(to_json(plan, command, trace is not None), indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(plan, command, trace is not None, asked.explain)))
    if plan.chosen is None:
        if plan.remedy:
            raise BudgetError(f"nothing fits: plan with {plan.remedy}, which does fit")
        raise BudgetError(f"nothing fits: {plan.rows[-1].refusal}")
    return DONE


def _survey(target: Target, options: LoadOptions, output: str) -> int:
    """Write the table of known models."""
    from offload.plan.report import to_json
    from offload.plan.survey import survey, survey_lines

    plans = survey(target, options)
    if output == "json":
        told = [to_json(plan, _command(known.name, plan), False) for known, plan in plans]
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return DONE
    for line in survey_lines(target, plans):
        print(line, flush=True)
    return DONE


def _named(asked: PlanOptions, options: LoadOptions) -> tuple[Hardware, str] | None:
    """The cards of `--gpu` with a note about them; None for this machine. Raises `BudgetError`."""
    if asked.gpu is None:
        return None
    if options.device is not None:
        raise BudgetError("--device names a device of this machine: leave out --device or --gpu")
    found, note = asked_hardware(asked.gpu, parse_bytes(options.vram))
    parts = (asked.gpus or str(found.cards)).split(",")
    if not all(part.strip().isdecimal() for part in parts) or parts == ["0"]:
        raise BudgetError(f"--gpus {asked.gpus!r} is not a number of GPUs: write it like 2")
    cards = int(parts[0]) if len(parts) == 1 else len(parts)
    if cards > MOST_CARDS:
        raise BudgetError(f"{cards} GPUs: offload plan takes at most {MOST_CARDS}")
    return replace(found, cards=cards), note


def _command(model: str, plan: Plan) -> str:
    """The command that carries `plan` out on the machine for which it was made."""
    options = plan.options
    if not plan.target.here:
        gpus = ",".join(map(str, range(plan.target.cards))) if plan.target.cards > 1 else None
        options = replace(options, device=None, vram=None, ram=None, gpus=gpus)
    settled = options.bits is not None or options.expert_bits is not None
    if plan.chosen is not None and plan.outline.made is None and not settled:
        options = replace(options, expert_bits=plan.chosen.bits.bits)
    first = (*BITS, "expert_slots", "revision")
    rest = ("ubatch_size", "device", "vram", "ram", "gpus", "local_files_only", "trust_remote_code")
    words = [*words_of(options, first), "-c", str(options.context), *words_of(options, rest)]
    return shlex.join(["offload", "chat", model, *words])
