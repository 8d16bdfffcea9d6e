"""The demo, on its real weights, answers as the dense model it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offload
from offload.engine.handle import offload_of
from offload.generation.batch import generate
from offload.generation.stream import stream_generate
from offload.model import demo
from offload.progress import without_bars

pytestmark = pytest.mark.demo

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def real_home(demo_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", str(demo_home))


@pytest.mark.long
@torch.inference_mode()
def test_unquantised_demo_answers_exactly_as_the_dense_model(tmp_path: Path) -> None:
    """Mixtral's weights sum to one and all experts are the dense FFN: logits agree to rounding."""
    dense = demo.load_dense()
    with without_bars():
        demo.write_checkpoint(dense, tmp_path / "checkpoint", torch.float32)
    model, tokenizer = offload.load(
        tmp_path / "checkpoint",
        device="cpu",
        dtype=torch.float32,
        expert_bits=16,
        expert_slots="25%",
        pack_dir=tmp_path / "packs",
    )
    assert tokenizer is not None
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    difference = (model(ids).logits - dense(ids).logits).abs().max()
    assert float(difference) < 1e-3  # of logits up to 30
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    routed = offload_of(model).stats().layers
    assert min(layer.requests for layer in routed) > 24 * demo.TOP_K / 2
    offload_of(model).close()


def test_quantised_demo_answers_with_a_quarter_of_its_experts() -> None:
    model, tokenizer = offload.load("demo", device="cpu", expert_slots="25%")
    assert offload_of(model).fit.slots == 60
    assert "Paris" in generate(model, tokenizer, QUESTION, max_new_tokens=24)
    offload_of(model).close()


def test_demo_logits_are_bit_equal_at_every_cache_size() -> None:
    tokens: list[list[int]] = []
    for slots, lookahead in ((1, False), (60, True), (None, False)):
        model, tokenizer = offload.load(
            "demo", device="cpu", expert_slots=slots, lookahead=lookahead
        )
        steps = stream_generate(model, tokenizer, QUESTION, max_new_tokens=12)
        tokens.append([step.token for step in steps])
        offload_of(model).close()
    assert tokens[0] == tokens[1] == tokens[2]


def test_routing_follows_the_text() -> None:
    """Different texts choose different experts, and no layer sends all to a few."""
    model, tokenizer = offload.load("demo", device="cpu", warm_start=False)
    assert tokenizer is not None
    engine = offload_of(model).engine
    uses = {}
    for text in ("def add(a, b):\n    return a + b\n", "The king of France lived in Paris."):
        before = [len(engine.cache.table)]
        with torch.inference_mode():
            model(**tokenizer(text, return_tensors="pt"))
        uses[text] = [*before, len(engine.cache.table)]
    first, second = uses.values()
    assert first[1] > 30 * demo.TOP_K  # more than two experts a layer for one text
    assert second[1] > first[1]  # and others for another text
    offload_of(model).close()
