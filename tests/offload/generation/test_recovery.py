"""When memory runs out during a step, slots are given back and the answer stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from offload.engine.engine import SLACK, fewer_slots
from offload.engine.handle import offload_of
from offload.errors import GenerationError
from offload.generation.recovery import asked_bytes, asked_gpu
from offload.transfer.host import HostTransfer
from tests.tiny import EXPERTS, LAYERS, save_tiny

MESSAGE = (
    "CUDA out of memory. Tried to allocate {}. GPU 0 has a total capacity of 23.64 GiB of which "
    "12.00 MiB is free."
)
PROMPT = list(range(5, 30))
TOTAL = EXPERTS * LAYERS


class Shortage:
    """Simulates that memory runs out at the given calls of a module."""

    def __init__(self, model: Any, name: str, calls: tuple[int, ...]) -> None:
        self.left = set(calls)
        self.calls = 0
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == name:
                module.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1
        if self.calls in self.left:
            self.left.discard(self.calls)
            raise torch.OutOfMemoryError(MESSAGE.format("512 bytes"))


def answer(
    folder: Path,
    disturb: Callable[[Any], Shortage | None] = lambda _: None,
    slots: int = 13,
    **options: Any,
) -> tuple[list[int], int]:
    """Return the tokens of a run, and how many slots are left."""
    model, _ = offload.load(
        folder, device="cpu", expert_slots=slots, warm_start=False, pack_dir=folder.parent / "packs"
    )
    shortage = disturb(model)
    steps = offload.stream_generate(model, None, PROMPT, max_new_tokens=40, temperature=0.0)
    tokens = [step.token for step in steps]
    assert shortage is None or not shortage.left, "memory never ran out"
    engine = offload_of(model).engine
    engine.cache.check_integrity()
    slots = engine.cache.table.slots
    offload_of(model).close()
    return tokens, slots


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model_of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type) / "checkpoint"
            window = {"sliding_window": 8} if model_type == "gpt_oss" else {}
            save_tiny(model_type, made[model_type], eos_token_id=127, **window)
        return made[model_type]

    return model_of


# All layers of mixtral grow with every step; every other layer of gpt_oss has a sliding window.
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("module", ["self_attn", "mlp", "experts", "q_proj", "lm_head"])
@pytest.mark.parametrize("calls", [(1,), (2,), (17,), (30,), (31,), (5, 6, 7, 20)])
def test_the_answer_is_that_of_an_undisturbed_run(
    models: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    model_type: str,
    module: str,
    calls: tuple[int, ...],
) -> None:
    folder = models(model_type)
    expected, _ = answer(folder)
    got, slots = answer(folder, lambda model: Shortage(model, module, calls))
    assert got == expected
    assert slots < 13
    lines = [r.getMessage() for r in caplog.records if "were freed" in r.getMessage()]
    assert len(lines) == len(calls)
    assert "expert slots" in lines[0]


def test_keys_that_were_stored_without_their_values_are_removed(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after the keys of a cache update and before its values."""
    folder = models("gpt_oss")
    expected, _ = answer(folder)
    cat, left = torch.cat, [9, 55, 140, 233]
    calls = 0

    def short(tensors: Any, *args: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in left:
            left.remove(calls)
            raise torch.OutOfMemoryError(MESSAGE.format("512 bytes"))
        return cat(tensors, *args, **named)

    def disturb(_: Any) -> None:
        import transformers.cache_utils as module

        class Torch:
            def __getattr__(self, name: str) -> Any:
                return short if name == "cat" else getattr(torch, name)

        monkeypatch.setattr(module, "torch", Torch())

    got, _ = answer(folder, disturb)
    assert not left
    assert got == expected


@pytest.mark.parametrize("model_type", ["qwen3_next", "nemotron_h"])
def test_a_state_that_cannot_be_restored_is_rebuilt(
    models: Callable[[str], Path], caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    folder = models(model_type)
    expected, _ = answer(folder)
    got, slots = answer(folder, lambda model: Shortage(model, "lm_head", (5,)))
    assert got == expected
    assert slots < 13
    assert f"{len(PROMPT) + 3} tokens are read again" in caplog.text


def test_with_one_slot_left_the_error_says_what_to_do(models: Callable[[str], Path]) -> None:
    with pytest.raises(GenerationError, match=r"one expert slot left: lower expert_slots=, con"):
        answer(models("mixtral"), lambda model: Shortage(model, "lm_head", tuple(range(1, 99))))


def test_fewer_slots_are_tried_when_the_smaller_pool_does_not_fit_either(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models("mixtral")
    expected, _ = answer(folder)
    resize = HostTransfer.resize
    asked: list[int] = []

    def short(self: HostTransfer, slots: int, staging: int) -> None:
        asked.append(slots)
        if slots > 5:
            raise torch.OutOfMemoryError(MESSAGE.format("2.00 GiB"))
        resize(self, slots, staging)

    monkeypatch.setattr(HostTransfer, "resize", short)
    got, slots = answer(folder, lambda model: Shortage(model, "mlp", (40,)))
    assert got == expected
    assert slots == asked[-1] <= 5
    assert asked == sorted(asked, reverse=True)


def test_ctrl_c_while_slots_are_given_back_leaves_no_slot_without_memory(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = HostTransfer.resize

    def interrupted(self: HostTransfer, slots: int, staging: int) -> None:
        resize(self, slots, staging)
        raise KeyboardInterrupt

    monkeypatch.setattr(HostTransfer, "resize", interrupted)
    folder = models("mixtral")
    model, _ = offload.load(
        folder, device="cpu", expert_slots=13, pack_dir=folder.parent / "packs", warm_start=False
    )
    engine = offload_of(model).engine
    with pytest.raises(KeyboardInterrupt):
        engine.give_back(0)
    assert engine.cache.table.slots == len(engine.transfer.slots) < 13
    model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    offload_of(model).close()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (MESSAGE.format("20.00 MiB"), 20 << 20),
        (MESSAGE.format("1.50 GiB"), 3 << 29),
        (MESSAGE.format("512 bytes"), 0),
        ("out of memory", 0),
    ],
)
def test_the_size_of_the_failed_allocation_is_read_from_the_message(text: str, size: int) -> None:
    assert asked_bytes(torch.OutOfMemoryError(text)) == size


def test_the_gpu_that_ran_out_of_memory_is_read_from_the_message() -> None:
    there = MESSAGE.format("1.00 MiB").replace("GPU 0", "GPU 3")
    assert asked_gpu(torch.OutOfMemoryError(there)) == 3
    assert asked_gpu(torch.OutOfMemoryError("out of memory")) is None


def test_the_slots_given_back_cover_the_shortage_and_some_slack() -> None:
    assert fewer_slots(100, 0, 1 << 20) == 90
    assert fewer_slots(100, 1 << 20, 1 << 20) == 100 - 65
    assert fewer_slots(1000, 400 << 20, 1 << 20) == 500
    assert fewer_slots(5, 1 << 40, 1 << 20) == 1
    assert fewer_slots(2, 0, 1 << 30) == 1
    assert SLACK == 64 << 20


def test_a_window_that_has_moved_on_cannot_be_cut_back(
    models: Callable[[str], Path],
) -> None:
    """A prompt that differs early from the previous one is read anew, with the same answer."""
    folder = models("gpt_oss")
    other = [*PROMPT[:20], 77, 78, 79]

    def answers(prompts: list[list[int]]) -> list[int]:
        model, _ = offload.load(
            folder, device="cpu", expert_slots=13, pack_dir=folder.parent / "packs"
        )
        for prompt in prompts:
            steps = offload.stream_generate(model, None, prompt, max_new_tokens=20, temperature=0.0)
            tokens = [step.token for step in steps]
        offload_of(model).close()
        return tokens

    assert answers([PROMPT, other]) == answers([other])
