"""Between two layers of a prompt the link copies experts early; on a fake device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import offload
import offload.engine.host
import offload.loading
import offload.transfer.cards
from offload.cache.decision import Use
from offload.cache.staging import Step
from offload.engine.compute import OneByOne
from offload.engine.handle import offload_of
from offload.engine.layer import Call
from offload.fit import Fit
from offload.generation.stream import forward
from offload.quant.pack import Pack
from offload.transfer.cuda import CudaTransfer
from offload.transfer.host_tier import HostTier
from tests.fake_link import FakeLink
from tests.offload.transfer.test_host_tier import EVERYTHING, Limited, same_rate
from tests.tiny import EXPERTS, LAYERS

FEW = 0  # RAM for the fewest buffers a disk tier has
PROMPT = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(4))
Load = Callable[..., PreTrainedModel]


class Watched(CudaTransfer):
    """Keeps a list of the copies given to the link."""

    def watch(self) -> list[tuple[int, int]]:
        self.copies: list[tuple[int, int]] = []
        return self.copies

    def _give(self, ticket: Any, urgent: bool, after: int | None) -> None:
        if hasattr(self, "copies"):
            self.copies.append((ticket.layer, ticket.expert))
        super()._give(ticket, urgent, after)


@pytest.fixture
def load(mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    def played(pack: Pack, fit: Fit, ram: int) -> CudaTransfer:
        link, tier = FakeLink(fit.slots), HostTier(pack, ram, Limited(), same_rate)
        rows = fit.slots + fit.staging
        return Watched(pack, rows, torch.device("cpu"), None, tier=tier, link=link)

    def loaded(slots: int, rows: int = 2, ram: int = EVERYTHING) -> PreTrainedModel:
        monkeypatch.setattr(offload.budget.resolve, "staging_rows", lambda *_: rows)
        with monkeypatch.context() as patch:
            patch.setattr(offload.loading, "transfer_of", lambda pack, fit: played(pack, fit, ram))
            model, _ = offload.load(
                mixtral_pack, device="cpu", expert_slots=slots, warm_start=False, lookahead=False
            )
        return model

    return loaded


def _begin_early(monkeypatch: pytest.MonkeyPatch, *, always: bool) -> None:
    monkeypatch.setattr(offload.engine.host, "nearly_all", lambda *_: always)


def _arrive(model: PreTrainedModel) -> None:
    """Wait for all copies, also for those that no step asked for."""
    offload_of(model).engine.settle()


def _transfer(model: PreTrainedModel) -> Watched:
    transfer = offload_of(model).engine.transfer
    assert isinstance(transfer, Watched)
    return transfer


@pytest.mark.parametrize("rows", [2, 6])
def test_the_link_does_not_rest_between_two_layers(
    load: Load, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    def borders(model: PreTrainedModel) -> list[int]:
        """How many copies were given for a layer before its router answered."""
        given, copies = [], _transfer(model).watch()
        for layer in offload_of(model).engine.layers:
            layer.module.register_forward_pre_hook(
                lambda *_, at=layer.index: given.append(sum(of == at for of, _ in copies))
            )
        forward(model, PROMPT, None)
        return given

    assert borders(load(6, rows)) == [0, *[min(rows, EXPERTS)] * (LAYERS - 1)]
    _begin_early(monkeypatch, always=False)
    assert borders(load(6, rows)) == [0] * LAYERS


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_logits_are_those_without_early_copies_and_every_expert_crosses_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, rows: int, ram: int
) -> None:
    def logits(model: PreTrainedModel) -> Tensor:
        out = []
        for at in (0, 25):  # a second prompt, after a few tokens of decoding
            copies = _transfer(model).watch()
            before = offload_of(model).stats()
            last, cache = forward(model, PROMPT[:, at : at + 35], None)
            _arrive(model)
            counts = (offload_of(model).stats() - before).counts
            assert max(Counter(copies).values()) == 1
            assert len(copies) == counts.loads
            assert counts.loads == counts.misses + counts.early_loads_wrong - counts.dropped
            assert counts.dropped == 0 or ram == FEW, "not read from the disk yet"
            early.append(counts.early_loads)
            out.append(last)
            for token in range(5):
                last, cache = forward(model, PROMPT[:, token : token + 1], cache)
                out.append(last)
        offload_of(model).engine.cache.check_integrity()
        return torch.stack(out)

    early: list[int] = []
    _begin_early(monkeypatch, always=True)
    found = {slots: logits(load(slots, rows, ram)) for slots in (1, 5, 13)}
    assert all(early)
    resident = {}
    with monkeypatch.context() as patch:
        _begin_early(patch, always=False)
        for slots in found:
            early.clear()
            model = load(slots, rows, ram)
            assert torch.equal(found[slots], logits(model))
            assert not any(early)
            table = offload_of(model).engine.cache.table
            resident[slots] = [table.key_in(slot) for slot in range(slots)]
    for slots, expected in resident.items():
        model = load(slots, rows, ram)
        logits(model)
        table = offload_of(model).engine.cache.table
        assert [table.key_in(slot) for slot in range(slots)] == expected, "decode's cache differs"


def test_early_copies_that_were_wrong_are_counted(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin_early(monkeypatch, always=True)
    model = load(4, rows=8)
    copies = _transfer(model).watch()
    forward(model, PROMPT[:, :2], None)
    _arrive(model)
    stats = offload_of(model).stats()
    assert stats.counts.early_loads_wrong > 0
    assert stats.counts.loads == len(copies)
    assert stats.bytes_loaded == len(copies) * offload_of(model).engine.record_bytes(0)


def test_a_guess_on_its_way_does_not_overwrite_what_is_kept(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.transfer.cuda, "GUESSED_BYTES", 1)  # all guesses but one wait
    model = load(9, rows=8)
    engine = offload_of(model).engine
    keep, slots = engine.host._keep, []

    def behind_guesses(call: Call, step: Step) -> None:
        for kept in step.kept:
            for expert in (kept.expert - 1, kept.expert - 2):  # that nobody wants any more
                use = Use(expert % EXPERTS, kept.slot)
                engine.host._start(call.layer.index, use, urgent=False)
            slots.append(kept.slot)
        keep(call, step)

    monkeypatch.setattr(engine.host, "_keep", behind_guesses)
    forward(model, PROMPT, None)
    _arrive(model)
    _transfer(model).drain()
    for slot in slots:
        key = engine.cache.table.key_in(slot)
        assert key is not None
        assert torch.equal(_transfer(model).slot(slot), offload_of(model).pack.record(*key))
    assert slots


@pytest.mark.parametrize("part", ["attention", "experts"])
@pytest.mark.parametrize("call", [1, 4, 7])
def test_after_ctrl_c_nothing_wrong_is_believed(
    load: Load, monkeypatch: pytest.MonkeyPatch, part: str, call: int
) -> None:
    """Ctrl-C comes while experts are computed, or in attention, where no step is under way."""
    expected = [_last(load(5), tokens) for tokens in (1, 60)]
    model = load(5)
    engine, copies = offload_of(model).engine, _transfer(model).watch()
    attention = model.get_submodule(f"model.layers.{call % LAYERS}.self_attn")
    where, name = (OneByOne, "run") if part == "experts" else (attention, "forward")
    run, calls = getattr(where, name), 0

    def interrupted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call or part == "attention":
            raise KeyboardInterrupt
        return run(*args, **named)

    for tokens, answer in zip((1, 60), expected, strict=True):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                _last(model, 60)
        assert torch.equal(_last(model, tokens), answer)
        engine.cache.check_integrity()
    _arrive(model)
    assert offload_of(model).stats().counts.loads == len(copies)


def _last(model: PreTrainedModel, tokens: int) -> Tensor:
    return forward(model, PROMPT[:, :tokens], None)[0]
