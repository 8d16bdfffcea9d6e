"""A predictor that is wrong on purpose makes nobody wait, on a link that is slow."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import offload
import offload.transfer.host as transfer_module
from offload.cache.statistics import LayerCounts
from offload.cache.trace.file import read
from offload.cache.trace.trace import Trace
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.engine.layer import Layer
from tests.tiny import EXPERTS, K, save_tiny

PROMPT = torch.arange(5, 25)[None]
COPY_SECONDS = 4e-3


class Oracle:
    """Knows from a trace of the same run what each layer will want; or says the opposite."""

    def __init__(self, trace: Trace, right: bool) -> None:
        self._right = right
        self.engine: Engine | None = None  # of the run that is guessed for
        self._wanted: dict[tuple[int, int], list[int]] = {}  # (layer, tokens so far) -> experts
        tokens = 0
        for event in trace.events:
            tokens += event.tokens if event.layer == 0 else 0
            self._wanted[event.layer, tokens] = event.distinct()

    def guess(self, layer: Layer, _: Tensor) -> list[int]:
        assert self.engine is not None
        wanted = self._wanted[layer.index, self.engine.host.tokens]
        if self._right:
            return wanted
        return [expert for expert in range(EXPERTS) if expert not in wanted][:K]


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record takes `COPY_SECONDS`, in eight chunks when it is not urgent."""
    memmove = ctypes.memmove
    record_bytes = [1]

    def slow(target: int, source: int, size: int) -> int:
        record_bytes[0] = max(record_bytes[0], size)
        time.sleep(COPY_SECONDS * size / record_bytes[0])
        return memmove(target, source, size)

    played = SimpleNamespace(**{**vars(ctypes), "memmove": slow})
    monkeypatch.setattr(transfer_module, "ctypes", played)
    monkeypatch.setattr(transfer_module, "CHUNK", 1 << 10)


def _run(folder: Path, lookahead: bool, oracle: Oracle | None = None) -> LayerCounts:
    model, _ = offload.load(
        folder / "checkpoint",
        device="cpu",
        pack_dir=folder / "packs",
        expert_slots=9,
        lookahead=lookahead,
        warm_start=False,
        trace=None if lookahead else folder / "trace",
    )
    if oracle is not None:
        oracle.engine = offload_of(model).engine
    model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    counts = offload_of(model).stats().counts
    offload_of(model).close()
    return counts


@pytest.mark.usefixtures("slow_link")
@pytest.mark.parametrize("right", [False, True])
def test_guesses_spare_waiting_when_right_and_cost_none_when_wrong(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", dtype=torch.float32)
    without = _run(tmp_path, lookahead=False)
    oracle = Oracle(read(tmp_path / "trace"), right)
    monkeypatch.setattr(Layer, "guess", lambda layer, hidden: oracle.guess(layer, hidden))
    guessed = _run(tmp_path, True, oracle)
    assert guessed.requests == without.requests
    assert guessed.lookahead_guesses > 50
    assert guessed.lookahead_recall == float(right)
    if right:
        assert guessed.misses < 0.7 * without.misses
        return
    assert guessed.lookahead_loads < 0.1 * guessed.lookahead_guesses, "they may not load any more"
    assert guessed.misses <= 1.02 * without.misses
    waits = [counts.wait_seconds / counts.misses for counts in (guessed, without)]
    assert waits[0] < 1.25 * waits[1], "seconds a demand load"


def test_urgent_copies_overtake_one_that_is_under_way(
    tmp_path: Path, mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch, slow_link: None
) -> None:
    from offload.quant.pack import Pack

    monkeypatch.setattr(transfer_module, "CHUNK", 1 << 8)
    pack = Pack(mixtral_pack)
    transfer = transfer_module.HostTransfer(pack, 4)
    guess = transfer.start(0, 0, 0, urgent=False)
    time.sleep(COPY_SECONDS / 4)
    demand = transfer.start(0, 1, 1, urgent=True)
    transfer.wait(demand)
    assert not guess.done
    transfer.wait(guess)
    for slot, expert in ((0, 0), (1, 1)):
        record = pack.record(0, expert)
        assert torch.equal(transfer.slot(slot)[: record.numel()], record)
    transfer.close()
    pack.close()


def test_a_dropped_copy_does_not_overwrite_the_one_that_follows(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch, slow_link: None
) -> None:
    from offload.quant.pack import Pack

    monkeypatch.setattr(transfer_module, "CHUNK", 1 << 8)
    pack = Pack(mixtral_pack)
    transfer = transfer_module.HostTransfer(pack, 4)
    for pause in (0.0, COPY_SECONDS / 3, COPY_SECONDS * 2):
        guess = transfer.start(0, 0, 2, urgent=False)
        time.sleep(pause)
        transfer.drop(guess)
        transfer.wait(transfer.start(0, 1, 2, urgent=True))
        time.sleep(2 * COPY_SECONDS)
        record = pack.record(0, 1)
        assert torch.equal(transfer.slot(2)[: record.numel()], record)
    transfer.close()
    pack.close()
