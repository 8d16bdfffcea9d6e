"""The size of a model's KV cache, found by running the model without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload.model.seam import build_on_meta, is_experts_module, model_class, own_config

# Tokens of the trial run. The number is odd so that layers which collect tokens until a block is
# full show that they hold an incomplete block.
PROBE = 255
DEPTH = 4  # deepest nesting of containers in a cache layer


def cache_bytes(
    config: PreTrainedConfig, context: int, dtype: torch.dtype, ubatch: int, fixed: bool = False
) -> list[int]:
    """Return each layer's cache size in bytes, for one sequence of `context` tokens that is read
    `ubatch` tokens at a time.

    `fixed` asks about a cache whose tensors never move (`offload.generation.fixed_kv`): it holds a
    window at its full length, and no states of a prompt that are cut off later.

    The model itself runs on the meta device, without its experts, so whatever its layers keep is
    counted: latent, compressed or recurrent states, or a window. Raises whatever the model raises.
    """
    tokens = min(PROBE, context)
    model = _on_meta(config, dtype)
    long = _layers(model, tokens)
    short: list[Any] = []
    sizes = [0] * len(long)
    for index, layer in enumerate(long):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if not layer.is_initialized:
                continue  # this layer shares the cache of another one
            a_token = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
            most = context
            if type(layer) is DynamicSlidingWindowLayer and not fixed:
                most = min(context, layer.sliding_window - 1 + ubatch)
            sizes[index] = a_token * most
            continue
        short = short or _layers(model, max(1, tokens // 2))
        here, before = _Held.by(layer), _Held.by(short[index])
        rest, step = context - tokens, max(1, tokens - tokens // 2)
        grown = max(0, here.used - before.used) * rest // step
        sizes[index] = here.used + grown
        if not fixed:
            cut = max(0, here.cut - before.cut) * max(0, min(context, ubatch) - tokens) // step
            sizes[index] += here.cut + cut
    return sizes


@dataclass
class _Held:
    """Bytes of the tensors in a cache layer."""

    used: int = 0
    # A sliding-window layer returns a view. The full prompt stays allocated behind that view until
    # the next step; these are its bytes.
    cut: int = 0

    @classmethod
    def by(cls, layer: Any) -> _Held:
        held = cls()
        held._add(layer, set(), DEPTH)
        return held

    def _add(self, part: Any, seen: set[int], depth: int) -> None:
        if id(part) in seen or depth < 0:
            return
        seen.add(id(part))
        if isinstance(part, Tensor):
            self.used += part.nbytes
            self.cut += part.untyped_storage().nbytes() - part.nbytes
        elif isinstance(part, list | tuple | dict) or hasattr(part, "__dict__"):
            items = part if isinstance(part, list | tuple | dict) else vars(part)
            for item in items.values() if isinstance(items, dict) else items:
                self._add(item, seen, depth - 1)


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    cls = model_class(config, "", False)
    model = build_on_meta(own_config(config, cls), cls).to(dtype).eval()
    for module in model.modules():
        if is_experts_module(module):
            module.forward = _unchanged  # experts do not change the size of the cache
    return model


def _unchanged(hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden


@torch.inference_mode()
def _layers(model: nn.Module, tokens: int) -> list[Any]:
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    layers: list[Any] = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache.layers
    return layers
