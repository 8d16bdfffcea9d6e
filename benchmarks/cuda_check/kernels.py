"""Kernels that multiply straight from records, beside what the device can do.

Knows: shapes, bits, how products are timed. Does not know: engines, caches.

Decode products are captured as a graph, as decoding has them, and take records in turn, more of
them than any cache holds. Their bytes are those of the records they read.
"""

from __future__ import annotations

import torch

from benchmarks.cuda_check.attempt import attempt, need_time
from benchmarks.cuda_check.bounds import rates_of
from benchmarks.cuda_check.compiling import PROMPT, compile_all
from benchmarks.cuda_check.products import Products, make_products
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import CASES, MIXTRAL, Case
from benchmarks.cuda_check.store import Part
from benchmarks.cuda_check.timing import captured, median_seconds

SCHEMES = ("4", "8", "3g32", "2g16s8", "6", "5")  # as presets have them, the usual one first
REHEARSED = ("4",)
TOKENS = (1, 2, 4)
RING_BYTES = 2**29  # of records: more than a device's cache
CALLS = 12  # in a graph
TARGET = 0.70  # of device copy bandwidth, decode at Mixtral's shape
COMPILE_SHARE = 0.6  # of this part's time, at most
SECONDS = 3.0  # of one shape and scheme, about


def run(setting: Setting, part: Part) -> None:
    """Decode products of one to four tokens and prefill products, at every number of bits."""
    memory = rates_of(setting, part).memory
    ceiling = _dense_tflops(setting)
    part.add({"kind": "dense", "what": "torch, bfloat16, square", "tflop_s": ceiling})
    if not setting.rehearse:
        with attempt(part, "compiling in several processes"):
            part.set("compile_s", compile_all(SCHEMES, setting.seconds_left * COMPILE_SHARE))
    for scheme in REHEARSED if setting.rehearse else SCHEMES:
        for case in (MIXTRAL,) if setting.rehearse else CASES:
            with attempt(part, f"{case.name}, {scheme}"):
                need_time(setting, SECONDS)
                _measure(setting, part, case, scheme, memory, ceiling)


def _dense_tflops(setting: Setting) -> float:
    size = setting.pick(8192, 64)
    a = torch.ones(size, size, dtype=torch.bfloat16, device=setting.device)
    seconds = median_seconds(lambda: torch.mm(a, a), setting.device, rounds=3)
    return 2 * size**3 / seconds / 1e12


def _measure(
    setting: Setting, part: Part, case: Case, scheme: str, memory: float, ceiling: float
) -> None:
    slots = max(case.experts, max(TOKENS) * case.top_k)
    ring = setting.pick(RING_BYTES, 0)
    made = make_products(case, scheme, setting.device, slots, ring, rehearse=setting.rehearse)
    for tokens in TOKENS[:1] if setting.rehearse else TOKENS:
        seconds = _decode_seconds(setting, made, tokens)
        rate = tokens * case.top_k * made.layout.record_bytes / seconds / 1e9
        part.add(
            {
                "kind": "decode kernels",
                "shape": case.name,
                "bits": scheme,
                "tokens": tokens,
                "experts": tokens * case.top_k,
                "us": seconds * 1e6,
                "gb_s": rate,
                "of_device_copy_share": rate / memory,
                "target": f"{TARGET:.0%}" if case is MIXTRAL else "",
            }
        )
    tokens = setting.pick(PROMPT, 4)
    seconds = _prefill_seconds(setting, made, tokens)
    tflops = 2 * tokens * case.top_k * made.layout.weights / seconds / 1e12
    part.add(
        {
            "kind": "prefill kernels",
            "shape": case.name,
            "bits": scheme,
            "tokens": tokens,
            "ms": seconds * 1e3,
            "tflop_s": tflops,
            "of_dense_share": tflops / ceiling,
        }
    )


def _decode_seconds(setting: Setting, made: Products, tokens: int) -> float:
    """Seconds of one call for `tokens` tokens, whose experts are all different."""
    hidden, cells = made.inputs(tokens)
    calls, device = setting.pick(CALLS, 1), setting.device
    tables = [
        ((torch.arange(len(cells)) + call * len(cells)) % len(made.slots)).int().to(device)
        for call in range(calls)
    ]

    def run() -> None:
        for table in tables:
            made.decode(hidden, table, cells)

    return median_seconds(captured(run, device), device, rounds=setting.pick(7, 1)) / calls


def _prefill_seconds(setting: Setting, made: Products, tokens: int) -> float:
    """Seconds of one call in which every expert has as many tokens."""
    hidden, cells = made.inputs(tokens)
    batch = made.batch(tokens, made.case.experts)
    return median_seconds(
        lambda: made.prefill(hidden, batch, cells), setting.device, rounds=setting.pick(3, 1)
    )
