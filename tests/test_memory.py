"""What is held in memory, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.gguf_files import write_gguf
from tests.offload.model.formats.test_fp8 import make_fp8
from tests.tiny import save_tiny

MIB = 2**20

ANONYMOUS = """
import re
def anonymous():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status).group(1)) * 1024
"""


def _run(script: str, *arguments: str) -> list[int]:
    result = subprocess.run(
        [sys.executable, "-c", ANONYMOUS + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [int(value) for value in result.stdout.split()]


def _big(folder: Path) -> None:
    """A Mixtral with 4 layers of 16 experts of 1.5 M weights: 384 MiB in float32."""
    save_tiny(
        "mixtral",
        folder,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_local_experts=16,
    )


def _as_is(checkpoint: Path) -> Path:
    return checkpoint


def _as_gguf(checkpoint: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    write_gguf(checkpoint / "q.gguf", model, lambda name: GGMLQuantizationType.Q4_0)
    return checkpoint / "q.gguf"


LONG = [pytest.param(form, marks=pytest.mark.long) for form in (make_fp8, _as_gguf)]


@pytest.mark.parametrize("form", [_as_is, *LONG])
def test_making_a_pack_holds_at_most_a_layer(form: Callable[[Path], Path], tmp_path: Path) -> None:
    _big(tmp_path / "checkpoint")
    source = form(tmp_path / "checkpoint")
    before, peak = _run(
        """
import sys, threading, time
from offload.pack.find import find_or_make_pack
from offload.options import LoadOptions
from offload.quant.hqq import quantize
import torch
quantize(torch.randn(128, 512), 4, 64)  # what libraries take when first used is theirs
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
find_or_make_pack(sys.argv[1], LoadOptions(pack_dir=sys.argv[2]))
done.set()
thread.join()
print(before, peak)
""",
        str(source),
        str(tmp_path / "packs"),
    )
    layer_bytes = 16 * 3 * 512 * 1024 * 4
    assert peak - before < layer_bytes


def test_loading_holds_dense_weights_and_slots(tmp_path: Path) -> None:
    _big(tmp_path / "checkpoint")
    script = """
import sys
import offload, offload.loading, torch
slots, where, packs = int(sys.argv[1]), sys.argv[2], sys.argv[3]
before = anonymous()
model, _ = offload.load(where, expert_slots=slots, expert_bits=16, device="cpu", pack_dir=packs)
with torch.inference_mode():
    for start in range(8):
        model(torch.arange(16)[None] * 5 + start)
dense = sum(p.nbytes for p in model.parameters())
print(before, anonymous(), dense, slots * model.offload.pack.info.slot_bytes)
"""
    where, packs = str(tmp_path / "checkpoint"), str(tmp_path / "packs")
    _run(script, "2", where, packs)  # makes the pack
    # all 64 experts are 384 MiB: two slots must not cost that
    before, after, dense, slot_bytes = _run(script, "2", where, packs)
    assert after - before < dense + slot_bytes + 300 * MIB


def test_fused_checkpoints_are_read_an_expert_at_a_time(tmp_path: Path) -> None:
    """A tensor of all experts is sliced, not read whole."""
    from offload.model.formats.safetensors import SafetensorsSource

    save_file({"fused": torch.arange(24.0).view(4, 2, 3)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert torch.equal(source.read_slice("fused", 2), torch.arange(12.0, 18.0).view(1, 2, 3))
