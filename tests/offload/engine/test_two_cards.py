"""A model on two devices answers as on one: two logical CPUs, each with its cache and its link."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import offload
from offload.cache.sharded import ShardedCache
from offload.cache.trace.file import read
from offload.cache.trace.replay import recorded_setup, replay
from offload.engine.engine import make_engine
from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.options import POLICIES
from offload.transfer.cards import CardsTransfer
from tests.tiny import save_tiny

PROMPT = torch.arange(5, 25)[None]
CPUS = ("cpu", "cpu")
ON_SEVERAL = ["the CPU decides what to load: the model is on several GPUs"]


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    if "gpus" not in options:
        options["device"] = "cpu"
    model, _ = offload.load(
        folder / "checkpoint", pack_dir=folder / "packs", warm_start=False, **options
    )
    return model


def _logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of a prompt and of some tokens after it."""
    found, cache, ids = [], None, PROMPT
    with torch.inference_mode():
        for _ in range(8):
            out = model(input_ids=ids, cache=cache, use_cache=True)
            cache, logits = out.cache, out.logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            found.append(logits)
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_next", "nemotron_h"])
def test_two_devices_give_the_logits_of_one(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    one = _load(tmp_path, expert_slots=6)
    expected = _logits(one)
    for slots, lookahead in itertools.product((2, 6, None), (True, False)):
        two = _load(tmp_path, gpus=CPUS, expert_slots=slots, lookahead=lookahead)
        engine = offload_of(two).engine
        assert isinstance(engine.cache, ShardedCache)
        assert isinstance(engine.transfer, CardsTransfer)
        for ours, theirs in zip(_logits(two), expected, strict=True):
            assert torch.equal(ours, theirs)
        engine.cache.check_integrity()
        offload_of(two).close()
    offload_of(one).close()


def test_quantised_dense_layers_and_a_tied_head_are_on_their_cards(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint", tie_word_embeddings=True)
    one, two = (
        _load(tmp_path, expert_slots=6, dense_bits=8, **where)
        for where in ({"device": "cpu"}, {"gpus": CPUS})
    )
    for ours, theirs in zip(_logits(two), _logits(one), strict=True):
        assert torch.equal(ours, theirs)
    for model in (one, two):
        offload_of(model).close()


def test_each_card_says_what_it_holds(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, gpus=CPUS, expert_slots=9)
    before = offload_of(model).stats()
    _logits(model)
    stats = offload_of(model).stats() - before
    assert [len(card.share.blocks) for card in stats.cards] == [2, 1]
    assert [card.share.slots for card in stats.cards] == [6, 3]
    assert sum(card.counts.requests for card in stats.cards) == stats.counts.requests
    copied = stats.bytes_loaded - stats.bytes_in_place
    assert sum(card.bytes_copied for card in stats.cards) == copied
    assert (stats + stats).cards[0].counts.hits == 2 * stats.cards[0].counts.hits
    first, second, third = stats.line().splitlines()
    assert first.startswith("[ Experts: 9 of 24 in memory | hits ")
    assert second.startswith("[ GPU 0: 2 layers | 6 of 16 experts in memory | hits ")
    assert third.startswith("[ GPU 1: 1 layers | 3 of 8 experts in memory | hits ")
    offload_of(model).close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_does_what_two_cards_did(policy: str, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(
        tmp_path,
        gpus=CPUS,
        expert_slots=7,
        policy=policy,
        lookahead=True,
        trace=tmp_path / "trace",
    )
    for seed in range(2):
        model.generate(PROMPT + seed, max_new_tokens=12, do_sample=False)
    offload_of(model).close()
    live = offload_of(model).stats()
    trace = read(tmp_path / "trace")
    outcome = replay(trace, recorded_setup(trace))
    decisions = [
        [counts.decisions() for counts in layers] for layers in (outcome.layers, live.layers)
    ]
    assert decisions[0] == decisions[1]
    assert live.counts.lookahead_guesses > 0


@pytest.mark.parametrize("gpus", [("cpu",), CPUS], ids=["one", "two"])
def test_a_trace_says_how_many_slots_are_left(gpus: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, **({"gpus": gpus} if len(gpus) > 1 else {}), expert_slots=7)
    handle = offload_of(model)
    handle.engine.give_back(0)
    before = handle.stats()
    handle.record(tmp_path / "trace")
    model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    handle.close()
    live = handle.stats() - before
    trace = read(tmp_path / "trace")
    assert trace.header.settings["slots"] == 6
    outcome = replay(trace, recorded_setup(trace))
    assert [n.decisions() for n in outcome.layers] == [n.decisions() for n in live.layers]


def test_a_step_that_broke_off_leaves_both_cards_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, gpus=CPUS, expert_slots=6)
    expected = _logits(model)

    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    engine = offload_of(model).engine
    for layer in engine.layers[1:]:
        with monkeypatch.context() as patch:
            patch.setattr(layer, "expert", interrupt)
            with pytest.raises(KeyboardInterrupt):
                _logits(model)
        for ours, theirs in zip(_logits(model), expected, strict=True):
            assert torch.equal(ours, theirs)
        engine.cache.check_integrity()
    offload_of(model).close()


def test_hot_experts_go_to_the_card_of_their_layer(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    first, _ = offload.load(tmp_path / "checkpoint", pack_dir=tmp_path, gpus=CPUS, expert_slots=9)
    _logits(first)
    hottest = offload_of(first).engine.cache.heat.hottest()
    offload_of(first).close()
    again, _ = offload.load(tmp_path / "checkpoint", pack_dir=tmp_path, gpus=CPUS, expert_slots=9)
    cache = offload_of(again).engine.cache
    for layers, slots in ((range(2), 6), (range(2, 3), 3)):
        hot = [key for key in hottest if key[0] in layers]
        assert all(cache.is_resident(*key) for key in hot[:slots])
    assert not cache.table.has_free()
    offload_of(again).close()


def test_a_model_on_two_devices_generates_text_and_frees_everything(mixtral_pack: Path) -> None:
    threads = threading.active_count()
    texts = []
    for where in ({"device": "cpu"}, {"gpus": CPUS}):
        model, tokenizer = offload.load(mixtral_pack, expert_slots="25%", warm_start=False, **where)
        texts.append(offload.generate(model, tokenizer, "Once upon a time", max_new_tokens=12))
        offload_of(model).close()
    assert texts[0] == texts[1]
    assert threading.active_count() == threads


def test_slots_given_back_are_those_of_both_cards(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, gpus=CPUS, expert_slots=15)
    expected = _logits(model)
    engine = offload_of(model).engine
    assert isinstance(engine.cache, ShardedCache)
    assert isinstance(engine.transfer, CardsTransfer)
    engine.give_back(engine.record_bytes(0))
    assert engine.cache.table.slots < 15
    for cache, transfer in zip(engine.cache.caches, engine.transfer.transfers, strict=True):
        assert 1 <= cache.table.slots == len(transfer.slots)
    for ours, theirs in zip(_logits(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    engine.cache.check_integrity()
    offload_of(model).close()


def test_memory_runs_out_with_one_slot_left_on_each_card(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, gpus=CPUS, expert_slots=5)
    expected = _logits(model)
    engine = offload_of(model).engine
    for left in (4, 3, 2):
        engine.give_back(0)
        assert engine.cache.table.slots == left
    with pytest.raises(GenerationError, match="one expert slot left on each GPU"):
        engine.give_back(0)
    for ours, theirs in zip(_logits(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    offload_of(model).close()


@pytest.mark.parametrize("engine", ["auto", "host", "device"])
def test_a_warning_says_that_the_host_plans_for_several_cards_if_the_device_was_asked_for(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    model = _load(tmp_path, gpus=CPUS, engine=engine)
    assert offload_of(model).engine.device is None
    assert caplog.messages == ON_SEVERAL * (engine == "device")
    offload_of(model).close()


@pytest.mark.parametrize("engine", ["auto", "host", "device"])
def test_on_gpus_the_warning_also_comes_if_the_choice_was_left_open(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("mixtral", tmp_path / "checkpoint")
    handle = offload_of(_load(tmp_path, gpus=CPUS))
    options = replace(handle.fit.options, engine=engine)
    fit = replace(handle.fit, device=torch.device("cuda", 0), options=options)
    info, transfer = handle.pack.info, handle.engine.transfer
    made = make_engine(info, fit, transfer, handle.top_k)
    assert made.device is None
    assert caplog.messages == ON_SEVERAL * (engine != "host")
    handle.close()
