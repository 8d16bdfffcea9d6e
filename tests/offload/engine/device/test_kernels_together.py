"""All kernels that a GPU runs for a token, interpreted: decisions, fetches and products."""

from __future__ import annotations

import pytest
import torch

import offload.engine.engine as engine_module
from offload.engine.compute import Grouped
from offload.engine.handle import offload_of
from offload.generation.stream import forward
from tests.offload.engine.device.conftest import Load


@pytest.mark.usefixtures("on_cpu")
def test_logits_are_those_of_the_host_planned_engine(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "compute_of", Grouped)  # the same products on both sides
    logits = []
    for engine in ("host", "device"):
        model = load("mixtral", engine)
        ids, cache = torch.tensor([[5]]), None
        for _ in range(2):
            scores, cache = forward(model, ids, cache)
            ids = scores.argmax(dim=-1, keepdim=True)
            logits.append(scores)
        assert offload_of(model).stats().tokens == 2
    assert torch.equal(torch.cat(logits[:2]), torch.cat(logits[2:]))
