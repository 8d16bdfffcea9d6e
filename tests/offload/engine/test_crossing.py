"""Parts of a model on two devices: everything they are given is where they are.

Torch checks the devices of tensors without values ("fake" ones) for every operation: the CPU and
the meta device stand for two cards.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from offload.budget.placement import Layers, device_of
from offload.engine.hooks import Crossing
from offload.fit import Share
from offload.model.seam import (
    IMPLEMENTATION,
    build_on_meta,
    experts_modules,
    find_experts,
    install,
    model_class,
    own_config,
)
from tests.tiny import tiny_config

FIRST, SECOND = torch.device("cpu"), torch.device("meta")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
Crossed = list[tuple[torch.Size, torch.device]]


def _experts(place: torch.device, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    assert hidden.device == index.device == weights.device == place
    return hidden.clone()


def _on(module: nn.Module, place: torch.device) -> None:
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().to(place), False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(place)


def _model(model_type: str) -> tuple[PreTrainedModel, dict[str, torch.device]]:
    """A tiny model, half on each device; under a fake mode."""
    config = tiny_config(model_type)
    cls = model_class(config, "tiny", False)
    layers = Layers(build_on_meta(own_config(config, cls), cls))
    ranges = (range(layers.count // 2), range(layers.count // 2, layers.count))
    shares = [Share(at, blocks, 0, 0, 0, 0, 0, 0) for at, blocks in enumerate(ranges)]
    devices = layers.device_map(shares, (FIRST, SECOND))
    with FAKE:
        model = cls(own_config(config, cls)).eval()
        described = find_experts(model)
        for path, device in devices.items():
            _on(model.get_submodule(path), device)
        model.set_experts_implementation(IMPLEMENTATION)
        for module, about in zip(experts_modules(model), described, strict=True):
            install(module, functools.partial(_experts, device_of(about.path, devices)))
    return model, devices


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> Crossed:
    """The tensors that were copied from one device to the other."""
    copies: Crossed = []
    copy = Crossing._copy

    def note(self: Crossing, value: Tensor, device: torch.device) -> Tensor:
        if (id(value), device) not in self._moved:
            copies.append((value.shape, device))
        return copy(self, value, device)

    monkeypatch.setattr(Crossing, "_copy", note)
    return copies


@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        "gpt_oss",  # two masks
        "qwen3_next",  # states of linear attention
        "gemma4",  # tied; more than one rotary embedding; a composite config
        "nemotron_h",  # Mamba; layers of one kind each
        "deepseek_v3",
        "cohere2_moe",  # tied
        "lfm2_moe",  # another name of the norm
    ],
)
def test_every_part_is_given_tensors_on_its_device(model_type: str) -> None:
    model, devices = _model(model_type)
    Crossing(model, devices, home=FIRST)
    with FAKE, torch.no_grad():
        out = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True)
        assert out.logits.device == FIRST
        ids = torch.zeros(1, 1, dtype=torch.long)
        out = model(input_ids=ids, cache=out.cache, use_cache=True)
        assert out.logits.device == FIRST


def test_the_kv_cache_is_on_the_device_of_its_layer() -> None:
    model, devices = _model("mixtral")
    Crossing(model, devices, home=FIRST)
    with FAKE, torch.no_grad():
        cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).cache
    assert [layer.keys.device for layer in cache.layers] == [FIRST, SECOND, SECOND]


def test_hidden_states_cross_once_and_shared_tensors_once_a_call(crossed: Crossed) -> None:
    model, devices = _model("mixtral")
    Crossing(model, devices, home=FIRST)
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    with FAKE, torch.no_grad():
        out = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True)
        crossed.clear()
        ids = torch.zeros(1, 1, dtype=torch.long)
        model(input_ids=ids, cache=out.cache, use_cache=True)
    assert crossed.count((torch.Size((1, 1, hidden)), SECOND)) == 1
    assert crossed.count((torch.Size((1, 1, vocabulary)), FIRST)) == 1
    assert len(crossed) <= 6, "cos, sin, mask and positions once, not for both layers there"


def test_tensors_that_a_layer_puts_into_a_dictionary_are_seen_by_the_next() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
            shared["seen"] = shared.get("seen", x) + x
            return x

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = Part(), Part(), Part()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            shared: dict[str, Tensor] = {}
            for part in (self.one, self.two, self.three):
                x = part(x, shared)
            return shared

    model = Parts()
    Crossing(model, {"one": FIRST, "two": SECOND, "three": SECOND}, home=FIRST)
    with FAKE:
        assert model(torch.ones(2))["seen"].device == FIRST


def test_a_call_that_broke_off_leaves_nothing_behind(crossed: Crossed) -> None:
    model, devices = _model("mixtral")
    crossing = Crossing(model, devices, home=FIRST)
    with FAKE, torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long)
        install(experts_modules(model)[2], _interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids)
        assert crossing._moved
        install(experts_modules(model)[2], functools.partial(_experts, SECOND))
        model(input_ids=ids)
    assert not crossing._moved


def _interrupted(*_: Tensor) -> Tensor:
    raise KeyboardInterrupt
