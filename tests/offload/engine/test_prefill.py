"""Prompts go through the model in chunks, each expert loaded once a chunk, beside the slots."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import offload
from offload.cache.trace.file import read
from offload.cache.trace.replay import recorded_setup, replay
from offload.engine.compute import OneCall
from offload.engine.handle import offload_of
from offload.engine.layer import Call
from offload.errors import OptionError
from offload.generation.stream import forward, stream_generate
from offload.transfer.host import HostTicket, HostTransfer
from tests.tiny import EXPERTS, LAYERS, K, save_tiny

TOTAL = EXPERTS * LAYERS
PROMPT = torch.randint(3, 120, (1, 90), generator=torch.Generator().manual_seed(4))


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    options = {"warm_start": False, **options}
    model, _ = offload.load(
        folder / "checkpoint", device="cpu", pack_dir=folder / "packs", **options
    )
    return model


def _logits(model: PreTrainedModel) -> Tensor:
    """The logits of the prompt's last token and of some tokens after it."""
    ubatch = offload_of(model).fit.ubatch
    out, cache = forward(model, PROMPT, None, ubatch)
    logits = [out]
    for at in range(6):
        out, cache = forward(model, PROMPT[:, at : at + 1], cache, ubatch)
        logits.append(out)
    return torch.stack(logits)


def _streams(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A list that grows by (layer, expert, final slot) with every load that is begun."""
    begun, transfer = [], offload_of(model).engine.transfer
    start, keep = transfer.start, transfer.keep

    def noted(layer: int, expert: int, slot: int, *, urgent: bool) -> Any:
        begun.append((layer, expert, slot))
        return start(layer, expert, slot, urgent=urgent)

    def kept(layer: int, expert: int, row: int, slot: int) -> Any:
        begun.remove((layer, expert, row))
        return keep(layer, expert, row, slot)

    monkeypatch.setattr(transfer, "start", noted)
    monkeypatch.setattr(transfer, "keep", kept)
    return begun


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("ubatch", [90, 32])
def test_logits_of_a_chunk_size_are_bit_equal_at_every_cache_size(
    model_type: str, ubatch: int, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", dtype=torch.bfloat16)
    whole = _load(tmp_path, ubatch_size=ubatch)
    expected = _logits(whole)
    assert offload_of(whole).stats().counts.streamed == 0
    for slots, lookahead in itertools.product((1, K, TOTAL // 2), (True, False)):
        model = _load(tmp_path, ubatch_size=ubatch, expert_slots=slots, lookahead=lookahead)
        assert torch.equal(_logits(model), expected), f"{slots} slots, look-ahead {lookahead}"
        assert offload_of(model).stats().counts.streamed > 0
        offload_of(model).engine.cache.check_integrity()
        offload_of(model).close()


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma4", "qwen3_next"])
def test_a_prompt_in_chunks_says_what_a_whole_one_says(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    model = _load(tmp_path, expert_bits=16, expert_slots=5)
    with torch.inference_mode():
        whole = model(PROMPT).logits[:, -1]
    for ubatch in (32, 7):
        assert torch.allclose(forward(model, PROMPT, None, ubatch)[0], whole, atol=1e-4)


def test_a_model_whose_states_cannot_go_on_in_chunks_reads_a_prompt_whole(tmp_path: Path) -> None:
    save_tiny("jamba", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_bits=16, ubatch_size=16, context=128)
    assert offload_of(model).fit.ubatch == 128
    ids = PROMPT[0].tolist()
    with torch.inference_mode():
        expected = int(model(PROMPT).logits[0, -1].argmax())
    (step,) = stream_generate(model, None, ids, max_new_tokens=1)
    assert step.token == expected


def test_each_expert_crosses_the_link_once_a_chunk_and_the_next_ones_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=6, lookahead=False)
    begun = _streams(model, monkeypatch)
    for chunk in (PROMPT[:, :60], PROMPT[:, 60:]):
        begun.clear()
        before = offload_of(model).stats()
        forward(model, chunk, None)
        stats = offload_of(model).stats() - before
        assert max(Counter((layer, expert) for layer, expert, _ in begun).values()) == 1
        assert stats.counts.misses + stats.counts.early_loads_wrong == len(begun)
        assert stats.counts.early_loads_right > stats.counts.early_loads_wrong
        assert stats.counts.hits + stats.counts.misses == stats.counts.requests
        beside = sum(slot >= 6 for _, _, slot in begun)
        assert stats.counts.streamed + stats.counts.early_loads_wrong == beside
        size = offload_of(model).engine.record_bytes(0)
        # An early load that turned out wrong may be given up before its copy begins.
        assert stats.bytes_loaded == (len(begun) - stats.counts.dropped) * size
        assert stats.bytes_in_place == beside * size


def test_a_prompt_does_not_flush_what_decode_holds(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=TOTAL // 2, lookahead=False)
    _logits(model)
    cache = offload_of(model).engine.cache
    held = {(i, e) for i in range(LAYERS) for e in range(EXPERTS) if cache.is_resident(i, e)}
    forward(model, PROMPT.flip(1), None)
    left = sum(not cache.is_resident(*key) for key in held)
    assert left <= K * LAYERS


def test_replay_streams_what_the_live_run_streams(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    for slots in (1, 7, TOTAL):
        model = _load(
            tmp_path,
            expert_slots=slots,
            lookahead=True,
            ubatch_size=32,
            trace=tmp_path / "trace",
        )
        _logits(model)
        offload_of(model).close()
        live = offload_of(model).stats()
        trace = read(tmp_path / "trace")
        outcome = replay(trace, recorded_setup(trace))
        for name in ("hits", "misses", "streamed", "evictions"):
            assert getattr(outcome.counts, name) == getattr(live.counts, name), name
        assert (live.counts.streamed > 0) == (slots < TOTAL)


def test_a_smaller_ubatch_leaves_room_for_more_experts(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", max_position_embeddings=2048)
    slots = []
    for ubatch in (2000, 64):
        model = _load(tmp_path, expert_bits=16, ram="204MiB", context=2000, ubatch_size=ubatch)
        slots.append(offload_of(model).fit.slots)
        offload_of(model).close()
    assert slots[0] < slots[1]
    with pytest.raises(OptionError, match="ubatch_size: 0"):
        _load(tmp_path, ubatch_size=0)


def test_bytes_loaded_are_the_bytes_copied_even_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=5, lookahead=True, policy="lru")
    engine = offload_of(model).engine
    copied: list[tuple[int, int]] = []
    kept = 0  # read early where they are mapped, and copied then: one load
    keep = engine.transfer.keep

    def noted(*given: int) -> Any:
        nonlocal kept
        kept += 1
        return keep(*given)

    monkeypatch.setattr(engine.transfer, "keep", noted)

    copy = HostTransfer._copy

    def copying(transfer: HostTransfer, ticket: HostTicket) -> None:
        copied.append((ticket.layer, ticket.expert))  # first: whoever waits goes on when it is done
        copy(transfer, ticket)

    monkeypatch.setattr(HostTransfer, "_copy", copying)
    _logits(model)
    for uses in range(1, 16, 3):
        with monkeypatch.context() as patch:
            patch.setattr(OneCall, "run", interrupted_run(uses))
            with pytest.raises(KeyboardInterrupt):
                _logits(model)
        _logits(model)
        engine.settle()
        stats = offload_of(model).stats()
        assert stats.bytes_loaded == (len(copied) - kept) * engine.record_bytes(0)


def interrupted_run(runs: int) -> Any:
    """`OneCall.run`, which raises `KeyboardInterrupt` in layer 1 after so many calls."""
    left, run = iter(range(runs)), OneCall.run

    def counted(self: OneCall, call: Call, *rest: Any) -> None:
        if call.layer.index == 1 and next(left, None) is None:
            raise KeyboardInterrupt
        run(self, call, *rest)

    return counted


def test_what_was_hot_is_loaded_again_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=9)
    _logits(model)
    engine = offload_of(model).engine
    hottest = engine.cache.heat.hottest(9)

    with monkeypatch.context() as patch:
        patch.setattr(OneCall, "run", interrupted_run(0))
        with pytest.raises(KeyboardInterrupt):
            forward(model, PROMPT[:, :1], None)
    before = offload_of(model).stats()
    forward(model, PROMPT[:, :1], None)
    counts = (offload_of(model).stats() - before).counts
    assert counts.warm_loads == 9
    assert sum(engine.cache.is_resident(*key) for key in hottest) >= 9 - K * LAYERS


def test_a_thread_waits_for_the_step_that_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C three threads use the model, and still one step runs at a time."""
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, expert_slots=5)
    expected = _logits(model)
    compute, inside, most, interrupted = OneCall.run, [0], [0], [False]

    def counted(*given: Any) -> None:
        if interrupted[0]:
            interrupted[0] = False
            raise KeyboardInterrupt
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            compute(*given)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(OneCall, "run", counted)
    got: list[Tensor] = []

    def run() -> None:
        with torch.inference_mode():
            got.append(_logits(model))

    for _ in range(3):
        interrupted[0] = True
        with pytest.raises(KeyboardInterrupt):
            _logits(model)
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]
    assert all(torch.equal(logits, expected) for logits in got)
    assert len(got) == 9
