"""Decode and prefill speed of the demo: transformers eager, all experts resident, a quarter
resident, and with few bits beside the experts.

The same tokens of real text go through each in turns, several rounds in one run, so that the ratios
hold on a machine whose speed drifts. Prints a table, then writes JSON with the hardware's name.

    python benchmarks/decode.py [--rounds 5] [--output benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.bench.run import measure_link, real_text
from offload.engine.handle import offload_of
from offload.model import demo
from offload.progress import without_bars

PROMPT_TOKENS, DECODE_TOKENS = 512, 64
SMALL = "experts=4,attention=4,head=6"


@torch.inference_mode()
def step(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> Any:
    """The KV cache after `ids` [1, T]. The same call for transformers' model and for ours."""
    out = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return out.cache


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Tokens/s of one prefill of `PROMPT_TOKENS`."""
    begin = time.perf_counter()
    step(model, ids[:, :PROMPT_TOKENS], None)
    return PROMPT_TOKENS / (time.perf_counter() - begin)


def decode(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Tokens/s of decoding `DECODE_TOKENS`, fed one by one, after 64 others."""
    cache = step(model, ids[:, :64], None)
    begin = time.perf_counter()
    for at in range(64, 64 + DECODE_TOKENS):
        cache = step(model, ids[:, at : at + 1], cache)
    return DECODE_TOKENS / (time.perf_counter() - begin)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "demo-cpu.json")
    arguments = parser.parse_args()

    with without_bars():
        eager = AutoModelForCausalLM.from_pretrained(
            demo.checkpoint(), dtype=torch.bfloat16, experts_implementation="eager"
        )
    resident, tokenizer = offload.load("demo", device="cpu")
    quarter, _ = offload.load("demo", device="cpu", expert_slots="25%")
    small, _ = offload.load("demo", device="cpu", bits=SMALL)
    assert tokenizer is not None
    ids = torch.tensor([real_text(tokenizer, PROMPT_TOKENS)])
    models: dict[str, PreTrainedModel] = {
        "transformers eager, bfloat16": eager,
        "4-bit experts, all resident": resident,
        "4-bit experts, a quarter resident": quarter,
        f"{SMALL}, all resident": small,
    }
    tests: dict[str, Callable[[PreTrainedModel, torch.Tensor], float]] = {
        f"tg{DECODE_TOKENS}": decode,
        f"pp{PROMPT_TOKENS}": prefill,
    }
    samples: dict[str, dict[str, list[float]]] = {
        test: {name: [] for name in models} for test in tests
    }
    for round_number in range(-1, arguments.rounds):  # round -1 warms up
        for test, run in tests.items():
            for name, model in models.items():
                speed = run(model, ids)
                if round_number >= 0:
                    samples[test][name].append(speed)

    rows: list[dict[str, Any]] = []
    print("| test | model | t/s | of eager | of resident |\n| --- | --- | ---: | ---: | ---: |")
    for test, by_model in samples.items():
        first, second, *_ = by_model.values()
        for name, speeds in by_model.items():
            middle, spread = statistics.median(speeds), statistics.stdev(speeds)
            of_eager = statistics.median(a / b for a, b in zip(speeds, first, strict=True))
            of_resident = statistics.median(a / b for a, b in zip(speeds, second, strict=True))
            ratios = f"{of_eager:.2f} | {of_resident:.2f}"
            print(f"| {test} | {name} | {middle:.1f} ± {spread:.1f} | {ratios} |")
            rows.append(
                {
                    "test": test,
                    "model": name,
                    "median_ts": middle,
                    "stddev_ts": spread,
                    "samples_ts": speeds,
                    "ratio_to_eager": of_eager,
                    "ratio_to_resident": of_resident,
                }
            )
    stats = offload_of(quarter).stats()
    link = measure_link(offload_of(quarter).engine)
    print(
        f"\na quarter resident: {stats.line()}, copies at {stats.link_gb_per_s:.1f} GB/s, "
        f"{stats.link_gb_per_s / link:.0%} of the {link:.1f} GB/s measured back to back"
    )
    report = {
        **machine(),
        "link_gb_per_s": link,
        "quarter_hit_rate": stats.counts.hit_rate,
        "results": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
