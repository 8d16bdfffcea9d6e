"""The arithmetic of memory: sizes, shares, and how many experts fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload.budget.budget import (
    Budget,
    Memory,
    available_bytes,
    hold_vram,
    kv_cache_bytes,
    staging_rows,
)
from offload.budget.resolve import Place, Resolver, find_device
from offload.errors import BudgetError
from offload.generation.fixed_kv import FixedKV
from offload.options import LoadOptions
from offload.quant.pack import Pack
from offload.units import parse_bytes, parse_slots
from tests.tiny import EXPERTS, LAYERS, tiny_config

MIB, GIB = 2**20, 2**30
TOTAL = EXPERTS * LAYERS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        (0, 0),
        (123, 123),
        ("123", 123),
        ("123B", 123),
        ("20GiB", 20 * GIB),
        ("20gib", 20 * GIB),
        (" 1.5 GiB ", GIB * 3 // 2),
        ("512MiB", 512 * MIB),
        ("4KiB", 4096),
        ("20GB", 20 * 10**9),
        ("1MB", 10**6),
        ("1KB", 1000),
        ("16K", 16 * 1024),
        ("16M", 16 * MIB),
        ("16G", 16 * GIB),
        ("16g", 16 * GIB),
        ("2T", 2048 * GIB),
        ("1TiB", 1024 * GIB),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_bytes_or_a_number_with_its_unit(
    text: str | int | None, expected: int | None
) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "20XiB", "-1GiB", "GiB", "1e9", "1,5GiB", "5 5", "%"])
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match="is not a size: write bytes or a size like 20GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "1" + "0" * 400 + "GiB", "9999999TiB"])
def test_a_size_beyond_any_machine_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="more than any machine has"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["101%", "500 %", "9" * 5000 + " %"])
def test_a_share_beyond_all_experts_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is more than all experts: write at most 100%"):
        parse_slots(text, 240)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "100%", "100.0 %"])
def test_any_number_of_slots_is_taken(text: str) -> None:
    slots = parse_slots(text, 240)
    assert slots is not None
    assert slots >= 240


@given(st.text("0123456789.%GiBKMbe -+٣²", max_size=8))
def test_no_text_is_anything_but_a_size_or_refused(text: str) -> None:
    try:
        size = parse_bytes(text)
    except BudgetError:
        return
    assert size is not None
    assert size >= 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        (7, 7),
        ("7", 7),
        ("0", 0),
        ("25%", 60),
        (" 25 % ", 60),
        ("100%", 240),
        ("0%", 1),
        ("0.1%", 1),
        ("12.5%", 30),
    ],
)
def test_slots_are_a_number_or_a_share(text: str | int | None, expected: int | None) -> None:
    assert parse_slots(text, 240) == expected


@pytest.mark.parametrize("text", ["", "many", "-1", "-5%", "1.5", "%", "25%%", "1e3", "all"])
def test_what_is_not_a_number_of_slots_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BudgetError, match=r"is not a number of expert slots: .* like 25%"):
        parse_slots(text, 240)


def _budget(available: int, **changes: int) -> Budget:
    given_ = {"dense": 2000, "kv_cache": 300, "workspace": 40, "slot": 100, "total_experts": 24}
    return Budget(available, **{**given_, **changes})


def test_as_many_slots_as_fit_and_no_more() -> None:
    assert _budget(2340 + 100).slots(None) == 1
    assert _budget(2340 + 199).slots(None) == 1
    assert _budget(2340 + 200).slots(None) == 2
    assert _budget(2340 + 2400).slots(None) == 24
    assert _budget(10**9).slots(None) == 24


def test_asked_slots_are_given_when_they_fit() -> None:
    assert _budget(2340 + 1000).slots(7) == 7
    assert _budget(2340 + 1000).slots(10) == 10
    assert _budget(10**9).slots(999) == 24


def test_rows_that_prompts_are_streamed_through_are_counted_unless_everything_fits() -> None:
    assert _budget(2340 + 1000, staging=2).slots(None) == 8
    assert _budget(2340 + 1000, staging=2).slots(8) == 8
    assert _budget(2340 + 2400, staging=2).slots(None) == 24
    assert _budget(2340 + 2399, staging=2).slots(None) == 21
    with pytest.raises(BudgetError, match=r"to stream prompts through, and 9 expert .* 8 fit"):
        _budget(2340 + 1000, staging=2).slots(9)


def test_small_records_get_more_rows_and_a_cpu_none_of_its_own() -> None:
    gpu = torch.device("cuda")
    assert staging_rows(gpu, 100 * 2**20) == 2
    assert staging_rows(gpu, 10 * 2**20) == 12
    assert staging_rows(gpu, 2**10) == 32
    assert staging_rows(torch.device("cpu"), 2**10) == 2


@pytest.mark.parametrize("available", [0, 1, 2340, 2439])
@pytest.mark.parametrize("asked", [None, 1])
def test_without_room_for_one_slot_the_shortage_and_the_flags_are_named(
    available: int, asked: int | None
) -> None:
    with pytest.raises(BudgetError, match=r"not enough memory: .* and 1 expert slot of") as caught:
        _budget(available).slots(asked)
    message = str(caught.value)
    for flag in ("--ctx-size", "--expert-bits", "--expert-slots", "--vram", "--ram"):
        assert flag in message


def test_more_slots_than_fit_are_refused_not_cut() -> None:
    with pytest.raises(BudgetError, match=r"and 11 expert slots .* 10 fit"):
        _budget(2340 + 1000).slots(11)


@pytest.mark.parametrize("asked", [0, -3])
def test_less_than_one_slot_is_refused(asked: int) -> None:
    with pytest.raises(BudgetError, match=f"{asked} expert slots: at least one"):
        _budget(10**9).slots(asked)


sizes = st.integers(0, 10**13)


@given(sizes, sizes, sizes, sizes, st.integers(1, 10**9), st.integers(1, 10**5), st.data())
def test_what_is_granted_always_fits(
    available: int, dense: int, kv: int, workspace: int, slot: int, total: int, data: st.DataObject
) -> None:
    budget = Budget(available, dense, kv, workspace, slot, total)
    asked = data.draw(st.none() | st.integers(1, 2 * total))
    try:
        slots = budget.slots(asked)
    except BudgetError:
        needed = min(asked or 1, total)
        assert dense + kv + workspace + needed * slot > available
    else:
        assert dense + kv + workspace + slots * slot <= available
        assert 1 <= slots <= total
        assert asked is None or slots == min(asked, total)


def test_the_budget_is_what_was_given_for_the_device() -> None:
    assert Memory.of(torch.device("cpu"), vram=1, ram=2) == Memory(device=2, ram=2)
    assert Memory.of(torch.device("cuda"), vram=1, ram=2) == Memory(device=1, ram=2)


def test_without_a_budget_a_share_of_free_ram_is_taken() -> None:
    free = psutil.virtual_memory().available
    assert available_bytes(torch.device("cpu"), None) == pytest.approx(0.9 * free, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_is_two_vectors_a_head_a_layer_a_token(dtype: torch.dtype) -> None:
    config = tiny_config("mixtral")  # 3 layers of 2 KV heads of 16
    assert sum(kv_cache_bytes(config, 100, dtype)) == 2 * 3 * 2 * 16 * 100 * dtype.itemsize


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_kv_cache_is_never_counted_too_small(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    length = 96
    with torch.inference_mode():
        ids = torch.randint(3, 120, (1, length))
        cache = model(input_ids=ids, use_cache=True).cache
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = sum(s.nbytes for s in states if isinstance(s, torch.Tensor))
    assert 0 < held <= sum(kv_cache_bytes(config, length, torch.float32))


def test_a_longer_context_leaves_room_for_fewer_experts(mixtral: Path, tmp_path: Path) -> None:
    def slots(context: int) -> int:
        options: dict[str, Any] = {"ram": "202.2MiB", "context": context, "expert_bits": 16}
        model, _ = offload.load(mixtral, device="cpu", pack_dir=tmp_path, **options)
        count: int = model.offload.fit.slots
        model.offload.close()
        return count

    short, long = slots(64), slots(512)
    assert 1 <= long < short < TOTAL


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("asked", "rope", "holds"),
    [
        (0, None, 512),
        (64, None, 64),
        (4096, None, 512),  # the default
        (4096, SCALED, 4096),
        (600, SCALED, 600),
        (0, SCALED, 512),
    ],
)
def test_a_context_has_as_many_tokens_as_asked_and_no_more_than_the_model(
    asked: int, rope: dict[str, Any] | None, holds: int
) -> None:
    config = tiny_config("mixtral", **({"rope_parameters": rope} if rope else {}))
    place = Place(torch.device("cpu"), Memory(2**30, 2**30))
    assert Resolver(LoadOptions(context=asked), place).context(config) == holds


def test_a_context_longer_than_the_model_is_refused() -> None:
    config = tiny_config("mixtral")
    resolver = Resolver(LoadOptions(context=513), Place(torch.device("cpu"), Memory(2**30, 2**30)))
    with pytest.raises(BudgetError, match="of 513 tokens is more than the model's 512 positions"):
        resolver.context(config)
    config.max_position_embeddings = 0
    assert resolver.context(config) == 513
    with pytest.raises(BudgetError, match="does not tell its context: give --ctx-size"):
        replace(resolver, options=LoadOptions(context=0)).context(config)


# Latent attention, recurrent and compressed states, windows.
UNUSUAL = [
    "deepseek_v3",
    "deepseek_v4",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
    "gpt_oss",
    "zaya",
]


def _held(value: Any, seen: set[int]) -> int:
    """Bytes of the memory behind all tensors that `value` leads to."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, list | tuple):
        return sum(_held(part, seen) for part in value)
    parts = value.values() if isinstance(value, dict) else vars(value).values()
    return sum(
        _held(part, seen)
        for part in parts
        if isinstance(part, torch.Tensor | list | tuple | dict) or hasattr(part, "__dict__")
    )


@pytest.mark.parametrize(
    ("model_type", "length"),
    [
        *((model_type, length) for model_type in UNUSUAL for length in (40, 96)),
        ("deepseek_v4", 600),
        ("deepseek_v4", 767),
        ("qwen3_next", 600),
        ("gpt_oss", 600),
    ],
)
def test_the_kv_cache_of_unusual_layers_is_counted_as_it_is(model_type: str, length: int) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.randint(3, 120, (1, length))
        layers = model(input_ids=ids, use_cache=True).cache.layers
    held = sum(_held(layer, set()) for layer in layers)
    counted = sum(kv_cache_bytes(config, length, torch.float32))
    assert held <= counted * 1.02 + 4096, "counted too small"
    assert counted <= held * 1.35 + 4096, "counted far too large"


def test_kimi_linears_states_are_counted() -> None:
    """Its attention is latent, its other layers keep a matrix a head: far more than it says."""
    config = tiny_config("kimi_linear")
    states = 2 * 32 * 128 * 128 * 4  # two layers of 32 heads
    assert states < sum(kv_cache_bytes(config, 40, torch.float32)) < 2 * states


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_cache_of_fixed_size_is_counted_as_it_is(model_type: str) -> None:
    """Windows are kept whole in it: as many tokens as the context has."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        grown = model(input_ids=torch.randint(3, 120, (1, 300)), use_cache=True).cache
    held = sum(_held(layer, set()) for layer in FixedKV(grown, 400).layers)
    counted = sum(kv_cache_bytes(config, 400, torch.float32, ubatch=64, fixed=True))
    assert counted <= held <= counted + 64 * len(grown.layers), "but for a few counters"


@pytest.mark.parametrize(
    ("engine", "device", "twice"),
    [("auto", "cuda", True), ("host", "cuda", False), ("auto", "cpu", False)],
)
def test_a_gpus_budget_has_room_for_the_cache_of_fixed_size(
    engine: str, device: str, twice: bool, mixtral_pack: Path
) -> None:
    config = tiny_config("mixtral", max_position_embeddings=4096)
    a_token = 2 * 3 * 2 * 16 * 4
    asked = LoadOptions(dtype=torch.float32, ubatch_size=32, engine=engine)
    resolver = Resolver(asked, Place(torch.device(device), Memory(2**30, 2**30)))
    grown, fixed = a_token * (63 + 32), a_token * 4096
    counted = resolver.budget(Pack(mixtral_pack).info, config).kv_cache
    assert counted == grown + fixed * twice


def test_a_window_holds_no_more_than_itself_and_what_is_read_at_once() -> None:
    config = tiny_config("mixtral")  # 3 layers of 2 KV heads of 16, a window of 64
    a_token = 2 * 3 * 2 * 16 * 4
    assert sum(kv_cache_bytes(config, 4096, torch.float32, ubatch=32)) == a_token * (63 + 32)
    assert sum(kv_cache_bytes(config, 4096, torch.float32)) == a_token * 4096


@pytest.mark.parametrize(("model_type", "kinds"), [("mixtral", 1), ("gpt_oss", 2)])
def test_a_trial_run_computes_one_layer_of_each_kind(
    model_type: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window is another kind than full attention, and each layer is counted all the same."""
    computed: list[int] = []
    own = offload.budget.budget._compute_once

    def spy(model: Any) -> list[int]:
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: computed.append(1))
        return own(model)

    config = tiny_config(model_type, num_hidden_layers=8, max_position_embeddings=4096)
    monkeypatch.setattr(offload.budget.budget, "_compute_once", spy)
    short = kv_cache_bytes(config, 4096, torch.float32, ubatch=32)
    assert len(computed) == kinds
    monkeypatch.setattr(offload.budget.budget, "_compute_once", lambda _: [])
    monkeypatch.setattr(offload.budget.budget, "_KEPT", {})
    assert kv_cache_bytes(config, 4096, torch.float32, ubatch=32) == short
    assert len(set(short)) == kinds


def test_a_model_that_does_not_run_without_memory_is_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> int:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(offload.budget.budget, "build_on_meta", fails)
    config = tiny_config("mixtral", max_position_embeddings=333)  # another than those seen before
    assert sum(kv_cache_bytes(config, 100, torch.float32)) == 2 * 3 * 2 * 16 * 100 * 4


def test_vram_without_a_gpu_is_told_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    Memory.of(torch.device("cpu"), "20GiB", "1GiB")
    assert [r.getMessage() for r in caplog.records] == [
        "--vram has no effect without a GPU: --ram is the limit here"
    ]


def test_torch_is_held_to_the_budget_and_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 24 * GIB

    held: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: held.append(share)
    )
    for budget in (10 * GIB, 30 * GIB):
        hold_vram(torch.device("cuda"), budget)
    assert held == [0.5, 1.0]


def test_a_gpu_has_its_number_however_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_per_process_memory_fraction` refuses a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in (None, "cuda", torch.device("cuda")):
        assert find_device(name) == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    assert find_device("cpu") == torch.device("cpu")
