"""A decode step asks the host for nothing, so that it can be captured as a CUDA graph.

Seen on the CPU: operations whose result the host would have to wait for, or whose shape depends on
data, are refused between the step's inputs and its outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from offload.engine.handle import offload_of
from offload.generation.decode import DecodeLoop
from offload.generation.stream import stream_generate
from tests.offload.engine.device.conftest import Load

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
CAPTURABLE = ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3", "qwen3_next"]


class Waits(AssertionError):
    """The step would wait for the device."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        by_mask = func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in WAITING or by_mask:
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


class NoLists(TorchFunctionMode):
    """`tolist` on a CPU reads memory without an operation that a dispatch mode would see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.tolist:
            raise Waits("tolist")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(quick: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are watched from the second on, because the first may prepare things."""
    steps: list[int] = []
    run = DecodeLoop.run

    def watch(loop: DecodeLoop) -> None:
        steps.append(1)
        if len(steps) == 1:
            run(loop)
            return
        with NoWaiting(), NoLists():
            run(loop)

    monkeypatch.setattr(DecodeLoop, "run", watch)
    return steps


@pytest.mark.parametrize("model_type", CAPTURABLE)
def test_a_decode_step_waits_for_nothing(load: Load, watched: list[int], model_type: str) -> None:
    model = load(model_type, "device")
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    prompt = list(range(5, 17))
    list(
        stream_generate(
            model, None, prompt, max_new_tokens=3, repetition_penalty=1.2, seed=3, **sampling
        )
    )
    assert len(watched) == 2
    assert offload_of(model).stats().counts.lookahead_guesses


@pytest.mark.parametrize("way", [lambda t: t.tolist(), lambda t: int(t[0]), lambda t: t[t > 1]])
def test_operations_that_wait_are_noticed(way: Any) -> None:
    with NoWaiting(), NoLists(), pytest.raises(Waits):
        way(torch.arange(3))


def test_a_model_with_another_kind_of_cache_gets_tokens_one_by_one(
    load: Load, watched: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = load("deepseek_v4", "device")
    steps = list(stream_generate(model, None, list(range(5, 17)), max_new_tokens=2))
    assert len(steps) == 2
    assert not watched
    assert "every token waits for the one before" in caplog.text
