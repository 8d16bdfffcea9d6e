"""A plan as lines for a terminal, or as JSON."""

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from offload.files import existing, offload_home
from offload.plan.forecast import CPU_PASSES, LOCAL, RATES, SLOW_PYTHON, UNIFORM, USUAL, hit_rate
from offload.plan.plan import GOOD_BITS, Plan, PlanRow
from offload.plan.target import Target
from offload.units import gib

COLUMNS = ("bits", "experts", "pack", "resident", "rest in", "tok/s", "range", "limit")


def lines(plan: Plan, command: str, traced: bool, explain: bool = False) -> Iterator[str]:
    """The plan for a terminal of 80 columns.

    `command` carries it out; `traced`: the forecast is for a recorded trace. Without `explain`, all
    notes but the first warning become one line.
    """
    yield from _heading(plan)
    yield ""
    yield from _table(plan)
    if plan.chosen is not None:
        yield ""
        yield from _sizes(plan, plan.chosen)
        yield ""
        yield f"Run:  {command}"
    yield ""
    width = min(shutil.get_terminal_size().columns, 100)
    shown = [*warnings(plan), *notes(plan, traced)] if explain else [*_in_short(plan, traced)]
    for note in shown:
        yield from textwrap.wrap(f"- {note}", width, subsequent_indent="  ")


def _heading(plan: Plan) -> Iterator[str]:
    outline, target = plan.outline, plan.target
    info = plan.rows[0].info
    counts = sorted({layer.num_experts for layer in info.layers})
    yield (
        f"{outline.name} ({outline.config.model_type}): {info.parameters / 1e9:.1f} B weights, "
        f"{outline.active_parameters(info) / 1e9:.1f} B active per token"
    )
    yield (
        f"{len(info.layers)} layers of {'/'.join(map(str, counts))} experts, of which a token uses "
        f"{outline.top_k}"
    )
    yield from machine_lines(target)


def machine_lines(target: Target) -> Iterator[str]:
    """The machine's memory and rates."""
    machine, memory = target.hardware, target.memory
    if target.device.type == "cpu":
        usable = f"{gib(memory.device)} of RAM"
        rates = f"RAM {machine.memory_gb_per_s:.1f} GB/s, copies {machine.link_gb_per_s:.1f} GB/s"
    else:
        sizes = list(dict.fromkeys(map(gib, target.card_bytes)))
        each = " each" if target.cards > 1 and len(sizes) == 1 else ""
        usable = f"{' + '.join(sizes)} of VRAM{each} and {gib(memory.ram)} of RAM"
        rates = f"VRAM {machine.memory_gb_per_s:.0f} GB/s, link {machine.link_gb_per_s:.1f} GB/s"
    yield f"on {target.name}: {usable} to use"
    yield f"{rates}, disk {machine.disk_gb_per_s:.1f} GB/s"


def _table(plan: Plan) -> Iterator[str]:
    cells = [list(COLUMNS), *(_cells(row, row is plan.chosen) for row in plan.rows)]
    widths = [max(len(row[at]) for row in cells if len(row) > at) for at in range(len(COLUMNS))]
    for row in cells:
        texts = [
            text.ljust(width) if name in ("rest in", "limit") else text.rjust(width)
            for name, text, width in zip(COLUMNS, row, widths, strict=False)
        ]
        yield " ".join(" " + text for text in texts).rstrip()


def _cells(row: PlanRow, chosen: bool) -> list[str]:
    bits = f"{'>' if chosen else ''}{bits_text(row)}"
    cells = [bits, gib(row.info.expert_bytes, 1), gib(row.pack_bytes, 1)]
    if row.forecast is None:
        return [*cells, "does not fit"]
    return [
        *cells,
        f"{row.slots}/{row.info.total_experts} {row.slots / row.info.total_experts:>4.0%}",
        rest_text(row),
        speed_text(row.forecast.usual),
        f"{speed_text(row.forecast.low)}-{speed_text(row.forecast.high)}",
        row.forecast.limited_by,
    ]


def rest_text(row: PlanRow) -> str:
    """Where experts without a slot are, or how many of their loads wait for the disk."""
    if row.resident:
        return "-"
    if row.rest == "RAM":
        return "RAM"
    return f"{row.disk_share:.0%} disk" if row.disk_share >= 0.005 else "<1% disk"


def bits_text(row: PlanRow) -> str:
    """The bits of most experts, with the group size unless it is the usual one."""
    return str(row.bits).removesuffix("g64")


def speed_text(tokens_per_s: float) -> str:
    """A speed with two digits."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 99.5 else f"{tokens_per_s:.2g}"


def _sizes(plan: Plan, row: PlanRow) -> Iterator[str]:
    info, budget, cards = row.info, row.budget, plan.target.cards
    device = "RAM" if plan.target.device.type == "cpu" else "VRAM"
    each = " at most per GPU" if cards > 1 else ""
    rest = info.total_experts - row.slots
    where = f"{row.slots} resident" + (f", {rest} in {_source(row)}" if rest else "")
    yield f"At {row.recipe.name}:"
    yield f"  dense      {gib(budget.dense):>10}{each} in {device}"
    twice = ", with one of fixed size for CUDA graphs" * row.fixed_cache
    yield f"  KV cache   {gib(budget.kv_cache):>10}{each}, {plan.options.context} tokens{twice}"
    yield f"  workspace  {gib(budget.workspace):>10}{each}"
    if row.chunk < min(plan.options.ubatch_size, plan.options.context):
        yield f"  prompts    {row.chunk} tokens at once: more take too much memory"
    download = plan.outline.download_bytes
    made = f", made from {gib(download)} of weights" if download else ""
    if row.staging_bytes:
        yield f"  staging    {gib(row.staging_bytes):>10}{each}, prompts are streamed through it"
    yield f"  experts    {gib(info.expert_bytes):>10}, {gib(info.slot_bytes)} each: {where}"
    yield f"  pack       {gib(row.pack_bytes):>10} on the disk{made}"
    for share in row.shares:
        beside = f"dense {gib(share.dense)}, KV {gib(share.kv_cache)}"
        held = f"{share.slots}/{share.experts} experts"
        yield f"  GPU {share.number:<6} {len(share.blocks):>4} layers, {held}, {beside}"


def _source(row: PlanRow) -> str:
    if row.rest == "RAM":
        return "RAM"
    return "RAM or on disk" if row.disk_share < 1 else "files on disk"


def _in_short(plan: Plan, traced: bool) -> Iterator[str]:
    """The first warning, and where the other notes are."""
    yield from list(warnings(plan))[:1]
    if not any(row.forecast for row in plan.rows):
        return
    what = "tok/s is for the routing of the trace" if traced else "tok/s is an estimate"
    yield f"{what}, not a measurement: add --explain to see what it assumes"


def warnings(plan: Plan) -> Iterator[str]:
    """What a reader should act upon, a sentence each, the most important first."""
    if plan.target.here and plan.chosen is not None and plan.outline.made is None:
        free = shutil.disk_usage(existing(offload_home())).free
        if plan.chosen.pack_bytes > free:
            yield f"{offload_home()} has {gib(free)} free: the pack needs more (--pack-dir)"
    if plan.target.stand_in:
        yield plan.target.stand_in
    if plan.chosen is not None and plan.chosen.bits.bits < GOOD_BITS:
        yield (
            f"fewer than {GOOD_BITS} bits cost much quality: measure it with offload check, or "
            f"choose the slower row with --expert-bits {GOOD_BITS}"
        )


def notes(plan: Plan, traced: bool) -> Iterator[str]:
    """What a reader must know to judge the figures, a sentence each."""
    yield from _assumptions(plan, traced)
    yield from _engine(plan)
    if any(row.rest == "disk" for row in plan.rows):
        yield "rest in: share of expert loads that come from disk instead of RAM"
    yield from plan.target.notes
    if plan.outline.from_config and plan.outline.made is None:
        yield "sizes follow from config.json: the weights are not here"
    if plan.outline.made is not None:
        yield "a pack keeps its bits: the other rows need its checkpoint"
    refused = [row for row in plan.rows if row.refusal]
    if refused:
        yield f"at {bits_text(refused[-1])} bits: {refused[-1].refusal}"
    if plan.remedy:
        yield f"with {plan.remedy} it fits"


def _assumptions(plan: Plan, traced: bool) -> Iterator[str]:
    """What the speeds and the ends of their range stand for."""
    rows = [row for row in plan.rows if row.forecast]
    if not rows:
        return
    if traced:
        yield "tok/s is an estimate, not a measurement: hits are those of a replay on the trace"
    else:
        info = plan.rows[0].info
        low, usual, high = (
            hit_rate(0.25, info.total_experts / len(info.layers), plan.outline.top_k, locality)
            for locality in (UNIFORM, USUAL, LOCAL)
        )
        yield (
            "tok/s is an estimate, not a measurement: it assumes that, with a quarter of all "
            f"experts resident, {usual:.0%} of those that a token uses are among them ({low:.0%} "
            f"to {high:.0%} over the range)"
        )
    low_end = f"low end of the range: no reuse of experts, {RATES:.0%} of these rates"
    if any(row.on_device for row in rows):
        low_end += ", the CPU decides what to load"
    low_end += f" and {SLOW_PYTHON:g} times the usual Python"
    if plan.target.device.type == "cpu":  # it may have been busy when it was measured
        low_end += f", weights read {CPU_PASSES:g} times; the high end {1 / RATES:.0%} of the rates"
    yield low_end


def _engine(plan: Plan) -> Iterator[str]:
    """Who plans the steps of the forecast, the card or the host, and why."""
    rows = [row for row in plan.rows if row.forecast]
    if plan.target.device.type == "cpu" or not rows:
        return
    by_host = [bits_text(row) for row in rows if not row.on_device]
    on_card = "the GPU decides what to load (a token is one CUDA graph), as with --engine auto"
    why = " or ".join(dict.fromkeys(_why_host(plan, row) for row in rows if not row.on_device))
    if not by_host:
        yield f"{on_card} where memory can be pinned"
    elif len(by_host) == len(rows):
        yield f"the CPU decides what to load, with a wait at every layer: {why}"
    else:
        yield f"{on_card}; at {', '.join(by_host)} bits the CPU decides: {why}"


def _why_host(plan: Plan, row: PlanRow) -> str:
    if plan.target.cards > 1:
        return "there are several GPUs"
    if row.info.expert_bytes > plan.target.memory.ram:
        return "RAM does not hold every expert"
    return "there are too few slots"


def to_json(plan: Plan, command: str, traced: bool) -> dict[str, Any]:
    """The whole plan in bytes and tokens a second, for `-o json`."""
    outline, target = plan.outline, plan.target
    info = plan.rows[0].info
    return {
        "model": outline.name,
        "model_type": outline.config.model_type,
        "parameters": info.parameters,
        "active_parameters": outline.active_parameters(info),
        "layers": len(info.layers),
        "experts": info.total_experts,
        "top_k": outline.top_k,
        "download_bytes": outline.download_bytes,
        "machine": {
            "name": target.name,
            "cards": target.cards,
            "device": target.device.type,
            "memory_bytes": target.memory.device,
            "card_bytes": target.card_bytes,
            "ram_bytes": target.memory.ram,
            "memory_gb_per_s": target.hardware.memory_gb_per_s,
            "link_gb_per_s": target.hardware.link_gb_per_s,
            "disk_gb_per_s": target.hardware.disk_gb_per_s,
        },
        "context": plan.options.context,
        "rows": [_row_json(row) for row in plan.rows],
        "chosen": None if plan.chosen is None else plan.rows.index(plan.chosen),
        "command": None if plan.chosen is None else command,
        "remedy": plan.remedy or None,
        "notes": [*warnings(plan), *notes(plan, traced)],
    }


def _row_json(row: PlanRow) -> dict[str, Any]:
    return {
        "bits": str(row.bits),
        "recipe": str(row.recipe),
        "expert_bytes": row.info.expert_bytes,
        "slot_bytes": row.info.slot_bytes,
        "pack_bytes": row.pack_bytes,
        "dense_bytes": row.budget.dense,
        "kv_cache_bytes": row.budget.kv_cache,
        "workspace_bytes": row.budget.workspace,
        "staging_bytes": row.staging_bytes,
        "prompt_tokens_at_once": row.chunk,
        "slots": row.slots,
        "cards": [
            {
                "layers": len(share.blocks),
                "experts": share.experts,
                "slots": share.slots,
                "dense_bytes": share.dense,
                "kv_cache_bytes": share.kv_cache,
            }
            for share in row.shares
        ],
        "engine": "device" if row.on_device else "host",
        "rest_in": row.rest,
        "disk_share": row.disk_share,
        "refusal": row.refusal or None,
        "tokens_per_s": None if row.forecast is None else asdict(row.forecast),
    }
