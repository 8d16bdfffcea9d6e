"""llama.cpp and this project on the same random model of a real shape, in turns.

The model is Qwen3-30B-A3B's with fewer layers. Its experts have 4 bits without offsets, which both
sides store in 4.5 bits per weight (Q4_0 there); the rest is bfloat16 on both. That both compute the
same is checked first. Each speed stands beside the bytes that a token reads, as a share of the rate
at which this machine reads memory, measured between the rounds.

    pip install -e '.[peers]'
    python benchmarks/shapes.py [--layers 8] [--rounds 5] [--output benchmarks/results/NAME.json]

The first run writes 4 GB under OFFLOAD_HOME.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from cuda_check.shapes import QWEN3
from machine import RESULTS, machine
from peer_process import Spec
from peers import versions
from peers_check import compare
from peers_running import Load, Run, measure, running
from shape_gguf import write_shape
from synthetic_packs import write_synthetic_pack
from transformers import AutoConfig

from offload.files import offload_home
from offload.quant.pack import Pack
from offload.quant.scheme import Scheme

LAYERS = 8
READ_BYTES = 2**30
MOST_KL = 0.02  # nats; both round activations, in different places
PROMPTS = 8  # compared


def files(layers: int) -> tuple[Path, Path]:
    """The pack and the GGUF file, made if they are not there."""
    home = offload_home() / "peers"
    folder, file = home / f"qwen3-30b-{layers}-layers", home / f"qwen3-30b-{layers}-layers.gguf"
    if not folder.is_dir():
        write_synthetic_pack(folder, QWEN3.config(layers), Scheme(4, 64), offsets=False)
    if not file.is_file():
        write_shape(folder, file)
    return folder, file


def bytes_per_token(folder: Path) -> int:
    """What one token reads of the weights: all but the token table and the unchosen experts."""
    config = AutoConfig.from_pretrained(folder)
    with contextlib.closing(Pack(folder)) as pack:
        info = pack.info
        table = config.vocab_size * config.hidden_size
        chosen = config.num_experts_per_tok * info.slot_bytes * len(info.layers)
        return 2 * (info.dense_parameters - table) + chosen


def read_rate(threads: int) -> float:
    """Bytes per second at which memory is read."""
    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - begin)
    return READ_BYTES / best


def check(run: Run, vocabulary: int) -> None:
    """Whether both compute the same distributions."""
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocabulary, (PROMPTS, 24), generator=random).tolist()
    reference = run.peers[0].ask("distributions", prompts)
    for peer in run.peers:
        log_p = peer.ask("distributions", prompts)
        peer.check = compare(reference, log_p, [0], [0])
        kl = peer.check["kl_mean"]
        assert kl <= MOST_KL, f"{peer.spec.name} is another model: KL divergence {kl:.3f}"


def main() -> None:
    """Check, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--output", type=Path, default=RESULTS / "shapes-cpu.json")
    arguments = parser.parse_args()
    folder, file = files(arguments.layers)
    load = Load(prompt=256, decode=48, rounds=arguments.rounds, greedy=1, warm=16)
    specs = [
        Spec("llama.cpp, Q4_0 and BF16", "llama.cpp", "4", file=file),
        Spec("ours, experts=4", "ours", "experts=4", slots=None, model=str(folder)),
    ]
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    random = torch.Generator().manual_seed(2)
    rate = read_rate(arguments.threads)
    with running(specs, load, arguments.threads) as run:
        check(run, vocabulary)
        shape = load.rounds + 1, load.prompt + load.decode
        measure(run, iter(torch.randint(vocabulary, shape, generator=random).tolist()), load)
    rate = max(rate, read_rate(arguments.threads))
    read = bytes_per_token(folder)
    print(f"{read / 2**20:.0f} MiB per token; memory is read at {rate / 1e9:.1f} GB/s\n")
    print("| | KL | pp256 t/s | tg48 t/s | GB/s | of the read rate | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows: list[dict[str, Any]] = []
    for peer in run.peers:
        prefill, decode = (statistics.median(v) for v in (peer.prefill, peer.decode))
        print(
            f"| {peer.spec.name} | {peer.check['kl_mean']:.4f} | {prefill:.0f} | {decode:.1f} "
            f"| {decode * read / 1e9:.1f} | {decode * read / rate:.0%} "
            f"| {peer.facts['peak_memory'] / 2**30:.2f} GiB |"
        )
        rows.append(
            {
                "name": peer.spec.name,
                "prefill_ts": peer.prefill,
                "decode_ts": peer.decode,
                "check": peer.check,
                **peer.facts,
            }
        )
    theirs, ours = run.peers
    for name, a, b in (
        ("prompt", ours.prefill, theirs.prefill),
        ("decode", ours.decode, theirs.decode),
    ):
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        print(f"ours over theirs, {name}: median {statistics.median(ratios):.2f}, {ratios}")
    report = {
        **machine(),
        "layers": arguments.layers,
        "threads": arguments.threads,
        "bytes_per_token": read,
        "read_bytes_per_s": rate,
        "peers": rows,
    }
    report["versions"].update(versions())
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
