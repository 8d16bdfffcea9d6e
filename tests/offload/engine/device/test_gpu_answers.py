"""On a GPU both engines give the same answer, and the device-planned one replays a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offload
from offload.engine.handle import offload_of
from offload.generation.decode import Loops
from offload.generation.graph import Replay
from tests.tiny import EXPERTS, LAYERS, save_tiny

PROMPT = list(range(5, 17))
TOKENS = 40
ALL = LAYERS * EXPERTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def answer(folder: Path, engine: str, slots: int) -> tuple[list[int], Replay | None]:
    """Greedy tokens of a prompt, and what replays its steps."""
    model, _ = offload.load(
        folder / "checkpoint",
        device="cuda",
        dtype=torch.float32,  # no near-tie turns on how attention is rounded
        engine=engine,
        expert_slots=slots,
        lookahead=True,
        warm_start=False,
        pack_dir=folder / "packs",
    )
    model.generation_config.eos_token_id = None
    steps = offload.stream_generate(model, None, PROMPT, max_new_tokens=TOKENS, temperature=0.0)
    said = [step.token for step in steps]
    handle = offload_of(model)
    counts = handle.stats().counts
    assert bool(counts.evictions) == (slots < ALL)
    handle.engine.cache.check_integrity()
    assert (handle.engine.device is not None) == (engine == "device")
    replay = None
    if engine == "device":
        assert isinstance(handle.decoding, Loops)
        assert handle.decoding.loop is not None, handle.decoding.refused
        replay = handle.decoding.loop.replay
    handle.close()
    return said, replay


@pytest.mark.parametrize("slots", [ALL // 4, ALL])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_engines_give_the_same_tokens_and_steps_are_replayed(
    model_type: str, slots: int, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint")
    expected, _ = answer(tmp_path, "host", slots)
    said, replay = answer(tmp_path, "device", slots)
    assert replay is not None
    assert replay.graph is not None, replay.refused
    assert said == expected
    assert len(said) == TOKENS
