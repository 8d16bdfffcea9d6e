"""The CUDA transfer and the engine on a GPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.cuda_transfer import CudaTransfer
from offload.handle import offload_of
from offload.packs import find_or_make_pack
from offload.recipe import Recipe
from quant.pack import Pack
from tests.tiny import EXPERTS, K, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _generate(folder: Path, **options: object) -> torch.Tensor:
    model, _ = offload.load(
        folder / "checkpoint", device="cuda", pack_dir=folder / "packs", **options
    )
    ids = torch.arange(5, 25, device="cuda")[None]
    out = model.generate(
        ids, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(out.logits)
    offload_of(model).engine.cache.check_integrity()
    assert offload_of(model).engine.transfer.busy_seconds > 0
    offload_of(model).close()
    return logits


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_logits_are_bit_equal_at_every_cache_size(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", dtype=torch.bfloat16)
    expected = _generate(tmp_path)
    for slots in (1, K, EXPERTS):
        for lookahead in (True, False):
            got = _generate(tmp_path, expert_slots=slots, lookahead=lookahead)
            assert torch.equal(got, expected), f"{slots} slots, look-ahead {lookahead}"


def test_unquantised_logits_are_transformers_own(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, device_map="cuda"
    )
    model, _ = offload.load(
        tmp_path / "checkpoint",
        device="cuda",
        expert_bits=16,
        expert_slots=3,
        pack_dir=tmp_path / "packs",
    )
    ids = torch.arange(5, 25, device="cuda")[None]
    with torch.inference_mode():
        difference = (model(ids).logits - reference(ids).logits).abs().max()
    assert float(difference) < 1e-4
    offload_of(model).close()


def test_records_arrive_from_pinned_and_from_mapped_memory(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    pack = Pack(find_or_make_pack(str(tmp_path / "checkpoint"), Recipe(), pack_dir=tmp_path))
    layer_bytes = EXPERTS * pack.info.slot_bytes
    for ram in (None, layer_bytes, 0):  # all layers, one, none in pinned memory
        transfer = CudaTransfer(pack, 4, torch.device("cuda"), ram)
        for slot, (layer, expert) in enumerate([(0, 1), (2, 7), (1, 0), (2, 3)]):
            ticket = transfer.start(layer, expert, slot, urgent=True)
            transfer.wait(ticket)
            assert torch.equal(transfer.slot(slot).cpu(), pack.record(layer, expert))
        transfer.close()
    pack.close()
