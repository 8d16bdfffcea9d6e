"""Device-planned models on the CPU: kernels run in Triton's interpreter.

The products are those of the host-planned engine, since interpreted ones take seconds a token; the
GPU's own are tested in `tests/quant`, and once, for few tokens, here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import offload
from offload.engine.ahead import Ahead
from offload.engine.compute import OneCall
from offload.engine.device import engine as planned
from offload.engine.device import make as making
from offload.quant.matmul import matmul
from offload.quant.program import Program
from offload.quant.record import view_record
from tests.interpreter import quicken
from tests.tiny import save_tiny

quicken()
Load = Callable[..., PreTrainedModel]


def decode_by_products(
    hidden: Tensor, slots: Tensor, slot_of_cell: Tensor, program: Program, cells: Tensor
) -> None:
    """Stands in for `decode` with the host engine's products, and asks for no slot either."""
    for cell in range(len(cells)):
        slot = slot_of_cell[cell : cell + 1]
        record = slots.index_select(0, slot.clamp(min=0))[0]
        views = view_record(record, program.layout)
        inner = program.apply(matmul(hidden, views[program.up.name]))
        out = matmul(inner, views[program.down.name])
        cells[cell] = torch.where(slot >= 0, out[0], cells[cell])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device-planned engine can be chosen on a CPU."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: nothing interprets them on the CPU")
    monkeypatch.setattr(making, "DEVICES", ("cpu",))


@pytest.fixture
def quick(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device-planned engine can be chosen on a CPU, and both engines compute by products."""
    monkeypatch.setattr(OneCall, "_routine", lambda *_: None)
    monkeypatch.setattr(planned, "decode", decode_by_products)
    monkeypatch.setattr(planned, "kernels_work", lambda *_: True)
    # How many copies have landed depends on the clock: here the link is never behind.
    monkeypatch.setattr(Ahead, "begun", lambda *_: None)


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Load a tiny model of some architecture, the same one for the same architecture."""
    loaded: list[PreTrainedModel] = []
    folders: dict[str, Path] = {}

    def make(model_type: str, engine: str, **options: Any) -> PreTrainedModel:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp("tiny") / model_type
            save_tiny(model_type, folders[model_type])
        given = {"expert_slots": 6, "lookahead": True, "warm_start": False, **options}
        model, _ = offload.load(
            folders[model_type], device="cpu", dtype=torch.float32, engine=engine, **given
        )
        loaded.append(model)
        return model

    yield make
    for model in loaded:
        model.offload.close()
