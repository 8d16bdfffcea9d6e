"""Hooks on a model of several cards: tensors cross to the card of each part."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# (id of a tensor that crossed, device) -> (the tensor, which keeps its id taken; its copy there)
Moved = dict[tuple[int, torch.device], tuple[Tensor, Tensor]]


class Crossing:
    """Hooks on a model's parts, which live as long as the model does.

    They replace accelerate's hooks, which look at the arguments of every linear layer: here each
    decoder layer is looked at once. What all layers of a card are given alike (masks, rotary
    embeddings) crosses once a call, not once a layer.
    """

    def __init__(
        self, model: nn.Module, devices: Mapping[str, torch.device], home: torch.device
    ) -> None:
        """`devices` has the path and device of each part; logits are brought to `home`."""
        self._home = home
        self._moved: Moved = {}  # tensors moved in this call
        model.register_forward_pre_hook(self._begin)
        parts = dict(model.named_modules())
        for path, device in devices.items():
            if path in parts:  # else the path is that of a lone tensor
                hook = functools.partial(self._enter, device)
                parts[path].register_forward_pre_hook(hook, with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._moved.clear()  # the previous call may have broken off
        _make_current(self._home)

    def _enter(
        self, device: torch.device, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _make_current(device)
        return self._to(args, device), self._to(named, device)

    def _end(self, _: nn.Module, __: Any, out: Any) -> Any:
        out = self._to(out, self._home)
        self._moved.clear()
        _make_current(self._home)
        return out

    def _to(self, value: Any, device: torch.device) -> Any:
        """`value` with its tensors on `device`. A KV cache and other objects stay as they are.

        Dictionaries are changed in place, because layers pass tensors on in them.
        """
        if isinstance(value, Tensor):
            return value if value.device == device else self._copy(value, device)
        if type(value) in (tuple, list):
            return type(value)([self._to(item, device) for item in value])
        if isinstance(value, dict):
            for key, item in value.items():
                moved = self._to(item, device)
                if moved is not item:
                    value[key] = moved
        return value

    def _copy(self, value: Tensor, device: torch.device) -> Tensor:
        key = id(value), device
        if key not in self._moved:
            self._moved[key] = value, value.to(device, non_blocking=True)
        return self._moved[key][1]


def _make_current(device: torch.device) -> None:
    """Make `device` the current card, on which kernels that are not torch's are launched."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        torch.cuda.set_device(device)
