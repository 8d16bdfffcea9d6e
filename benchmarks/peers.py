"""The demo through transformers, accelerate's offloading, llama.cpp and this project, side by side.

Each peer runs in a process of its own and all of them read the same tokens, in turns, several
rounds in one run, so that ratios hold on a machine whose speed drifts. Before anything is timed
every peer must say what the reference says (transformers eager in bfloat16): the distributions
after a few prompts are compared, and greedy text. A peer that fails is left out and named. Writes
JSON, then prints a table and ratios.

transformers runs experts one after the other (eager) or together (grouped_mm, its own choice): a
row each. accelerate runs them one after the other and is given, once each, the bytes that ours
holds with a quarter of the experts resident in 4 and in 16 bits.

    pip install -e '.[demo,peers]'            # without llama-cpp-python its rows are left out
    python benchmarks/peers.py                # under 15 minutes on two quiet cores
    python benchmarks/peers.py --quick        # about 3 minutes; says only that everything works
    python benchmarks/peers_report.py         # the tables of a run before

Where llama.cpp's process dies with a signal on a processor with AMX, its compiler has dropped a
tile's configuration (ggml-org/llama.cpp, pull request 26954): build it without AMX,
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON".

The first run also makes packs and GGUF files (about 4 minutes more, 4 GB under OFFLOAD_HOME).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from machine import RESULTS, machine
from peer_process import Spec
from peers_check import check
from peers_report import tables
from peers_running import Load, PeerError, measure, running
from transformers import AutoTokenizer

from offload.bench.run import real_text, stretches
from offload.files import offload_home
from offload.model import demo
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.quant.pack import Pack
from offload.units import parse_slots

MIXES = ("BF16", "Q8_0", "Q4_1")
QUARTER = "25%"
SLOW_ROUNDS, SLOW_DECODE = 2, 8  # of what takes seconds a token
FULL = Load(prompt=256, decode=32, rounds=5, greedy=16, warm=16)
QUICK = Load(prompt=64, decode=8, rounds=1, greedy=4, warm=1)


def specs(begins: tuple[str, ...]) -> list[Spec]:
    """The reference, and the peers that can run here and are wanted; their files are made first."""
    reference, *others = [*_transformers(), *_accelerate(), *_ours(), *_llama_cpp()]
    wanted = [spec for spec in others if spec.name.startswith(begins)]
    if any(spec.kind == "llama.cpp" for spec in wanted):
        _write_gguf()
    for spec in wanted:  # a peer's process may not start others, as quantising does
        if spec.kind == "ours":
            find_or_make_pack("demo", LoadOptions(bits=spec.bits))
    return [reference, *map(_with_memory, wanted)]


def _transformers() -> list[Spec]:
    return [
        Spec(f"transformers {experts}, bf16", "transformers", "16", experts=experts)
        for experts in ("eager", "grouped_mm")
    ]


def _accelerate() -> list[Spec]:
    slow = Spec("", "accelerate", "16", experts="eager", rounds=SLOW_ROUNDS, decode=SLOW_DECODE)
    return [
        replace(
            slow,
            name=f"accelerate eager, bf16, memory of {bits} bits {QUARTER}",
            memory_of=f"experts={bits}",
        )
        for bits in (4, 16)
    ]


def _with_memory(spec: Spec) -> Spec:
    """With the bytes that dense weights and slots of ours take."""
    if spec.memory_of is None:
        return spec
    path = find_or_make_pack("demo", LoadOptions(bits=spec.memory_of))
    with contextlib.closing(Pack(path)) as pack:
        info = pack.info
        slots = parse_slots(QUARTER, info.total_experts)
        assert slots is not None
        return replace(spec, memory=info.dense_bytes(2) + slots * info.slot_bytes)


def _ours() -> list[Spec]:
    return [
        Spec(f"ours, 16 bits, {QUARTER} resident", "ours", "experts=16", QUARTER),
        Spec("ours, 4 bits, all resident", "ours", "experts=4"),
        Spec("ours, 4 bits, 50% resident", "ours", "experts=4", "50%"),
        Spec(f"ours, 4 bits, {QUARTER} resident", "ours", "experts=4", QUARTER),
        Spec("ours, q8, all resident", "ours", "q8"),
        Spec("ours, q4, all resident", "ours", "q4"),
    ]


def _llama_cpp() -> list[Spec]:
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: llama.cpp is left out", file=sys.stderr)
        return []
    return [Spec(f"llama.cpp, {mix}", "llama.cpp", mix, file=_gguf(mix)) for mix in MIXES]


def _gguf(mix: str) -> Path:
    return offload_home() / "peers" / f"demo-{mix}.gguf"


def _write_gguf() -> None:
    from demo_gguf import write_demo

    for mix in MIXES:
        if not _gguf(mix).is_file():
            print(f"writing the demo as GGUF, {mix}", file=sys.stderr)
            _gguf(mix).parent.mkdir(parents=True, exist_ok=True)
            write_demo(_gguf(mix), mix)


def versions() -> dict[str, str | None]:
    """Of what is compared with."""
    known: dict[str, str | None] = {}
    for name in ("accelerate", "llama-cpp-python", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def main() -> None:
    """Check, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, one round")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="only those that begin so",
    )
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--output", type=Path, help="(results/peers-cpu.json; none with --quick)")
    arguments = parser.parse_args()
    load = QUICK if arguments.quick else FULL
    output = arguments.output or (None if arguments.quick else RESULTS / "peers-cpu.json")

    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint(), local_files_only=True)
    ids = real_text(tokenizer, (load.prompt + load.decode) * (load.rounds + 1))
    texts = stretches(ids, load.prompt + load.decode)
    with running(specs(tuple(arguments.peers)), load, arguments.threads) as run:
        try:
            check(run, tokenizer, load)
        except PeerError as error:
            parser.exit(1, f"{error}\n")
        reference = run.peers[0].spec.name
        measure(run, texts, load)
    report = {
        **machine(),
        "threads": arguments.threads,
        "seconds": time.perf_counter() - begin,
        "load": asdict(load),
        "reference": reference,
        "peers": [
            {
                **{k: v for k, v in asdict(peer.spec).items() if k != "file"},
                "prefill_ts": peer.prefill,
                "decode_ts": peer.decode,
                "check": peer.check,
                **peer.facts,
            }
            for peer in run.peers
        ],
        "left_out": run.left_out,
    }
    report["versions"].update(versions())
    if output is not None:  # before anything is made of it
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        output.write_text(text, encoding="utf-8")
        print(f"written to {output}", file=sys.stderr)
    print(tables(report))
    minutes = report["seconds"] / 60
    print(f"{minutes:.1f} minutes, {arguments.threads} threads", file=sys.stderr)


if __name__ == "__main__":
    main()
