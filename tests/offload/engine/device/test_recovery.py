"""When memory runs out in a decode loop, slots are given back and the answer stays the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import offload.engine.engine as engine_module
import offload.generation.decode as decode_module
from offload.engine.device.engine import DevicePlanned
from offload.engine.engine import Engine
from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.decode import DecodeLoop
from offload.generation.fixed_kv import FixedKV
from offload.generation.graph import Replay
from offload.generation.prompt import PromptCache
from offload.generation.sampler import Sampler
from offload.generation.stream import GenerationResponse, stream_generate
from tests.offload.engine.device.conftest import Load

PROMPT = list(range(5, 17))
SLOTS = 20
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 3}
LITTLE, MUCH = "512 bytes", "20.00 MiB"  # after which the device goes on planning, and cannot

pytestmark = pytest.mark.usefixtures("quick")


class Shortage:
    """Called like a hook; at some of its calls memory runs out."""

    def __init__(self, *calls: int, asked: str = LITTLE) -> None:
        self.left, self.calls, self._asked = set(calls), 0, asked

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls in self.left:
            self.left.discard(self.calls)
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {self._asked}. GPU 0 has a total capacity"
            )

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but memory may run out at the end of a call."""

        def called(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            self()
            return result

        return called


def steps_of(
    model: PreTrainedModel, tokens: int = 6, prompt: list[int] = PROMPT, **options: Any
) -> list[GenerationResponse]:
    return list(stream_generate(model, None, prompt, max_new_tokens=tokens, **options))


def said(model: PreTrainedModel, **options: Any) -> list[int]:
    return [step.token for step in steps_of(model, **options)]


def engine_of(model: PreTrainedModel) -> Engine:
    return offload_of(model).engine


def device_of(model: PreTrainedModel) -> DevicePlanned:
    device = engine_of(model).device
    assert device is not None
    return device


def loops_of(model: PreTrainedModel) -> Any:
    return offload_of(model).decoding


def slots_of(model: PreTrainedModel) -> int:
    return engine_of(model).cache.table.slots


def check(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    if engine.spares(0):  # the device plans
        engine.plan_on_device()
        device_of(model).table.check_integrity()
    engine.cache.check_integrity()
    counts = engine.stats().counts
    assert counts.hits + counts.misses == counts.requests


# The prompt is the first call of a layer; the first token is drawn from its logits.
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("calls", "asked"), [((2,), LITTLE), ((5,), MUCH), ((2, 3, 6, 7), LITTLE)], ids=str
)
@pytest.mark.parametrize("where", ["model.layers.1.self_attn", "lm_head"])
def test_the_answer_is_that_of_an_undisturbed_run(
    load: Load,
    caplog: pytest.LogCaptureFixture,
    where: str,
    calls: tuple[int, ...],
    asked: str,
    options: dict[str, Any],
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **options)
    shortage = Shortage(*calls, asked=asked)
    model.get_submodule(where).register_forward_hook(shortage)
    assert said(model, **options) == expected
    assert not shortage.left
    assert slots_of(model) < SLOTS
    assert caplog.text.count("were freed, and the answer continues") == len(calls)
    check(model)
    assert said(model, tokens=2, **options) == expected[:2]  # the next answer begins as ever
    check(model)


# The first is of the prompt's logits; a second finds what the one before has put back.
@pytest.mark.parametrize("calls", [(1,), (2, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("where", ["draw", "said"])
def test_a_token_that_was_drawn_already_is_drawn_again(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    calls: tuple[int, ...],
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)
    shortage = Shortage(*calls)
    if where == "draw":
        monkeypatch.setattr(Sampler, "draw", shortage.after(Sampler.draw))
    else:  # it is fed back already, and not yet told

        class Torch:
            def __getattr__(self, name: str) -> Any:
                return shortage.after(torch.cat) if name == "cat" else getattr(torch, name)

        monkeypatch.setattr(decode_module, "torch", Torch())
    assert said(model, **SAMPLED) == expected
    assert not shortage.left
    assert slots_of(model) < SLOTS
    check(model)


@pytest.mark.parametrize("call", [2, 4])
def test_a_step_that_breaks_off_among_the_experts_is_done_again(
    load: Load, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)
    shortage = Shortage(call)
    monkeypatch.setattr(DevicePlanned, "fetch", shortage.after(DevicePlanned.fetch))
    assert said(model, **SAMPLED) == expected
    assert not shortage.left
    check(model)


def test_a_sliding_window_is_as_it_was_after_a_step_is_undone(load: Load) -> None:
    model = load("gpt_oss", "device", expert_slots=SLOTS)
    prompt = list(range(3, 70))
    expected = said(model, prompt=prompt, tokens=4, **GREEDY)
    shortage = Shortage(3)
    model.model.layers[1].self_attn.register_forward_hook(shortage)
    assert said(model, prompt=prompt, tokens=4, **GREEDY) == expected
    assert not shortage.left


def test_a_state_that_cannot_be_taken_back_is_made_anew(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("qwen3_next", "device", expert_slots=SLOTS)
    expected = said(model, tokens=4, **SAMPLED)
    shortage = Shortage(3, 5)  # the second while it is read again
    model.lm_head.register_forward_hook(shortage)
    assert said(model, tokens=4, **SAMPLED) == expected
    assert not shortage.left
    assert slots_of(model) < SLOTS
    assert f"{len(PROMPT) + 1} tokens are read again" in caplog.text


def test_transformers_own_generate_goes_on_with_what_is_left(load: Load) -> None:
    """`generate` of transformers does not run in inference mode."""
    model = load("mixtral", "device", expert_slots=SLOTS)
    shortage = Shortage(3)
    model.lm_head.register_forward_hook(shortage)
    expected = [*PROMPT, *said(model, tokens=3, **GREEDY)]
    assert not shortage.left
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False)
    assert out[0].tolist() == expected


def test_with_one_slot_left_the_error_says_what_to_do(load: Load) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    steps = stream_generate(model, None, PROMPT, max_new_tokens=6, **GREEDY)
    next(steps)
    model.lm_head.register_forward_hook(Shortage(*range(1, 99), asked=MUCH))
    with pytest.raises(GenerationError, match=r"one expert slot left: lower expert_slots=, con"):
        list(steps)


def test_ctrl_c_after_slots_were_given_back_leaves_nothing_wrong(load: Load) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)

    def interrupt(*_: Any) -> None:
        if shortage.calls == 4:
            raise KeyboardInterrupt

    shortage = Shortage(3)
    hooks = [
        model.model.layers[1].self_attn.register_forward_hook(hook)
        for hook in (shortage, interrupt)
    ]
    with pytest.raises(KeyboardInterrupt):
        said(model, **SAMPLED)
    assert not shortage.left
    for hook in hooks:
        hook.remove()
    assert said(model, **SAMPLED) == expected
    check(model)


def test_ctrl_c_while_it_is_told_leaves_no_slot_without_memory(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine_module.logger, "warning", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine_of(model).give_back(0)
    assert device_of(model).table.places.slots == slots_of(model) < SLOTS
    assert said(model, **SAMPLED) == expected
    check(model)


def test_a_step_after_the_end_decides_nothing_when_it_is_done_again(load: Load) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    model.generation_config.eos_token_id = said(model, **SAMPLED)[2]
    shortage = Shortage(4)
    model.model.layers[1].self_attn.register_forward_hook(shortage)
    assert steps_of(model, **SAMPLED)[-1].generation_tokens == 3
    assert not shortage.left
    assert not len(engine_of(model).cache.table)


def test_slots_given_back_between_two_tokens_are_not_used_any_more(load: Load) -> None:
    """Another answer, say, gave the slots back."""
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)
    steps = stream_generate(model, None, PROMPT, max_new_tokens=6, **SAMPLED)
    tokens = [next(steps).token, next(steps).token]
    engine_of(model).give_back(0)
    before = engine_of(model).stats().counts
    for step in steps:
        tokens.append(step.token)
    assert tokens == expected
    check(model)
    after = engine_of(model).stats().counts
    assert loops_of(model).loop.table is device_of(model).table
    assert after.requests - before.requests == 3 * 3 * 2  # tokens, layers, experts: all seen


def test_counts_that_the_host_has_are_not_added_again_when_a_token_is_read(load: Load) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    whole = [step.experts.tokens for step in steps_of(model, **SAMPLED)]
    shortage = Shortage(4)
    model.model.layers[1].self_attn.register_forward_hook(shortage)
    told = [step.experts.tokens for step in steps_of(model, **SAMPLED)]
    assert not shortage.left
    # Of the step that broke off the first layer was counted, and is again.
    assert told == [n + (at >= 2) for at, n in enumerate(whole)]


def short(shortage: Shortage, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but memory may run out at the beginning of a call."""
    return lambda *args, **named: (shortage(), function(*args, **named))[1]


@pytest.mark.parametrize("name", ["__init__", "fill"])
def test_slots_make_way_for_the_second_kv_cache(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)
    loops_of(model).loop = None
    run, runs = DecodeLoop.run, []
    monkeypatch.setattr(DecodeLoop, "run", lambda loop: (runs.append(1), run(loop))[1])
    shortage = Shortage(1, 2)
    monkeypatch.setattr(FixedKV, name, short(shortage, getattr(FixedKV, name)))
    assert said(model, **SAMPLED) == expected
    assert not shortage.left
    assert slots_of(model) < SLOTS
    assert len(runs) == len(expected) - 1
    assert "no memory for a second KV cache" not in caplog.text


def test_a_loop_that_is_not_used_any_more_holds_no_memory(load: Load) -> None:
    """The memory is free at once, without Python's collector."""
    model = load("mixtral", "device", expert_slots=SLOTS)
    loops = loops_of(model)
    said(model, **SAMPLED)
    keys = weakref.ref(loops.loop.kv.layers[0].keys)
    gc.collect()
    gc.disable()
    try:
        said(model, **{**SAMPLED, "temperature": 0.8})
        assert keys() is None
    finally:
        gc.enable()


def test_without_a_second_kv_cache_tokens_wait_and_the_last_slots_are_kept(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load("mixtral", "device", expert_slots=4)
    expected = said(model, **SAMPLED)
    monkeypatch.setattr(FixedKV, "fill", Shortage(1))
    assert said(model, **SAMPLED) == expected
    assert slots_of(model) == 4
    assert caplog.messages == [
        "no memory for a second KV cache, so every token waits for the one before"
    ]
    assert loops_of(model).loop is None


@pytest.mark.parametrize(("slots", "cached"), [(SLOTS, len(PROMPT) + 3), (4, 0)])
def test_the_kv_cache_is_kept_for_the_next_prompt_where_slots_can_make_way(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slots: int,
    cached: int,
) -> None:
    model, kept = load("mixtral", "device", expert_slots=slots), PromptCache()
    shortage = Shortage(1)
    monkeypatch.setattr(FixedKV, "grown", short(shortage, FixedKV.grown))
    first = said(model, tokens=4, prompt_cache=kept, **GREEDY)
    assert not shortage.left
    prompt = [*PROMPT, *first, 20, 21]
    again = steps_of(model, tokens=2, prompt=prompt, prompt_cache=kept, **GREEDY)
    assert again[0].cached_tokens == cached
    assert [step.token for step in again] == said(model, tokens=2, prompt=prompt, **GREEDY)
    assert ("no memory to keep the KV cache" in caplog.text) == (not cached)


@pytest.mark.parametrize("spared", [True, False])
def test_a_capture_that_lacked_memory_changes_nothing_that_is_said(
    load: Load, monkeypatch: pytest.MonkeyPatch, spared: bool
) -> None:
    model = load("mixtral", "device", expert_slots=SLOTS)
    expected = said(model, **SAMPLED)
    call, replays = Replay.__call__, []

    def capture(replay: Any) -> None:
        """The third call fails to capture and, as a failed end does, spoils the generator."""
        replays.append(replay)
        if len(replays) == 3:
            torch.rand(5, generator=replay.generator())
            replay.broke_off()
            if spared:
                assert replay.spares(0)
                raise torch.OutOfMemoryError("no memory for a graph")
        call(replay)

    monkeypatch.setattr(Replay, "__call__", capture)
    assert said(model, **SAMPLED) == expected
    assert (slots_of(model) < SLOTS) == spared
    assert (replays[3] is not replays[2]) == spared  # which was made for slots that are gone
    check(model)
