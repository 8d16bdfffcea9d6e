"""The GPU's transfer over `FakeLink`, which plays the device: order, buffers, failures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
import offload.loading
import offload.transfer.cards
import offload.transfer.cuda as cuda_module
from offload.errors import TransferError
from offload.fit import Fit
from offload.quant.errors import PackError
from offload.quant.pack import Pack
from offload.transfer.cuda import CudaTicket, CudaTransfer
from offload.transfer.host_tier import HostTier
from tests.fake_link import FakeLink
from tests.offload.transfer.test_host_tier import EVERYTHING, Limited, damaged, same_rate
from tests.tiny import EXPERTS, LAYERS

CPU = torch.device("cpu")
FEW = 0  # RAM for the fewest buffers a disk tier has


@pytest.fixture
def pack(mixtral_pack: Path) -> Iterator[Pack]:
    opened = Pack(mixtral_pack)
    yield opened
    opened.close()


def transfer_of(pack: Pack, slots: int, ram: int, link: FakeLink) -> CudaTransfer:
    tier = HostTier(pack, ram, Limited(), same_rate)
    return CudaTransfer(pack, slots, CPU, 0, tier=tier, link=link)


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
def test_slot_holds_the_record_after_wait(pack: Pack, ram: int) -> None:
    transfer = transfer_of(pack, 3, ram, FakeLink())
    for slot, (layer, expert) in enumerate([(0, 1), (2, 7), (1, 0)]):
        transfer.wait(transfer.start(layer, expert, slot, urgent=True))
        assert torch.equal(transfer.slot(slot), pack.record(layer, expert))
    assert transfer.busy_seconds > 0
    transfer.close()


def test_kernels_are_told_where_the_records_are_only_if_ram_holds_all(pack: Pack) -> None:
    whole, few = (transfer_of(pack, 3, ram, FakeLink()) for ram in (EVERYTHING, FEW))
    addresses = whole.addresses()
    assert addresses is not None
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            record = whole.tier.record(layer, expert)
            assert torch.equal(record, pack.record(layer, expert))
            assert addresses[layer, expert] == record.data_ptr()
    assert few.addresses() is None
    whole.close()
    few.close()


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
@pytest.mark.parametrize("seed", range(12))
def test_compute_sees_the_right_bytes_whatever_the_device_does_first(
    pack: Pack, ram: int, seed: int
) -> None:
    """Loads, guesses, drops and releases as an engine makes them, over a device that lags."""
    chooser, link = random.Random(seed), FakeLink(seed, eager=False)
    slots = 5
    transfer = transfer_of(pack, slots, ram, link)
    tickets: dict[int, tuple[CudaTicket, int, int]] = {}  # slot -> not awaited
    compared = []

    def check(slot: int, layer: int, expert: int) -> None:
        compared.append(torch.equal(transfer.slot(slot), pack.record(layer, expert)))

    for _ in range(150):
        slot = chooser.randrange(slots)
        if slot in tickets and chooser.random() < 0.6:
            ticket, layer, expert = tickets.pop(slot)
            transfer.wait(ticket)
            link.compute(lambda s=slot, n=layer, e=expert: check(s, n, e))  # type: ignore[misc]
            transfer.release([slot])
            continue
        before = tickets.pop(slot, None)
        if before is not None and not before[0].done:
            transfer.drop(before[0])
        key = chooser.randrange(LAYERS), chooser.randrange(EXPERTS)
        tickets[slot] = transfer.start(*key, slot, urgent=chooser.random() < 0.5), *key
    link.synchronize()
    assert len(compared) > 20
    assert all(compared)
    if transfer.tier.disk is not None:
        transfer.tier.disk.pool.check_integrity()
    transfer.close()


def test_a_guess_not_begun_is_dropped_and_its_slot_used_by_another(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FakeLink(eager=False)
    link.stands_still = True
    monkeypatch.setattr(cuda_module, "GUESSED_BYTES", 1)  # one guess at a time
    transfer = transfer_of(pack, 4, EVERYTHING, link)
    first, second = (transfer.start(0, e, e, urgent=False) for e in (0, 1))
    assert not transfer.drop(first)
    assert transfer.drop(second)
    assert second.done
    transfer.wait(transfer.start(0, 5, 1, urgent=True))
    link.synchronize()
    assert torch.equal(transfer.slot(1), pack.record(0, 5))
    transfer.close()


def test_an_urgent_copy_into_the_slot_of_a_guess_under_way_comes_after_the_guess(
    pack: Pack,
) -> None:
    for seed in range(20):
        link = FakeLink(seed, eager=False)
        transfer = transfer_of(pack, 2, EVERYTHING, link)
        guess = transfer.start(0, 0, 0, urgent=False)
        transfer.drop(guess)
        transfer.start(1, 1, 0, urgent=True)
        link.synchronize()
        assert torch.equal(transfer.slot(0), pack.record(1, 1))
        transfer.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_kept_record_comes_after_the_copies_under_way_and_before_later_ones(
    pack: Pack, seed: int
) -> None:
    link = FakeLink(seed, eager=False)
    transfer = transfer_of(pack, 3, EVERYTHING, link)
    seen = []

    def look(slot: int, layer: int, expert: int) -> None:
        link.compute(
            lambda: seen.append(torch.equal(transfer.slot(slot), pack.record(layer, expert)))
        )

    transfer.drop(transfer.start(0, 0, 0, urgent=False))
    transfer.wait(transfer.start(0, 1, 2, urgent=True))
    transfer.keep(0, 1, 2, 0)
    look(0, 0, 1)
    later = [transfer.start(0, 5, 2, urgent=True)]
    look(0, 0, 1)
    transfer.release([0])
    later.append(transfer.start(1, 6, 0, urgent=True))
    for ticket in later:
        transfer.wait(ticket)
    look(2, 0, 5)
    look(0, 1, 6)
    link.synchronize()
    assert seen == [True] * 4
    transfer.close()


def test_a_guess_waits_on_the_device_for_earlier_urgent_copies_and_none_of_them_waits_for_it(
    pack: Pack,
) -> None:
    link = FakeLink(eager=False)
    link.stands_still = True
    transfer = transfer_of(pack, 4, EVERYTHING, link)
    first = transfer.start(0, 0, 0, urgent=True)
    transfer.start(0, 1, 1, urgent=False)
    transfer.start(0, 2, 2, urgent=True)
    urgent, guesses = link.queues["urgent"], link.queues["guesses"]
    assert [after for after, _ in guesses] == [[first.end], ()]
    assert not any(after for after, _ in urgent)
    transfer.close()


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
def test_after_a_drain_nothing_is_under_way_and_work_goes_on(pack: Pack, ram: int) -> None:
    link = FakeLink(eager=False)
    transfer = transfer_of(pack, 8, ram, link)
    for expert in range(EXPERTS):
        transfer.start(0, expert, expert, urgent=expert % 2 == 0)
    transfer.drain()
    transfer.wait(transfer.start(2, 2, 3, urgent=True))
    link.synchronize()
    assert torch.equal(transfer.slot(3), pack.record(2, 2))
    transfer.close()


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
def test_resized_slots_are_filled_anew(pack: Pack, ram: int) -> None:
    transfer = transfer_of(pack, 8, ram, FakeLink())
    transfer.wait(transfer.start(0, 1, 7, urgent=True))
    transfer.resize(3, 2)
    assert transfer.slots.shape[0] == 5
    transfer.wait(transfer.start(0, 2, 2, urgent=True))
    assert torch.equal(transfer.slot(2), pack.record(0, 2))
    transfer.close()


def test_without_room_for_the_slots_nothing_is_pinned(pack: Pack) -> None:
    link = FakeLink()
    link.memory_left = 10
    with pytest.raises(torch.OutOfMemoryError):
        CudaTransfer(pack, 4, CPU, 0, link=link)  # a CPU has no CUDA to pin memory with


def test_closing_unpins_when_the_last_transfer_closes(pack: Pack) -> None:
    pinner = Limited()
    tier = HostTier(pack, EVERYTHING, pinner, same_rate)
    first, second = (
        CudaTransfer(pack, 2, CPU, 0, tier=tier, link=FakeLink(seed)) for seed in (1, 2)
    )
    first.start(0, 0, 0, urgent=True)
    first.close()
    second.wait(second.start(0, 3, 1, urgent=True))
    assert torch.equal(second.slot(1), pack.record(0, 3))
    second.close()
    assert not pinner.held


def test_a_copy_that_could_not_begin_is_reported_to_whoever_waits(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = transfer_of(pack, 3, EVERYTHING, FakeLink())
    given: list[CudaTicket] = []
    give = CudaTransfer._give

    def noted(transfer: CudaTransfer, ticket: CudaTicket, *more: Any) -> None:
        given.append(ticket)
        give(transfer, ticket, *more)

    def changed(*_: object) -> torch.Tensor:
        raise PackError("experts-00000.bin changed")

    monkeypatch.setattr(CudaTransfer, "_give", noted)
    with monkeypatch.context() as patch:
        patch.setattr(transfer.tier, "record", changed)
        with pytest.raises(PackError, match="changed"):
            transfer.start(0, 1, 0, urgent=False)
    with pytest.raises(TransferError, match="ask again"):
        transfer.wait(given[0])
    transfer.drain()
    transfer.wait(transfer.start(0, 1, 0, urgent=True))
    transfer.close()


def test_a_damaged_record_from_the_disk_is_reported_to_whoever_waits(
    mixtral_pack: Path, tmp_path: Path
) -> None:
    transfer = transfer_of(damaged(mixtral_pack, tmp_path / "pack"), 2, FEW, FakeLink())
    ticket = transfer.start(1, 0, 0, urgent=True)
    with pytest.raises(PackError, match=r"experts-00001.*expert 0"):
        transfer.wait(ticket)
    transfer.drain()
    transfer.wait(transfer.start(1, 1, 1, urgent=True))
    transfer.close()


def test_time_on_both_streams_at_once_is_counted_once(pack: Pack) -> None:
    link = FakeLink()
    transfer = transfer_of(pack, 8, EVERYTHING, link)
    for expert in range(EXPERTS):
        transfer.start(0, expert, expert, urgent=expert % 3 == 0)
    link.synchronize()
    assert 0 < transfer.busy_seconds <= link._clock / 1e3
    transfer.close()


@pytest.mark.parametrize(
    ("order", "busy"), [("gugu", 3), ("ugug", 3), ("gguu", 2), ("uugg", 2), ("guug", 3)]
)
def test_time_on_either_stream_is_counted_whichever_copy_began_first(
    pack: Pack, order: str, busy: int
) -> None:
    link = FakeLink(eager=False)
    link.stands_still = True
    transfer = transfer_of(pack, 2, EVERYTHING, link)
    for slot, urgent in enumerate((False, True)):
        transfer.start(0, slot, slot, urgent=urgent)
    for stream in order:  # begins or ends its copy
        link._clock += 1.0
        link.queues["guesses" if stream == "g" else "urgent"].popleft()[1]()
    assert transfer.busy_seconds == pytest.approx(busy / 1e3)
    transfer.close()


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
def test_an_engine_over_it_gives_the_same_logits(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch, ram: int
) -> None:
    ids = torch.arange(5, 30)[None]

    def logits(slots: int) -> torch.Tensor:
        model, _ = offload.load(mixtral_pack, device="cpu", expert_slots=slots, warm_start=False)
        out = model.generate(
            ids, max_new_tokens=12, output_logits=True, return_dict_in_generate=True
        )
        model.offload.engine.cache.check_integrity()
        model.offload.close()
        return torch.stack(out.logits)

    expected = logits(EXPERTS * LAYERS)

    def played(pack: Pack, fit: Fit) -> CudaTransfer:
        return transfer_of(pack, fit.slots + fit.staging, ram, FakeLink(fit.slots))

    monkeypatch.setattr(offload.loading, "transfer_of", played)
    for slots in (1, 3, 7, 13):
        assert torch.equal(logits(slots), expected)


def test_slots_that_were_computed_together_are_released_by_one_event(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FakeLink(eager=False)
    transfer = transfer_of(pack, 3, EVERYTHING, link)
    events = []
    computed = link.computed
    monkeypatch.setattr(link, "computed", lambda: events.append(computed()) or events[-1])
    transfer.release([0, 1, 2])
    link.stands_still = True
    tickets = [transfer.start(0, slot, slot, urgent=True) for slot in range(3)]
    assert len(events) == 1
    tickets[2].end.synchronize()  # type: ignore[union-attr]
    assert events[0].at is not None
    transfer.close()


def test_a_buffer_that_another_card_is_done_with_is_had(pack: Pack) -> None:
    tier = HostTier(pack, FEW, Limited(), same_rate)
    assert tier.disk is not None
    one, other = (CudaTransfer(pack, EXPERTS, CPU, 0, tier=tier, link=FakeLink()) for _ in range(2))
    guesses = [one.start(0, expert, expert, urgent=False) for expert in range(EXPERTS)]
    for _ in range(3):  # their copies hold every buffer, and nobody calls `one` again
        other.wait(other.start(1, 0, 0, urgent=True))
    assert torch.equal(other.slot(0), pack.record(1, 0))
    for ticket in guesses:
        one.wait(ticket)
        assert torch.equal(one.slot(ticket.slot), pack.record(0, ticket.expert))
    tier.disk.pool.check_integrity()
    one.close()
    other.close()


@pytest.mark.parametrize("ram", [EVERYTHING, FEW])
def test_two_of_them_over_one_host_tier_give_the_logits_of_one(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch, ram: int
) -> None:
    ids = torch.arange(5, 30)[None]
    options: dict[str, Any] = {"warm_start": False, "expert_slots": 7}

    def logits(model: Any) -> torch.Tensor:
        out = model.generate(
            ids, max_new_tokens=12, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits)

    model, _ = offload.load(mixtral_pack, device="cpu", **options)
    expected = logits(model)
    model.offload.close()
    pinners = []

    def played(
        _: torch.device, pack: Pack, slots: int, fit: Fit, tier: HostTier | None
    ) -> CudaTransfer:
        if tier is None:
            pinners.append(Limited())
            tier = HostTier(pack, ram, pinners[-1], same_rate)
        return CudaTransfer(pack, slots + fit.staging, CPU, 0, tier=tier, link=FakeLink(slots))

    monkeypatch.setattr(offload.transfer.cards, "_transfer_to", played)
    model, _ = offload.load(mixtral_pack, gpus=("cpu", "cpu"), **options)
    engine = model.offload.engine
    assert torch.equal(logits(model), expected)
    assert engine.stats().counts.streamed
    engine.give_back(engine.record_bytes(0))
    assert torch.equal(logits(model), expected)
    engine.cache.check_integrity()
    model.offload.close()
    (pinner,) = pinners  # RAM is taken once
    assert not pinner.held
