"""A model's KV cache: how large it gets, and taking back what a step that broke off left in it.

Knows: transformers' cache layers. Does not know: budgets (`offload.budget`), why a step broke off
(`offload.recovery`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from offload.model.seam import build_on_meta, is_experts_module, model_class, own_config

PROBE = 255  # tokens that a model without memory is given; odd, so that what waits for more shows
DEPTH = 4  # of containers in a cache layer


def cache_bytes(
    config: PreTrainedConfig, context: int, dtype: torch.dtype, ubatch: int, fixed: bool = False
) -> list[int]:
    """Bytes of each layer's cache of one sequence of `context` tokens, read `ubatch` at a time.

    `fixed`: of one whose tensors never move (`offload.device.kv`), with windows kept whole and
    nothing of a prompt that is cut off later.

    The model itself is run on meta, without its experts: whatever its layers keep (latent or
    compressed states, recurrent ones, a window) is seen. Raises whatever a model raises.
    """
    tokens = min(PROBE, context)
    model = _on_meta(config, dtype)
    long = _layers(model, tokens)
    short: list[Any] = []
    sizes = [0] * len(long)
    for index, layer in enumerate(long):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if not layer.is_initialized:
                continue  # it shares another layer's
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
    cut: int = 0  # behind a view: of a prompt's states a window remains, until the next step

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
            module.forward = _unchanged  # what they do is not asked
    return model


def _unchanged(hidden: Tensor, *_: Tensor) -> Tensor:
    return hidden


@torch.inference_mode()
def _layers(model: nn.Module, tokens: int) -> list[Any]:
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    layers: list[Any] = model(
        input_ids=ids, use_cache=True, logits_to_keep=1
    ).past_key_values.layers
    return layers
