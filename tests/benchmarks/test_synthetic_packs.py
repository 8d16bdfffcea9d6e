"""Synthetic packs open like any other, and run on a machine that has no quantiser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import offload
from benchmarks.synthetic_packs import pack_bytes, random_record, write_synthetic_pack
from offload.engine.handle import offload_of
from offload.generation.stream import forward
from offload.quant.pack import Pack, PackLayer
from offload.quant.record import MatrixSpec, plan_layout, view_record
from offload.quant.scheme import Scheme
from tests.tiny import tiny_config


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(2, 16, 8), Scheme(16)])
def test_a_model_of_random_codes_stays_finite(
    model_type: str, scheme: Scheme, tmp_path: Path
) -> None:
    write_synthetic_pack(tmp_path / "pack", tiny_config(model_type), scheme)
    model, tokenizer = offload.load(tmp_path / "pack", device="cpu", expert_slots="50%")
    assert tokenizer is None
    logits, _ = forward(model, torch.arange(5, 30)[None], None)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    offload_of(model).close()


def test_layers_share_a_file_and_every_record_matches_its_checksum(tmp_path: Path) -> None:
    info = write_synthetic_pack(tmp_path / "pack", tiny_config("mixtral"), Scheme(4))
    pack = Pack(tmp_path / "pack")
    for layer, about in enumerate(info.layers):
        for expert in range(about.num_experts):
            pack.check_record(layer, expert)
    files = {
        (tmp_path / "pack" / PackLayer.file_name(i)).stat().st_ino for i in range(len(info.layers))
    }
    assert len(files) == 1
    pack.close()


def test_sizes_are_known_before_anything_is_written(tmp_path: Path) -> None:
    layer_bytes, record_bytes, beside = pack_bytes(tiny_config("mixtral"), Scheme(4))
    info = write_synthetic_pack(tmp_path / "pack", tiny_config("mixtral"), Scheme(4))
    assert layer_bytes * len(info.layers) == info.expert_bytes
    assert record_bytes == info.slot_bytes
    assert beside == info.dense_bytes(2)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_keep_a_states_size(bits: int) -> None:
    from offload.quant.matmul import dequantize

    layout = plan_layout((MatrixSpec("m", 128, 256, False, torch.bfloat16),), Scheme(bits, 32))
    record = random_record(layout, torch.Generator().manual_seed(1))
    weight = dequantize(view_record(record, layout)["m"], torch.float32)
    assert weight.std() == pytest.approx(256**-0.5, rel=0.25)


BARE = """
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("hqq", "llvmlite", "gguf", "prompt_toolkit", "hypothesis", "matplotlib")
        return None if name in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import offload
from offload import stream_generate
model, tokenizer = offload.load(sys.argv[1], device="cpu", expert_slots="50%")
steps = list(stream_generate(model, tokenizer, [3, 4, 5], max_new_tokens=3))
assert len(steps) == 3
"""


def test_a_pack_runs_where_nothing_can_quantise_or_compile(tmp_path: Path) -> None:
    write_synthetic_pack(tmp_path / "pack", tiny_config("mixtral"), Scheme(4))
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "pack")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]
