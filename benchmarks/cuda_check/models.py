"""Decode and prefill of a synthetic model at every residency, by every engine, and naively.

Knows: the order of figures, the most telling first: what time does not allow is left out from the
end. Does not know: how any is measured (`decode`, `prefill`, `naive`, `plain`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cuda_check.attempt import attempt, need_time
from benchmarks.cuda_check.bounds import Rates, rates_of
from benchmarks.cuda_check.comparison import logits_rows, need_equal, tokens_rows
from benchmarks.cuda_check.decode import (
    TARGET,
    Decoded,
    Length,
    bound_of,
    decode,
    logits_digest,
)
from benchmarks.cuda_check.plain import accelerate_row
from benchmarks.cuda_check.prefill import TARGET as PREFILL_TARGET
from benchmarks.cuda_check.prefill import prefill
from benchmarks.cuda_check.seam import DEVICE, HOST, kernels_anywhere
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import MIXTRAL, Case
from benchmarks.cuda_check.sizes import SCHEME, Sizes, sizes_of
from benchmarks.cuda_check.store import Part, Row
from benchmarks.cuda_check.subject import Run, Subject
from benchmarks.synthetic_packs import write_synthetic_pack
from offload.cache.trace.synthetic import Shape, synthesize

RESIDENT = (0.25, 0.5, 1.0, 0.1, 0.75)
WAYS = ((DEVICE, False), (DEVICE, True), (HOST, False), (HOST, True))  # at every residency
LEAST_SECONDS = 4.0  # of one way to serve experts
NAIVE_TARGET = 8.0  # times, at 25% resident


@dataclass
class _Measuring:
    """One model's figures as they come."""

    case: Case
    setting: Setting
    part: Part
    rates: Rates
    sizes: Sizes
    subject: Subject
    naive_tokens_per_second: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # run -> of its logits
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)  # run -> what it said
    on_demand: dict[tuple[str, float], float] = field(default_factory=dict)  # bytes a token

    @property
    def length(self) -> Length:
        return _length(self.setting)


def _length(setting: Setting) -> Length:
    return Length(setting.pick(64, 8), setting.pick(16, 1), setting.pick(48, 2))


def runner(case: Case) -> Callable[[Setting, Part], None]:
    """The part that measures `case`."""

    def run(setting: Setting, part: Part) -> None:
        rates = rates_of(setting, part)
        sizes = sizes_of(case, setting)
        folder = setting.work / case.name
        try:
            begin = time.perf_counter()
            write_synthetic_pack(folder, case.config_of(sizes.layers, setting.rehearse), SCHEME)
            written = time.perf_counter()
            subject = _load(case, setting, sizes)
            part.add(_model_row(case, sizes, subject, written - begin, written))
            measuring = _Measuring(case, setting, part, rates, sizes, subject)
            with kernels_anywhere(setting.rehearse):
                _measure(measuring)
            subject.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with attempt(part, "transformers with accelerate"):
            part.add(accelerate_row(case, setting))

    return run


def _load(case: Case, setting: Setting, sizes: Sizes) -> Subject:
    shape = Shape(
        case.name, sizes.layers, case.experts, case.top_k, sizes.record_bytes, 0, SCHEME.bits
    )
    prompt = setting.pick(2048, 16)
    trace = synthesize(shape, case.routing, 2 * _length(setting).steps, prompt)
    return Subject(setting.work / case.name, setting, trace, context=2 * prompt)


def _model_row(
    case: Case, sizes: Sizes, subject: Subject, pack_seconds: float, written: float
) -> Row:
    return {
        "kind": "model",
        "name": case.name,
        "layers": sizes.layers,
        "of_layers": sizes.of_layers,
        "fewer_because_of": sizes.limit,
        "experts_gib": subject.pack.info.expert_bytes / 2**30,
        "dense_gib": subject.pack.info.dense_bytes(2) / 2**30,
        "record_mib": sizes.record_bytes / 2**20,
        "host_memory": subject.host_memory,
        "pack_s": pack_seconds,
        "load_s": time.perf_counter() - written,
    }


def _measure(m: _Measuring) -> None:
    for memory in ("pinned", "pageable"):
        with attempt(m.part, f"naive offloading, {memory}"):
            _naive(m, memory)
    longest = 0.0
    for run in _runs(m.case, m.setting):
        with attempt(m.part, run.name):
            need_time(m.setting, max(LEAST_SECONDS, 1.3 * longest))
            begin = time.monotonic()
            _serve(m, run)
            longest = max(longest, time.monotonic() - begin)
    for row in logits_rows(m.digests):
        m.part.add(row)
    for row in tokens_rows(m.tokens):
        m.part.add(row)
        with attempt(m.part, f"tokens, {row['engine']}"):
            need_equal(row)


def _runs(case: Case, setting: Setting) -> list[Run]:
    """The most telling first: every residency one way, then the next way. Nothing is ever loaded,
    nor guessed, where all is resident."""
    if setting.rehearse:  # kernels that plan are interpreted, at seconds a token
        runs = [Run(HOST, 0.25), Run(HOST, 0.25, lookahead=True), Run(HOST, 1.0)]
        return [*runs, *([Run(DEVICE, 0.25, lookahead=True)] if case is MIXTRAL else [])]
    return [
        Run(engine, resident, lookahead)
        for engine, lookahead in WAYS
        for resident in RESIDENT
        if not (resident == 1.0 and lookahead)
    ]


def _naive(m: _Measuring, memory: str) -> None:
    with m.subject.serving_naively(pinned=memory == "pinned"):
        short = Length(m.length.prompt, 1, max(2, m.length.tokens // 8))
        done = decode(m.subject, short, 0)
    bound = bound_of(m.subject, m.rates, done.link_bytes, short.context)
    m.naive_tokens_per_second[memory] = done.tokens_per_second
    m.part.add(
        {
            "kind": "naive: every chosen expert is copied whole, none is kept",
            "host_memory": memory,
            "tok_s": done.tokens_per_second,
            "mib_token": done.link_bytes / 2**20,
            "of_link_share": done.link_bytes * done.tokens_per_second / m.rates.link / 1e9,
            "ms_a_layer": 1e3 / done.tokens_per_second / m.sizes.layers,
            "of_bound_share": bound.in_turn * done.tokens_per_second,
        }
    )


def _serve(m: _Measuring, run: Run) -> None:
    with m.subject.serving(run):
        if not run.lookahead:  # it stands back from prompts
            with attempt(m.part, f"prefill, {run.name}"):
                _prefill(m, run)
        if not m.setting.rehearse:
            decode(m.subject, m.length, 0)  # the cache settles on the first half of the trace
        done = decode(m.subject, m.length, m.length.steps)
        m.tokens[run.name] = done.tokens
        _decode_row(m, run, done)
        with attempt(m.part, f"logits, {run.name}"):
            m.digests[run.name] = logits_digest(m.subject, m.length.prompt, m.setting.pick(8, 1))


def _prefill(m: _Measuring, run: Run) -> None:
    done = prefill(m.subject, m.setting.pick(2048, 16))
    least = done.link_seconds(m.rates)
    m.part.add(
        {
            "kind": "prefill",
            "resident": f"{run.resident:.0%}",
            "engine": run.engine,
            "tokens": done.tokens,
            "seconds": done.seconds,
            "tok_s": done.tokens / done.seconds,
            "loaded_gib": done.loaded_bytes / 2**30,
            "needed_gib": done.needed_bytes / 2**30,
            "link_bound_s": least,
            "of_link_bound_share": least / done.seconds if least else None,
            "target": f"{PREFILL_TARGET:.0%}" if least else "",
        }
    )


def _decode_row(m: _Measuring, run: Run, done: Decoded) -> None:
    if not run.lookahead:
        m.on_demand[run.engine, run.resident] = done.link_bytes
    must = m.on_demand.get((run.engine, run.resident), done.link_bytes)
    bound = bound_of(m.subject, m.rates, must, m.length.context)
    counts = done.stats.counts
    row: Row = {
        "kind": "decode",
        "resident": f"{run.resident:.0%}",
        "engine": run.engine,
        "look_ahead": run.lookahead,
        "graph": done.captured,
        "slots": done.stats.slots,
        "tok_s": done.tokens_per_second,
        "hits_share": counts.hit_rate,
        "recall_share": counts.lookahead_recall if run.lookahead else None,
        "mib_token": done.link_bytes / 2**20,
        "bound_tok_s": 1 / bound.overlapped,
        "of_bound_share": bound.overlapped * done.tokens_per_second,
        "target": f"{TARGET:.0%}",
        "in_turn_tok_s": 1 / bound.in_turn,
        "of_in_turn_share": bound.in_turn * done.tokens_per_second,
    }
    for memory, naive in m.naive_tokens_per_second.items():
        row[f"times_naive_{memory}"] = done.tokens_per_second / naive
    row["naive_target"] = f"{NAIVE_TARGET:.0f}" if run.resident == 0.25 else ""
    m.part.add(row)
