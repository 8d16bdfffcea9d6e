"""A device-planned model says what a host-planned one says, and decides what it decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from offload.cache.cache import CacheState, ExpertCache
from offload.cache.statistics import LayerCounts
from offload.engine.device.engine import DevicePlanned
from offload.engine.device.table import Table
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.decode import DecodeLoop
from offload.generation.prompt import PromptCache
from offload.generation.stream import GenerationResponse, forward, stream_generate
from tests.offload.engine.device.conftest import Load

PROMPT = list(range(5, 17))
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 3}

pytestmark = pytest.mark.usefixtures("quick")


def answer(
    model: PreTrainedModel, tokens: int = 4, prompt: list[int] = PROMPT, **options: Any
) -> list[GenerationResponse]:
    asked = {"repetition_penalty": 1.2, **SAMPLED, **options}
    return list(stream_generate(model, None, prompt, max_new_tokens=tokens, **asked))


def said(steps: list[GenerationResponse]) -> list[int]:
    return [step.token for step in steps]


def counts_of(model: PreTrainedModel) -> list[LayerCounts]:
    """The counts that do not depend on how quick the host's copies were."""
    layers = offload_of(model).stats().layers
    return [layer.decisions() for layer in layers]


def engine_of(model: PreTrainedModel) -> Engine:
    engine = offload_of(model).engine
    assert engine.device is not None
    return engine


def _state(model: PreTrainedModel) -> CacheState:
    cache = offload_of(model).engine.cache
    assert isinstance(cache, ExpertCache)
    return cache.state()


@pytest.mark.parametrize(("model_type", "one_by_one"), [("mixtral", True), ("gpt_oss", False)])
def test_says_and_decides_what_the_host_planned_engine_does(
    load: Load, model_type: str, one_by_one: bool
) -> None:
    host, device = load(model_type, "host"), load(model_type, "device")
    if one_by_one:
        offload_of(device).decoding = None
    theirs, mine = answer(host), answer(device)
    assert said(mine) == said(theirs)
    assert counts_of(device) == counts_of(host)
    assert mine[-1].experts.counts.hits == theirs[-1].experts.counts.hits
    state, expected = (_state(model) for model in (device, host))
    assert state.keys == expected.keys
    assert state.useless == expected.useless
    assert state.trust == expected.trust
    assert said(answer(device, prompt=PROMPT[3:])) == said(answer(host, prompt=PROMPT[3:]))
    assert counts_of(device) == counts_of(host)
    engine_of(device).cache.check_integrity()


def test_logits_are_bit_equal(load: Load) -> None:
    logits = []
    for engine in ("host", "device"):
        model = load("mixtral", engine)
        _, cache = forward(model, torch.tensor([PROMPT]), None)
        steps = [forward(model, torch.tensor([[token]]), cache)[0] for token in (7, 9, 11)]
        logits.append(torch.stack(steps))
    assert torch.equal(*logits)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next"])
def test_a_fixed_kv_cache_says_what_a_growing_one_does(load: Load, model_type: str) -> None:
    """The prompt is longer than the tiny model's sliding window."""
    model = load(model_type, "device", expert_slots=24)
    fixed = said(answer(model, tokens=4, prompt=list(range(3, 70)), temperature=0.0))
    offload_of(model).decoding = None
    assert said(answer(model, tokens=4, prompt=list(range(3, 70)), temperature=0.0)) == fixed


def test_the_state_goes_to_the_device_once_an_answer(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = []
    upload = Table.upload
    monkeypatch.setattr(Table, "upload", lambda *a: (uploads.append(1), upload(*a)))
    model = load("mixtral", "device")
    answer(model)
    assert len(uploads) == 1


def test_a_step_after_the_end_changes_nothing(load: Load) -> None:
    host, device = load("mixtral", "host"), load("mixtral", "device")
    for model in (host, device):
        model.generation_config.eos_token_id = said(answer(model, tokens=3))[2]
    theirs, mine = answer(host), answer(device)
    assert said(mine) == said(theirs)
    assert mine[-1].finish_reason == "stop"
    assert counts_of(device) == counts_of(host)
    assert torch.equal(*(forward(m, torch.tensor([[5]]), None)[0] for m in (host, device)))


def test_an_answer_within_another_is_had_one_by_one(load: Load) -> None:
    model = load("mixtral", "device")
    alone = said(answer(model))
    outer = stream_generate(
        model, None, PROMPT, max_new_tokens=4, repetition_penalty=1.2, **SAMPLED
    )
    begun = [next(outer).token, next(outer).token]
    assert said(answer(model)) == alone
    assert begun + [step.token for step in outer] == alone


def test_the_prompt_cache_goes_on_from_an_answer(load: Load) -> None:
    turns = []
    for engine in ("host", "device"):
        model, kept = load("mixtral", engine), PromptCache()
        first = said(answer(model, tokens=4, prompt_cache=kept))
        again = answer(model, tokens=4, prompt=[*PROMPT, *first, 20, 21], prompt_cache=kept)
        turns.append((first, said(again), again[0].cached_tokens))
    assert turns[0] == turns[1]
    assert turns[1][2] == len(PROMPT) + 3


def test_the_host_may_take_over_in_the_middle(load: Load) -> None:
    model = load("mixtral", "device")
    whole = said(answer(model))
    steps = stream_generate(
        model, None, PROMPT, max_new_tokens=4, repetition_penalty=1.2, **SAMPLED
    )
    tokens = []
    for step in steps:
        tokens.append(step.token)
        engine_of(model).plan_on_host()
    assert tokens == whole


def test_a_step_that_broke_off_leaves_nothing_wrong(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("mixtral", "device")
    whole = said(answer(model))
    fetch = DevicePlanned.fetch
    calls = []

    def break_off(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        fetch(*args)

    monkeypatch.setattr(DevicePlanned, "fetch", break_off)
    with pytest.raises(KeyboardInterrupt):
        answer(model)
    assert said(answer(model)) == whole


def test_logits_that_are_not_finite_raise_an_error(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("mixtral", "device")
    steps = stream_generate(model, None, PROMPT, max_new_tokens=4)
    next(steps)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(GenerationError, match="not finite"):
        list(steps)


def test_a_closed_model_says_so(load: Load) -> None:
    model = load("mixtral", "device")
    steps = stream_generate(model, None, PROMPT, max_new_tokens=4)
    next(steps)
    offload_of(model).close()
    with pytest.raises(GenerationError, match="closed"):
        list(steps)


def test_another_seed_uses_the_same_loop(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = DecodeLoop.__init__
    monkeypatch.setattr(DecodeLoop, "__init__", lambda *a: (made.append(1), init(*a))[1])
    model = load("mixtral", "device")
    assert said(answer(model, seed=1)) != said(answer(model, seed=2))
    assert len(made) == 1


def test_slots_given_back_are_not_used_any_more(load: Load) -> None:
    model = load("mixtral", "device", expert_slots=8)
    whole = said(answer(model))
    engine = engine_of(model)
    engine.give_back(engine.transfer.slots.shape[1])
    slots = engine.cache.table.slots
    assert slots < 8
    assert said(answer(model)) == whole
    assert engine.device is not None
    assert engine.device.table.places.slots == slots
    engine.cache.check_integrity()
