"""The KV cache of a conversation, kept between its turns.

Knows: which tokens the cache holds, and whether it can be cut back. Does not know: models, texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PromptCache:
    """What the model has read, for the next prompt that begins alike.

    While an answer is made it holds nothing: one that breaks off at any point leaves nothing that
    could be half written.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._cache: Any = None  # transformers' `Cache`

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """The cache of the longest beginning of `prompt` that it holds, and that many tokens.

        At least one token is left to be read. Layers that keep only the end of what they read
        (a sliding window that was passed) or a sum of it (linear attention) cannot be cut back:
        they serve prompts that go on from where they are.
        """
        held, cache = self._ids, self._cache
        self.forget()
        same = 0
        for old, new in zip(held, prompt[:-1], strict=False):
            if old != new:
                break
            same += 1
        if cache is None or not same:
            return None, 0
        if same < len(held):
            if not cache.is_croppable:
                return None, 0
            try:
                cache.crop(same - len(held))
            except RuntimeError:  # only some of its layers can: what is left is not used
                return None, 0
        return cache, same

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """`cache` holds exactly `ids`; None: it is not known any more."""
        self._ids, self._cache = list(ids), cache

    def forget(self) -> None:
        """Hold nothing."""
        self._ids, self._cache = [], None
