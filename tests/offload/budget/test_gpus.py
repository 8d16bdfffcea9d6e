"""Which cards were asked for, what they may use, and what a model needs there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import offload
import offload.budget.budget
from offload.budget.budget import Memory, kv_cache_bytes, staging_rows
from offload.budget.placement import Layers, demand, device_of, place
from offload.budget.resolve import Place, Resolver, find_place
from offload.errors import BudgetError
from offload.fit import Card, Fit
from offload.model import sources
from offload.model.seam import build_on_meta, model_class, own_config
from offload.options import LoadOptions
from offload.quant.pack import Pack, read_info
from tests.tiny import save_tiny

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says that there are two, with 24 and 12 GiB free."""
    free = {0: 24 * GIB, 1: 12 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (free[at.index or 0], 0))


@pytest.mark.usefixtures("two_gpus")
def test_cards_are_taken_in_the_order_in_which_they_are_named() -> None:
    found = find_place(LoadOptions(gpus="1, 0"))
    assert found.device == torch.device("cuda:1")
    assert [card.number for card in found.cards] == [1, 0]
    assert [card.memory for card in found.cards] == [int(12 * GIB * 0.9), int(24 * GIB * 0.9)]
    assert found.memory.device == sum(card.memory for card in found.cards)
    assert find_place(LoadOptions(gpus=(1, 0), ram="1GiB")).cards == found.cards


@pytest.mark.usefixtures("two_gpus")
def test_vram_is_for_each_card_or_one_size_for_each() -> None:
    def cards(vram: str) -> tuple[Card, ...]:
        return find_place(LoadOptions(gpus="0,1", vram=vram)).cards

    assert [c.memory for c in cards("8GiB")] == [8 * GIB] * 2
    assert [c.memory for c in cards("20GiB,10GiB")] == [20 * GIB, 10 * GIB]
    with pytest.raises(BudgetError, match="3 sizes for 2 GPUs: give one for each"):
        cards("8GiB,8GiB,8GiB")


@pytest.mark.usefixtures("two_gpus")
def test_one_card_of_several_is_used_with_a_word_about_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "offload"):
        assert find_place(LoadOptions(device="cuda:1")).cards == ()
        alone = find_place(LoadOptions(gpus="1", vram="8GiB"))
        assert (alone.device, alone.cards) == (torch.device("cuda:1"), ())
        assert not caplog.records, "who names one card means it"
        assert find_place(LoadOptions()).device == torch.device("cuda:0")
    assert caplog.messages == ["using only GPU 0 of 2: --gpus 0,1 uses all of them"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("0,0", "does not name each GPU once"),
        ("", "is not a list of GPUs: write their numbers like 0,1"),
        ("0,", "is not a list of GPUs"),
        ("cpu,cpu", "is not a list of GPUs"),
        ("٣", "is not a list of GPUs"),
        ("0,7", "device 'cuda:7' is not supported here: use cpu"),
        ((), "does not name each GPU once"),
    ],
)
def test_what_is_no_list_of_cards_is_refused(gpus: str | Sequence[int], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        find_place(LoadOptions(gpus=gpus))


def test_a_device_and_cards_together_are_refused() -> None:
    with pytest.raises(BudgetError, match="both --device and --gpus"):
        find_place(LoadOptions(device="cpu", gpus="0,1"))


def test_two_cpus_have_half_the_memory_each() -> None:
    found = find_place(LoadOptions(gpus=("cpu", "cpu"), ram="4GiB"))
    assert [card.memory for card in found.cards] == [2 * GIB] * 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense_bits", [16, 8])
def test_a_model_in_parts_needs_what_the_whole_needs(
    tied: bool, dense_bits: int, tmp_path: Path
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", tie_word_embeddings=tied)
    model, _ = offload.load(
        tmp_path / "checkpoint", device="cpu", pack_dir=tmp_path, dense_bits=dense_bits
    )
    pack: Pack = model.offload.pack
    config = sources.read_config("tiny", pack.path, trust_remote_code=False)
    cls = model_class(config, "tiny", False)
    whole = build_on_meta(own_config(config, cls), cls)
    needs = demand(whole, pack.info, config, 128, torch.float32, 128, 77)
    layers = needs.blocks
    assert needs.first + needs.last + sum(b.dense for b in layers) == pack.info.dense_bytes(4)
    assert sum(b.kv_cache for b in layers) == sum(kv_cache_bytes(config, 128, torch.float32))
    assert sum(b.experts for b in layers) == pack.info.total_experts
    assert len({block.dense for block in layers}) == 1
    table = model.get_input_embeddings().weight.nbytes if dense_bits == 16 else 0
    assert needs.first >= table
    assert (needs.last < 1000) == tied, "a head that is the table stays with it"
    devices = Layers(whole).device_map(
        place(needs, [GIB, GIB]), (torch.device("cpu"), torch.device("meta"))
    )
    assert device_of("lm_head", devices).type == ("cpu" if tied else "meta")
    assert device_of("model.embed_tokens", devices).type == "cpu"
    assert device_of("model.layers.2.self_attn.q_proj", devices).type == "meta"
    model.offload.close()


def test_too_little_memory_for_two_cards_names_the_one_that_is_short(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    with pytest.raises(
        BudgetError, match=r"not enough memory on GPU \d: .* MiB needed .* raise vram="
    ):
        offload.load(tmp_path / "checkpoint", pack_dir=tmp_path, gpus=("cpu", "cpu"), ram="10MiB")
    assert not list(tmp_path.glob("*-v*")), "no pack is made that cannot be run"


def test_rows_for_prompts_are_counted_on_each_card_unless_every_expert_has_a_slot(
    mixtral_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.budget.budget, "MOST_STAGING_ROWS", 4)
    info = read_info(mixtral_pack)
    config = sources.read_config("tiny", mixtral_pack, trust_remote_code=False)
    cls = model_class(config, "tiny", False)
    whole = build_on_meta(own_config(config, cls), cls)
    devices = [torch.device("cuda", number) for number in range(2)]

    def fit(size: int) -> Fit:
        cards = tuple(Card(number, device, size) for number, device in enumerate(devices))
        memory = Memory(2 * size, GIB)
        asked = LoadOptions(dtype=torch.float32, context=64)
        return Resolver(asked, Place(devices[0], memory, cards)).fit(info, config, whole)

    ample = fit(GIB)
    assert ample.slots == info.total_experts
    assert ample.staging == 0
    beside = [share.dense + share.kv_cache + share.workspace for share in ample.shares]
    rows = staging_rows(devices[0], info.slot_bytes)
    tight = fit(max(beside) + (rows + 3) * info.slot_bytes)
    assert tight.staging == rows
    assert min(share.slots for share in tight.shares) >= 1
    for share, card in zip(tight.shares, tight.cards, strict=True):
        staged = ample.shares[0].workspace + rows * info.slot_bytes
        assert share.workspace == staged
        used = share.dense + share.kv_cache + staged + share.slots * info.slot_bytes
        assert used <= card.memory
