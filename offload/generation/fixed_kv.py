"""A KV cache whose tensors stay where they are, so that a captured step finds them."""

import copy
from typing import Any

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
                for kind in ("conv_states", "recurrent_states"):
                    for at, state in getattr(mine, kind).items():
                        if state is not None:
                            state.copy_(getattr(theirs, kind)[at])
                continue
            seen, kept = theirs.get_seq_length(), theirs.keys.shape[-2]
            mine.keys[:, :, seen - kept : seen].copy_(theirs.keys)
            mine.values[:, :, seen - kept : seen].copy_(theirs.values)
            mine.cumulative_length.fill_(seen)

    def cut(self, length: int) -> bool:
        """Keep only the first `length` tokens, at whatever point a step broke off.

        False if that is impossible, since a layer keeps a sum to which more may have been added.
        """
        if any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return False
        for layer in self.layers:
            if type(layer) is not DummyLayer:
                layer.cumulative_length.fill_(length)  # what follows is masked
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


def _fixed_layer(grown: object, length: int) -> Any:
    kind = type(grown)
    if kind in (LinearAttentionLayer, DummyLayer):  # what they hold is always written in place
        return copy.deepcopy(grown)
    if isinstance(grown, DynamicLayer) and kind in (DynamicLayer, DynamicSlidingWindowLayer):
        if grown.keys is None:
            raise CannotBeFixed("it keeps states of its own outside the cache")
        layer = StaticLayer(max_cache_len=length)
        layer.lazy_initialization(grown.keys, grown.values)
        return layer
    raise CannotBeFixed(f"its cache has layers of type {kind.__name__}")
