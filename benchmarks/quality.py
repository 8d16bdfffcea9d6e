"""What fewer bits cost: perplexity, KL divergence and agreement of the demo's real weights.

A row for each width of the experts (the rest at 16 bits), of the rest (experts at 16 bits), and for
each preset. Each pack is made in a temporary folder, measured and deleted before the next one; the
reference is the 16-bit row. After each row the JSON is written, and a run that was stopped goes on
from there. Prints progress on stderr, the table last on stdout.

    python benchmarks/quality.py [--tokens 2048] [--only experts=4,q4] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import RESULTS, machine
from transformers import PreTrainedModel

import offload
from offload import OffloadError
from offload.bench.run import real_text
from offload.engine.handle import offload_of
from offload.progress import Ticker
from offload.quality.check import (
    LogitsRecord,
    ModelLoader,
    compare_with_record,
    read_prompts,
    record_logits,
)
from offload.quality.scoring import Sliding, Text, measure_perplexity, prefix_of
from offload.quant.pack import PackInfo

REFERENCE = "experts=16,dense=16"
WIDTHS = (16, 8, 6, 5, 4, 3, 2)
PRESETS = ("q8", "q6", "q5", "q4", "q3", "q2", "mixtral-offloading")
SETTINGS = (
    *(f"experts={bits},dense=16" for bits in WIDTHS),
    *(f"experts=16,dense={bits}" for bits in WIDTHS[1:]),
    *PRESETS,
)
SLIDING = Sliding.asked()
COLUMNS = (
    "setting",
    "size",
    "bits/weight of experts",
    "perplexity",
    "KL mean",
    "KL 99%",
    "same top token",
    "perplexity ratio",
)


def bits_per_weight(info: PackInfo) -> float:
    """Bits an expert's weight takes in the pack: codes, scales, padding and all."""
    layers = enumerate(info.layers)
    weights = sum(layer.num_experts * info.layout_of(i).weights for i, layer in layers)
    return 8 * info.expert_bytes / weights


def load(source: str, setting: str, packs: Path) -> tuple[PreTrainedModel, Any]:
    """`source` as `setting` says, its pack made under `packs`."""
    return offload.load(source, bits=setting, pack_dir=packs)


def measure(setting: str, source: str, record: LogitsRecord, tokens: int) -> dict[str, Any]:
    """One row; its pack is gone afterwards."""
    figures: dict[str, Any] = {}

    def load_and_score() -> tuple[PreTrainedModel, Any]:
        """The text is scored while the model is there anyway."""
        begin = time.perf_counter()
        model, tokenizer = load(source, setting, Path(packs))
        figures["load_seconds"] = time.perf_counter() - begin  # making the pack, most of it
        pack = offload_of(model).pack
        figures["bits"] = pack.info.bits
        figures["bytes"] = pack.total_bytes
        figures["expert_bits_per_weight"] = bits_per_weight(pack.info)
        text = Text(prefix_of(tokenizer), tuple(real_text(tokenizer, tokens)))
        with Ticker(setting) as ticker:
            found = measure_perplexity(model, text, SLIDING, ticker)
        figures["text_tokens"] = found.tokens
        figures["perplexity"] = found.perplexity.value
        figures["perplexity_error"] = found.perplexity.error
        return model, tokenizer

    with tempfile.TemporaryDirectory(prefix="offload-quality-") as packs:
        begin = time.perf_counter()
        result = compare_with_record(ModelLoader(setting, load_and_score), record)
        figures["seconds"] = time.perf_counter() - begin
    return {"setting": setting, **figures, "check": result.to_json()}


@contextlib.contextmanager
def record_reference(source: str) -> Iterator[LogitsRecord]:
    """What all rows are compared with; its pack is gone when it has been run."""
    with tempfile.TemporaryDirectory(
        prefix="offload-quality-", ignore_cleanup_errors=True
    ) as packs:
        reference = ModelLoader(REFERENCE, lambda: load(source, REFERENCE, Path(packs)))
        with record_logits(reference, read_prompts(), SLIDING) as record:
            shutil.rmtree(packs)
            yield record


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    if "skipped" in result:
        return f"| {result['setting']} | {result['skipped']} |" + " |" * (len(COLUMNS) - 2)
    figures = result["check"]["figures"]
    agreement, error = figures["top1_agreement"], figures["top1_agreement_error"]
    cells = (
        result["setting"],
        f"{result['bytes'] / 2**30:.2f} GiB",
        f"{result['expert_bits_per_weight']:.2f}",
        f"{result['perplexity']:.3f} ± {result['perplexity_error']:.3f}",
        f"{figures['kl_mean']:.5f} ± {figures['kl_mean_error']:.5f}",
        f"{figures['kl_p99']:.4f}",
        f"{100 * agreement:.1f} ± {100 * error:.1f}%",
        f"{figures['perplexity_ratio']:.4f} ± {figures['perplexity_ratio_error']:.4f}",
    )
    return f"| {' | '.join(cells)} |"


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for rows to stand in one table."""
    return {
        "source": arguments.source,
        "text": "Python's language reference (pydoc_data.topics)",
        "tokens": arguments.tokens,
        "prompts_sha256": read_prompts().sha256,
        "window": SLIDING.window,
        "stride": SLIDING.stride,
        **machine(),
    }


def earlier(file: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows already measured under the same conditions."""
    if not file.is_file():
        return []
    report = json.loads(file.read_text(encoding="utf-8"))
    if {key: report.get(key) for key in now} != now:
        print(f"{file} is of other conditions: it is made anew", file=sys.stderr)
        return []
    return [result for result in report["results"] if "skipped" not in result]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="demo", help="checkpoint folder, hub id, or demo")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, for perplexity")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="this setting alone")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality-demo-cpu.json")
    arguments = parser.parse_args()

    now = conditions(arguments)
    done = {result["setting"]: result for result in earlier(arguments.output, now)}
    with record_reference(arguments.source) as record:
        for setting in arguments.only or SETTINGS:
            if setting in done:
                continue
            try:
                done[setting] = measure(setting, arguments.source, record, arguments.tokens)
            except OffloadError as error:  # such as bits that this version does not have
                done[setting] = {"setting": setting, "skipped": str(error)}
            print(row(done[setting]), file=sys.stderr)
            report = {**now, "results": [done[name] for name in SETTINGS if name in done]}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}", file=sys.stderr)
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    for setting in SETTINGS:
        if setting in done:
            print(row(done[setting]))


if __name__ == "__main__":
    main()
