"""The parts of a transformers model: what each decoder layer weighs, and which card a part goes
to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offload.budget.budget import kv_cache_by_layer
from offload.budget.placement import Block, Demand
from offload.fit import Share
from offload.model.seam import find_experts, layer_of
from offload.quant.pack import PackInfo


def demand(
    model: PreTrainedModel,
    info: PackInfo,
    config: PreTrainedConfig,
    context: int,
    dtype: torch.dtype,
    ubatch: int,
    workspace: int,
) -> Demand:
    """Return the bytes that `model` needs, layer by layer, when it runs from a pack like `info`.

    `model` is the whole model on the meta device. `ubatch` is the number of prompt tokens that are
    read at once, and `workspace` the bytes needed on each card. The sum equals what
    `offload.budget.budget` counts for a single card.
    """
    layers = Layers(model)
    of_layer, last = [0] * layers.count, 0
    for path, size in _dense_sizes(model, info, dtype):
        at = layers.index(path)
        if at is not None:
            of_layer[at] += size
        elif layers.is_last(path):
            last += size
    experts = [0] * layers.count
    for layer in info.layers:
        at = layers.index(layer.module)
        assert at is not None, "experts outside the decoder layers"
        experts[at] += layer.num_experts
    caches = kv_cache_by_layer(config, context, dtype, ubatch)
    if len(caches) != layers.count:  # the config counts layers differently: share them evenly
        total = sum(caches)
        caches = [
            total * (at + 1) // layers.count - total * at // layers.count
            for at in range(layers.count)
        ]
    first = info.dense_bytes(dtype.itemsize) - sum(of_layer) - last
    return Demand(
        tuple(map(Block, of_layer, caches, experts)),
        max(0, first),
        last,
        workspace,
        info.slot_bytes,
    )


def _dense_sizes(
    model: PreTrainedModel, info: PackInfo, dtype: torch.dtype
) -> Iterator[tuple[str, int]]:
    """Path and bytes of every weight outside the experts."""
    records = {
        f"{path}.weight": info.dense_layout(dense).record_bytes * (path == dense.modules[0])
        for dense in info.dense
        for path in dense.modules
    }
    experts = {name for module in find_experts(model) for name in module.parameters}
    for name, parameter in model.named_parameters():
        if name not in experts:
            yield name, records.get(name, parameter.numel() * dtype.itemsize)


class Layers:
    """The decoder layers of a model, and the parts before and after them."""

    def __init__(self, model: PreTrainedModel) -> None:
        experts = [module.path for module in find_experts(model)]
        self._model = model
        self.path = experts[0][
            : experts[0].index(f".{layer_of(experts[0])}.")
        ]  # of the module list
        self.count = len(list(model.get_submodule(self.path).children()))
        self._last = set(self._behind())

    def index(self, path: str) -> int | None:
        """The number of the decoder layer that contains `path`; None outside the layers."""
        return layer_of(f"{path}.") if path.startswith(f"{self.path}.") else None

    def is_last(self, path: str) -> bool:
        """Whether the part at `path` goes to the card of the last layer."""
        return any(path == last or path.startswith(f"{last}.") for last in self._last)

    def _behind(self) -> Iterator[str]:
        """The norms beside the layers, and the head if it has weights of its own.

        A head tied to the token table stays with the table, because sending a hidden state back is
        cheaper than a second copy of the table.
        """
        above = self.path.rpartition(".")[0]
        for name, module in self._model.get_submodule(above).named_children():
            if "norm" in type(module).__name__.lower():
                yield f"{above}.{name}" if above else name
        head = self._model.get_output_embeddings()
        if head is not None:
            path = next(name for name, module in self._model.named_modules() if module is head)
            if f"{path}.weight" not in self._model.all_tied_weights_keys:
                yield path

    def device_map(
        self, shares: Sequence[Share], devices: Sequence[torch.device]
    ) -> dict[str, torch.device]:
        """Map every part of the model that is moved as one piece to its device."""
        found = {}
        for share, device in zip(shares, devices, strict=True):
            found.update({f"{self.path}.{at}": device for at in share.blocks})
        for path in self._outside(self._model, ""):
            found[path] = devices[-1] if self.is_last(path) else devices[0]
        return found

    def _outside(self, module: nn.Module, path: str) -> Iterator[str]:
        """Paths of everything outside the layers: the largest modules, and single tensors."""
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            yield path + name
        for name, child in module.named_children():
            here = path + name
            if self.path == here:
                continue
            if self.path.startswith(f"{here}."):
                yield from self._outside(child, f"{here}.")
            else:
                yield here


def device_of(path: str, devices: Mapping[str, torch.device]) -> torch.device:
    """The device of the module at `path`, or of the smallest module around it in the map."""
    while path not in devices:
        assert path, "a module outside the map"
        path = path.rpartition(".")[0]
    return devices[path]
