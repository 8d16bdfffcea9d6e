"""The CUDA transfer and the engine on a GPU. Skipped where there is none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
from offload.budget.budget import hold_vram
from offload.engine.handle import offload_of
from offload.generation.decode import Loops
from offload.options import LoadOptions
from offload.pack.find import find_or_make_pack
from offload.quant.pack import Pack
from offload.transfer.cuda import CudaLink, CudaTicket, CudaTransfer
from offload.transfer.host_tier import HostTier
from offload.transfer.memory import PAGE, CudaPinner, own_memory
from tests.tiny import EXPERTS, K, save_tiny

DEVICE = torch.device("cuda", 0)

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
    pack = Pack(find_or_make_pack(str(tmp_path / "checkpoint"), LoadOptions(pack_dir=tmp_path)))
    layer_bytes = EXPERTS * pack.info.slot_bytes
    for ram in (
        1 << 40,
        layer_bytes,
        0,
    ):  # all pinned; a part, the rest on disk; the least
        transfer = CudaTransfer(pack, 4, torch.device("cuda"), ram)
        for slot, (layer, expert) in enumerate([(0, 1), (2, 7), (1, 0), (2, 3)]):
            ticket = transfer.start(layer, expert, slot, urgent=True)
            transfer.wait(ticket)
            assert torch.equal(transfer.slot(slot).cpu(), pack.record(layer, expert))
        transfer.close()
    pack.close()


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    save_tiny("mixtral", tmp_path / "checkpoint")
    opened = Pack(find_or_make_pack(str(tmp_path / "checkpoint"), LoadOptions(pack_dir=tmp_path)))
    yield opened
    opened.close()


def test_what_cuda_refuses_to_pin_is_told_and_leaves_no_error_behind() -> None:
    pinner, memory = CudaPinner(DEVICE), own_memory(PAGE)
    assert pinner.pin(memory.data_ptr(), PAGE, read_only=False) is None
    assert "CUDA error" in str(pinner.pin(memory.data_ptr(), PAGE, read_only=False))
    assert int(torch.ones(10, device=DEVICE).sum()) == 10  # checks for pending errors
    pinner.unpin(memory.data_ptr(), PAGE)
    assert pinner.pin(memory.data_ptr(), PAGE, read_only=False) is None
    pinner.unpin(memory.data_ptr(), PAGE)


def test_the_host_tier_pins_and_says_how_fast_each_way_is(pack: Pack) -> None:
    tier = HostTier(pack, 1 << 40, CudaPinner(DEVICE), CudaLink(DEVICE).rate)
    assert tier.pinned
    assert "GB/s" in tier.description
    assert tier.record(1, 3).is_pinned()
    assert tier.pinned
    target = torch.empty_like(tier.record(1, 3), device=DEVICE)
    target.copy_(tier.record(1, 3), non_blocking=True)
    assert torch.equal(target.cpu(), pack.record(1, 3))
    tier.close()
    assert not pack.record(1, 3).is_pinned()


def test_closing_unregisters_everything(pack: Pack) -> None:
    for _ in range(3):  # what stayed registered would be refused the next time
        transfer = CudaTransfer(pack, 4, DEVICE, 1 << 40)
        assert transfer.tier.pinned
        transfer.close()


def test_a_demand_is_done_before_the_guesses_begun_before_it(pack: Pack) -> None:
    """Of many large copies: those of this test come from one buffer, whatever a record's size."""
    link = CudaLink(DEVICE)
    source = torch.empty(64 << 20, dtype=torch.uint8).pin_memory()
    targets = torch.empty(9, 64 << 20, dtype=torch.uint8, device=DEVICE)
    guesses = [link.copy(targets[i], source, urgent=False, after=()) for i in range(8)]
    _, demand = link.copy(targets[8], source, urgent=True, after=())
    demand.synchronize()
    assert not guesses[-1][1].query()
    link.synchronize()


@pytest.mark.parametrize("ram", [1 << 40, 0])
def test_random_copies_arrive_in_the_right_slots(pack: Pack, ram: int) -> None:
    chooser = random.Random(0)
    transfer = CudaTransfer(pack, 5, DEVICE, ram)
    waiting: dict[int, tuple[CudaTicket, int, int]] = {}
    seen: list[tuple[torch.Tensor, int, int]] = []
    for _ in range(400):
        slot = chooser.randrange(5)
        ticket, layer, expert = waiting.pop(slot, (None, 0, 0))
        if ticket is not None and chooser.random() < 0.7:
            transfer.wait(ticket)
            seen.append((transfer.slot(slot).clone(), layer, expert))
            transfer.release([slot])
            continue
        if ticket is not None and not ticket.done:
            transfer.drop(ticket)
        key = chooser.randrange(len(pack.info.layers)), chooser.randrange(EXPERTS)
        waiting[slot] = transfer.start(*key, slot, urgent=chooser.random() < 0.5), *key
    transfer.drain()
    assert len(seen) > 50
    for found, layer, expert in seen:
        assert torch.equal(found.cpu(), pack.record(layer, expert))
    transfer.close()


def test_fewer_slots_take_less_memory(pack: Pack) -> None:
    before = torch.cuda.memory_allocated()
    transfer = CudaTransfer(pack, 20, DEVICE, 1 << 40)
    held = torch.cuda.memory_allocated() - before
    transfer.resize(5, 0)
    assert torch.cuda.memory_allocated() - before < held / 2
    transfer.wait(transfer.start(2, 1, 4, urgent=True))
    assert torch.equal(transfer.slot(4).cpu(), pack.record(2, 1))
    transfer.close()
    assert torch.cuda.memory_allocated() <= before


# A decode loop's step is called three times and captured at the fourth, the prompt's call is the
# first of all. What slots are given back for is captured anew.
@pytest.mark.parametrize(
    ("engine", "calls"),
    [("host", (2, 30, 41)), ("device", (2,)), ("device", (5,)), ("device", (1, 3, 7, 11))],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_when_memory_runs_out_the_answer_is_the_same_with_fewer_slots(
    tmp_path: Path, engine: str, calls: tuple[int, ...], temperature: float
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", dtype=torch.bfloat16)
    model, _ = offload.load(
        tmp_path / "checkpoint",
        device="cuda",
        expert_slots=20,
        engine=engine,
        warm_start=False,
        pack_dir=tmp_path / "packs",
    )
    handle, called, left = offload_of(model), 0, set(calls)

    def tokens() -> list[int]:
        steps = offload.stream_generate(
            model, None, list(range(5, 25)), max_new_tokens=60, temperature=temperature, seed=3
        )
        return [step.token for step in steps]

    def hook(*_: object) -> None:
        nonlocal called
        called += 1
        if called in left:
            left.discard(called)
            try:
                torch.empty(1 << 45, dtype=torch.uint8, device=DEVICE)
            except torch.OutOfMemoryError:  # of so much that all slots would be given back
                raise torch.OutOfMemoryError("out of memory") from None

    expected = tokens()
    if handle.decoding is not None:
        handle.decoding = Loops(handle.engine, handle.engine.device)  # which captures again
    model.model.layers[1].self_attn.register_forward_hook(hook)
    assert tokens() == expected
    assert not left
    assert 2 * K <= handle.engine.cache.table.slots < 20
    if engine == "device":
        assert handle.decoding.loop.replay.graph is not None
    handle.close()


def test_torch_is_held_to_what_vram_says(tmp_path: Path) -> None:
    held = torch.cuda.memory_reserved()
    hold_vram(DEVICE, 256 << 20)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(held + (512 << 20), dtype=torch.uint8, device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
