"""The demo through transformers, accelerate's offloading, llama.cpp and this project, side by side.

Each peer runs in a process of its own and all of them read the same tokens, in turns, several
rounds in one run, so that ratios hold on a machine whose speed drifts. Before anything is timed
every peer must say what the reference says (transformers in bfloat16): the distributions after a
few prompts are compared, and greedy text. Prints a table and ratios, then writes JSON.

    pip install -e '.[demo,peers]'            # without llama-cpp-python its rows are left out
    python benchmarks/peers.py                # under 12 minutes on two quiet cores
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
from dataclasses import asdict
from pathlib import Path

import psutil
from machine import RESULTS, machine
from peer_process import Spec
from peers_check import check
from peers_report import tables
from peers_running import Load, Peer, running
from transformers import AutoTokenizer

from offload import demo
from offload.benching.texts import real_text, stretches
from offload.budget import parse_slots
from offload.home import offload_home
from offload.packs import find_or_make_pack
from offload.recipe import AskedBits
from quant.pack import Pack

MIXES = ("BF16", "Q8_0", "Q4_1")
SLOW_ROUNDS = 2  # of what takes seconds a token
FULL = Load(prompt=256, decode=32, rounds=5, greedy=16, warm=16)
QUICK = Load(prompt=64, decode=8, rounds=1, greedy=4, warm=1)


def specs(begins: tuple[str, ...]) -> list[Spec]:
    """The reference, and the peers that can run here and are wanted; their files are made first."""
    reference, *others = _specs()
    wanted = [spec for spec in others if spec.name.startswith(begins)]
    if any(spec.kind == "llama.cpp" for spec in wanted):
        _write_gguf()
    return [reference, *wanted]


def _specs() -> list[Spec]:
    ours = [
        Spec("ours, 16 bits, 25% resident", "ours", "experts=16", "25%"),
        Spec("ours, 4 bits, all resident", "ours", "experts=4"),
        Spec("ours, 4 bits, 50% resident", "ours", "experts=4", "50%"),
        Spec("ours, 4 bits, 25% resident", "ours", "experts=4", "25%"),
        Spec("ours, q8, all resident", "ours", "q8"),
        Spec("ours, q4, all resident", "ours", "q4"),
    ]
    path = find_or_make_pack("demo", AskedBits("experts=4", None, None, None).recipe())
    with contextlib.closing(Pack(path)) as pack:
        info = pack.info
        slots = parse_slots("25%", info.total_experts)
        assert slots is not None
        memory = info.dense_bytes(2) + slots * info.slot_bytes
    accelerate = Spec(
        "accelerate, bf16, CPU and disk",
        "accelerate",
        "16",
        memory=memory,
        rounds=SLOW_ROUNDS,
    )
    return [Spec("transformers, bf16", "transformers", "16"), accelerate, *ours, *_llama_cpp()]


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


def measure(peers: list[Peer], ids: list[int], load: Load) -> None:
    """All rounds, forwards and backwards in turns; each round reads another stretch of text."""
    texts = stretches(ids, load.prompt + load.decode)
    warm = next(texts)
    for peer in peers:
        slow = peer.spec.rounds is not None
        rest = warm[load.prompt :][: 1 if slow else load.warm]
        peer.ask("timed", warm[: 16 if slow else load.prompt], rest)
    for number in range(load.rounds):
        text = next(texts)
        print(f"round {number + 1} of {load.rounds}", file=sys.stderr)
        for peer in peers if number % 2 == 0 else reversed(peers):
            if peer.spec.rounds is not None and number >= peer.spec.rounds:
                continue
            prefill, decode = peer.ask("timed", text[: load.prompt], text[load.prompt :])
            peer.prefill.append(load.prompt / prefill)
            peer.decode.append(load.decode / decode)
    for peer in peers:
        peer.facts = peer.ask("facts")


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
    chosen = specs(tuple(arguments.peers))
    with running(chosen, load, arguments.threads) as peers:
        timed = list(peers)
        left_out = check(timed, tokenizer, load)
        measure(timed, ids, load)
    report = {
        **machine(),
        "threads": arguments.threads,
        "seconds": time.perf_counter() - begin,
        "load": asdict(load),
        "peers": [
            {
                **{k: v for k, v in asdict(peer.spec).items() if k != "file"},
                "prefill_ts": peer.prefill,
                "decode_ts": peer.decode,
                "check": peer.check,
                **peer.facts,
            }
            for peer in timed
        ],
        "left_out": left_out,
    }
    report["versions"].update(versions())
    print(tables(report))
    minutes = report["seconds"] / 60
    print(f"{minutes:.1f} minutes, {arguments.threads} threads", file=sys.stderr)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        output.write_text(text, encoding="utf-8")
        print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
