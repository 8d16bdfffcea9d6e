"""A model's decoder layers, and what of it goes to which card.

Knows: where layers, token table, final norm and head are in transformers' models, and what they
weigh. Does not know: how cards share them (`offload.placement`), tensors with values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offload.budget.budget import kv_cache_by_layer
from offload.budget.placement import Block, Demand
from offload.model.parts import layer_of
from offload.model.seam import find_experts
from offload.options import Share
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
    """What `model` (on meta, whole) needs when run from a pack like `info`; `ubatch`: tokens of
    a prompt at once; `workspace`: bytes on each card.

    In all it is what `offload.budget` counts for one card.
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
    if len(caches) != layers.count:  # its config counts otherwise
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
    """Path and bytes of everything that is not an expert's."""
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
    """The decoder layers of a model, and what comes before and behind them."""

    def __init__(self, model: PreTrainedModel) -> None:
        experts = [module.path for module in find_experts(model)]
        self._model = model
        self.path = experts[0][: experts[0].index(f".{layer_of(experts[0])}.")]  # of their list
        self.count = len(list(model.get_submodule(self.path).children()))
        self._last = set(self._behind())

    def index(self, path: str) -> int | None:
        """The decoder layer that the module or weight at `path` is in."""
        return layer_of(f"{path}.") if path.startswith(f"{self.path}.") else None

    def is_last(self, path: str) -> bool:
        """Whether what is at `path` goes to the card of the last layer."""
        return any(path == last or path.startswith(f"{last}.") for last in self._last)

    def _behind(self) -> Iterator[str]:
        """The norms beside the layers, and the head, where it has weights of its own.

        A head that is the token table stays where the table is: a hidden state that crosses back is
        less than a second copy of it.
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
        """Every part of the model, in the pieces that are moved, and its device."""
        found = {}
        for share, device in zip(shares, devices, strict=True):
            found.update({f"{self.path}.{at}": device for at in share.blocks})
        for path in self._outside(self._model, ""):
            found[path] = devices[-1] if self.is_last(path) else devices[0]
        return found

    def _outside(self, module: nn.Module, path: str) -> Iterator[str]:
        """Paths of everything beside the layers: the largest modules, and lone tensors."""
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
    """Where the module at `path` is, by a map of its like or of one around it."""
    while path not in devices:
        assert path, "a module outside the map"
        path = path.rpartition(".")[0]
    return devices[path]
