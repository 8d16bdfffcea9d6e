"""The tokens a benchmark feeds.

Knows: where real text comes from, and that no repetition reads what another has read. Does not
know: what is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pydoc_data import topics

import torch
from transformers import PreTrainedTokenizerBase


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of English: Python's own documentation, which every Python carries."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += tokenizer(topics.topics[name], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    return (ids * -(-count // len(ids)))[:count]


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """`count` tokens as llama-bench feeds them; they flatter or ruin a cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def stretches(ids: list[int], length: int) -> Iterator[list[int]]:
    """`ids` cut into runs of `length`, over and over.

    Each run of a test reads another one: a cache that has just seen the very text would hit more
    than it does in use.
    """
    count = max(1, len(ids) // length)
    return itertools.cycle([ids[at * length : (at + 1) * length] for at in range(count)])
