"""Sizes that are planned from a config alone are those of packs that are really made.

Published models as they are, and cut to a layer or two and one to four experts of the real sizes,
so that a pack can be made here: what is planned for the cut config is held against that pack.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.model.seam import build_on_meta, model_class
from offload.options import LoadOptions
from offload.pack import make as make_pack
from offload.pack.find import find_or_make_pack
from offload.pack.recipe import Recipe
from offload.plan.outline import Outline, outline
from offload.quant import encode
from offload.quant.encode import HereEncoder
from offload.quant.hqq import Quantized
from offload.quant.pack import Pack
from tests.offload.engine.test_parity import NAMED, OTHERS
from tests.published import PUBLISHED, Published
from tests.tiny import save_tiny

LARGE = ("Mixtral-8x22B", "Qwen3-235B-A22B", "DeepSeek-V3", "GLM-4.5-Air")  # seconds each
MODELS = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


def outlined(folder: Path) -> Outline:
    return outline(str(folder), LoadOptions(local_files_only=True))


def config_alone(checkpoint: Path, folder: Path) -> Outline:
    """What is planned when of `checkpoint` nothing but its config is here."""
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    return outlined(folder)


@pytest.fixture
def quick_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are all 0: as many bytes as the right ones."""

    def zeros(weight: Tensor, bits: int, group_size: int, device: torch.device) -> Quantized:
        rows, groups = weight.shape[0], weight.shape[1] // group_size
        codes = torch.zeros(weight.shape, dtype=torch.uint8)
        return Quantized(codes, torch.ones(rows, groups), torch.zeros(rows, groups))

    monkeypatch.setattr(encode, "quantize", zeros)
    monkeypatch.setattr(make_pack, "make_encoder", lambda *_: contextlib.nullcontext(HereEncoder()))


def save_empty(published: Published, folder: Path) -> Path:
    """A checkpoint of the cut model whose weights are all 0."""
    config = published.config(**published.cut)
    cls = model_class(config, str(folder), trust_remote_code=False)
    model = build_on_meta(config, cls).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.save_pretrained(folder)
    return folder


@MODELS
def test_a_published_model_has_the_weights_it_is_known_for(
    published: Published, tmp_path: Path
) -> None:
    published.config().save_pretrained(tmp_path)
    info = outlined(tmp_path).describe(Recipe())
    # Biases of experts are not counted, corrections of a router's choice are.
    assert info.parameters == pytest.approx(published.weights, rel=1e-3)


@pytest.mark.parametrize(
    "published",
    [
        pytest.param(model, id=name, marks=pytest.mark.long if name in LARGE else ())
        for name, model in PUBLISHED.items()
    ],
)
def test_a_pack_has_the_size_that_was_planned(
    published: Published, tmp_path: Path, quick_encoding: None
) -> None:
    checkpoint = save_empty(published, tmp_path / "checkpoint")
    bits = "experts=4,layers.0.attention=6"
    planned = config_alone(checkpoint, tmp_path / "config").describe(Recipe.parse(bits))
    pack = find_or_make_pack(str(checkpoint), LoadOptions(bits=bits), destination=tmp_path / "pack")
    made = sum(file.stat().st_size for file in pack.iterdir())
    assert planned.expert_bytes + planned.dense_bytes(2) == pytest.approx(made, rel=1e-2)
    info = Pack(pack).info
    assert planned.layouts == info.layouts
    assert planned.layers == info.layers
    assert planned.dense_parameters == info.dense_parameters
    shutil.rmtree(tmp_path)  # hundreds of MB


@pytest.mark.parametrize(
    ("model_type", "rules"),
    [
        *((model_type, rules) for model_type in NAMED for rules in ("experts=4", "q4")),
        *((model_type, "q4") for model_type in OTHERS),
    ],
)
def test_sizes_from_a_config_are_those_from_the_weights(
    model_type: str, rules: str, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path / "checkpoint", dtype=torch.bfloat16)
    recipe = Recipe.parse(rules)
    planned = config_alone(tmp_path / "checkpoint", tmp_path / "config").describe(recipe)
    read = outlined(tmp_path / "checkpoint").describe(recipe)
    assert planned.layers == read.layers
    assert planned.expert_bytes == pytest.approx(read.expert_bytes, rel=1e-2)
    assert planned.dense_bytes(2) == pytest.approx(read.dense_bytes(2), rel=1e-2)
