"""Kernels that multiply straight from records, beside what the device can do.

Knows: shapes, bits, how `quant.experts` is called. Does not know: engines, caches.

Decode products are captured as a graph, as decoding has them, and take records in turn, more of
them than any cache holds. Their bytes are those of the records they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_check.attempt import NotBuiltError, attempt, need_time
from benchmarks.cuda_check.bounds import rates_of
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import CASES, MIXTRAL, Case
from benchmarks.cuda_check.store import Part
from benchmarks.cuda_check.timing import median_seconds
from benchmarks.synthetic_packs import first_layer, random_record
from quant.scheme import Scheme

SCHEMES = ("4", "8", "3g32", "2g16s8", "6", "5")  # as presets have them, the usual one first
REHEARSED = ("4",)
TOKENS = (1, 2, 4)
PROMPT = 2048
RING_BYTES = 2**29  # of records: more than a device's cache
CALLS = 12  # in a graph
TARGET = 0.70  # of device copy bandwidth, decode at Mixtral's shape
SECONDS = 4.0  # of one shape and number of bits, kernels compiled in it


def run(setting: Setting, part: Part) -> None:
    """Decode products of one to four tokens and prefill products, at every number of bits."""
    memory = rates_of(setting, part).memory
    with attempt(part, "dense product"):
        ceiling = _dense_tflops(setting)
        part.add({"kind": "dense", "what": "torch, bfloat16, square", "tflop_s": ceiling})
    for text in REHEARSED if setting.rehearse else SCHEMES:
        for case in (MIXTRAL,) if setting.rehearse else CASES:
            with attempt(part, f"{case.name}, {text}"):
                need_time(setting, SECONDS)
                _measure(setting, part, case, text, memory, ceiling)


def _dense_tflops(setting: Setting) -> float:
    size = setting.pick(8192, 64)
    a = torch.ones(size, size, dtype=torch.bfloat16, device=setting.device)
    seconds = median_seconds(lambda: torch.mm(a, a), setting.device, rounds=3)
    return 2 * size**3 / seconds / 1e12


def _measure(
    setting: Setting, part: Part, case: Case, text: str, memory: float, ceiling: float
) -> None:
    try:
        from offload.compute import program_of

        from quant import experts
    except ImportError as error:
        raise NotBuiltError(str(error)) from None
    module, layout = first_layer(case.config_of(1, setting.rehearse), Scheme.parse(text))
    program = program_of(module, layout)
    device = setting.device
    random = torch.Generator().manual_seed(1)
    record = random_record(layout, random).to(device)
    most = max(case.experts, max(TOKENS) * case.top_k)
    count = max(most, setting.pick(RING_BYTES, 1) // layout.record_bytes)
    slots = record.repeat(count, 1)  # equal bytes in other places cost as much
    if not experts.kernels_work(program, torch.bfloat16, device):
        raise NotBuiltError("its kernels are not used here: see the warning")
    for tokens in TOKENS[:1] if setting.rehearse else TOKENS:
        seconds = _decode_seconds(setting, experts, program, slots, tokens, case.top_k)
        rate = tokens * case.top_k * layout.record_bytes / seconds / 1e9
        part.add(
            {
                "kind": "decode kernels",
                "shape": case.name,
                "bits": text,
                "tokens": tokens,
                "experts": tokens * case.top_k,
                "us": seconds * 1e6,
                "gb_s": rate,
                "of_device_copy_share": rate / memory,
                "target": f"{TARGET:.0%}" if case is MIXTRAL else "",
            }
        )
    tokens = setting.pick(PROMPT, 4)
    seconds = _prefill_seconds(setting, experts, program, slots, tokens, case)
    tflops = 2 * tokens * case.top_k * layout.weights / seconds / 1e12
    part.add(
        {
            "kind": "prefill kernels",
            "shape": case.name,
            "bits": text,
            "tokens": tokens,
            "ms": seconds * 1e3,
            "tflop_s": tflops,
            "of_dense_share": tflops / ceiling,
        }
    )


def _decode_seconds(
    setting: Setting, experts: Any, program: Any, slots: Tensor, tokens: int, k: int
) -> float:
    """Seconds of one call for `tokens` tokens, whose experts are all different."""
    device, cells = setting.device, tokens * k
    hidden = torch.randn(tokens, program.up.columns, device=device).bfloat16()
    out = hidden.new_zeros(cells, program.down.rows)
    calls = setting.pick(CALLS, 1)
    tables = [
        ((torch.arange(cells) + call * cells) % len(slots)).to(torch.int32).to(device)
        for call in range(calls)
    ]

    def run() -> None:
        for table in tables:
            experts.decode(hidden, slots, table, program, out)

    return median_seconds(_captured(run, device), device, rounds=setting.pick(7, 1)) / calls


def _captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same as a graph."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()  # kernels are compiled
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _prefill_seconds(
    setting: Setting, experts: Any, program: Any, slots: Tensor, tokens: int, case: Case
) -> float:
    """Seconds of one call in which every expert has as many tokens."""
    cells = tokens * case.top_k
    hidden = torch.randn(tokens, program.up.columns, device=setting.device).bfloat16()
    out = hidden.new_zeros(cells, program.down.rows)
    cells_of = {slot: list(range(slot, cells, case.experts)) for slot in range(case.experts)}
    size = experts.block_cells(cells, case.experts)
    batch = experts.make_batch(cells_of, size, setting.device)
    return median_seconds(
        lambda: experts.prefill(hidden, slots, batch, program, out),
        setting.device,
        rounds=setting.pick(3, 1),
    )
