"""A KV cache whose tensors stay where they are, so that a captured step finds them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from offload.quant.errors import OffloadError


class CannotBeFixed(OffloadError):
    """The model's cache has a kind of layer that cannot be fixed."""


class FixedKV(Cache):  # type: ignore[misc]  # transformers has no types here
    """A cache that is filled anew for each sequence, and written in place by the step.

    Sliding windows are kept whole, and the mask hides what is outside the window: a fixed layer
    that slides would count in Python, which a captured step does not repeat.
    """

    def __init__(self, grown: Cache, length: int) -> None:
        """Room for `length` tokens in layers like those of `grown`. Raises `CannotBeFixed`."""
        super().__init__(layers=[_fixed_layer(layer, length) for layer in grown.layers])
        self.length = length
        self._windows = [getattr(layer, "sliding_window", None) for layer in grown.layers]

    def fill(self, grown: Cache) -> None:
        """Copy the states of `grown` into this cache's tensors."""
        for mine, theirs in zip(self.layers, grown.layers, strict=True):
            if type(mine) is DummyLayer:
                continue
            if isinstance(mine, LinearAttentionLayer):
                for state in range(mine.number_of_states):
                    _copy(mine.conv_states[state], theirs.conv_states[state])
                    _copy(mine.recurrent_states[state], theirs.recurrent_states[state])
                continue
            seen, kept = theirs.get_seq_length(), theirs.keys.shape[-2]
            mine.keys[:, :, seen - kept : seen].copy_(theirs.keys)
            mine.values[:, :, seen - kept : seen].copy_(theirs.values)
            mine.cumulative_length.fill_(seen)

    def cut(self, length: int) -> bool:
        """Hold only the first `length` tokens, wherever a step broke off.

        False: that is impossible, since a layer keeps a sum to which more may have been added.
        """
        if any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return False
        for layer in self.layers:
            if type(layer) is not DummyLayer:
                layer.cumulative_length.fill_(length)  # later places are masked, and written again
        return True

    def grown(self, length: int) -> Cache | None:
        """A growing cache of the first `length` tokens.

        None where a layer keeps only a sum, to which a later step has added.
        """
        cache = DynamicCache()
        for mine, window in zip(self.layers, self._windows, strict=True):
            if isinstance(mine, LinearAttentionLayer):
                return None
            if type(mine) is DummyLayer:
                cache.layers.append(DummyLayer())
                continue
            layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
            layer.lazy_initialization(mine.keys, mine.values)
            first = 0 if window is None else max(0, length - window + 1)
            layer.keys = mine.keys[:, :, first:length].clone()
            layer.values = mine.values[:, :, first:length].clone()
            if window is not None:
                layer.cumulative_length = length
            cache.layers.append(layer)
        return cache


def _copy(to: torch.Tensor | None, what: torch.Tensor | None) -> None:
    if to is not None and what is not None:
        to.copy_(what)


def _fixed_layer(grown: object, length: int) -> Any:
    kind = type(grown)
    if isinstance(grown, LinearAttentionLayer) and kind is LinearAttentionLayer:
        return _fixed_states(grown)
    if type(grown) is DummyLayer:
        return DummyLayer()
    if isinstance(grown, DynamicLayer) and kind in (DynamicLayer, DynamicSlidingWindowLayer):
        if grown.keys is None:
            raise CannotBeFixed("it keeps states of its own beside the cache")
        keys, values = grown.keys, grown.values
        layer = StaticLayer(max_cache_len=length)
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.batch_size, layer.num_heads = keys.shape[:2]
        layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
        layer.keys = keys.new_zeros(*keys.shape[:2], length, keys.shape[-1])
        layer.values = values.new_zeros(*values.shape[:2], length, values.shape[-1])
        layer.cumulative_length = layer.cumulative_length.to(keys.device)
        layer.is_initialized = True
        return layer
    raise CannotBeFixed(f"its cache has layers of type {kind.__name__}")


def _fixed_states(grown: LinearAttentionLayer) -> LinearAttentionLayer:
    """A layer like `grown`, a kind whose states are always written in place."""
    layer = LinearAttentionLayer(grown.number_of_states)
    layer.dtype, layer.device = grown.dtype, grown.device
    layer.has_previous_state = dict(grown.has_previous_state)
    layer.conv_kernel_size = dict(grown.conv_kernel_size)
    layer.is_conv_states_initialized = dict(grown.is_conv_states_initialized)
    layer.is_recurrent_states_initialized = dict(grown.is_recurrent_states_initialized)
    for mine, theirs in (
        (layer.conv_states, grown.conv_states),
        (layer.recurrent_states, grown.recurrent_states),
    ):
        mine.update({at: None if t is None else torch.empty_like(t) for at, t in theirs.items()})
    return layer
