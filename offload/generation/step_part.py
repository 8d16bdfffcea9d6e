"""One whole token: the model, the choice of the next token, and that token fed back.

Knows: tensors that stay where they are. Does not know: experts (the model looks like any
transformers model), graphs, text. Nothing in a step asks the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.engine.device.table import Table
from offload.generation.fixed_kv import FixedKV
from offload.sampling import Sampler


class DecodeStep:
    """Everything a step reads and writes."""

    def __init__(
        self,
        model: PreTrainedModel,
        kv: FixedKV,
        sampler: Sampler,
        ends: Sequence[int],
        table: Table,
    ) -> None:
        """A token of `ends` halts the `table`: the steps after it decide nothing."""
        device = model.device
        self.kv, self.sampler = kv, sampler
        self._model = model
        self._ends = torch.tensor([*ends, -1], device=device)
        self.table = table
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._ids = torch.zeros(1, kv.length + 1, dtype=torch.int64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)  # place in `_ids`
        # token, trouble, and the table's counts
        self.said = torch.zeros(2 + len(table.counts), dtype=torch.int64, device=device)

    def begin(self, prompt: Tensor, logits: Tensor) -> None:
        """Choose the first token after `prompt` [1, T], from the `logits` [1, V] of its last."""
        self.table.halted.zero_()
        self._ids.copy_(prompt[:, :1].expand_as(self._ids))  # what is not said yet changes nothing
        self._ids[:, : prompt.shape[1]] = prompt
        self._next.fill_(prompt.shape[1])
        self._say(logits)

    def go_back(self, length: int) -> bool:
        """Be as before a step that broke off anywhere: `length` tokens are read, and one is chosen
        to be read next. False: the KV cache has to be filled anew with those tokens."""
        self._token.copy_(self._ids[:, length : length + 1])
        self._ids[:, length + 1 :] = self._ids[:, :1]
        self._next.fill_(length + 1)
        return self.kv.cut(length)

    def read(self, length: int) -> Tensor:
        """The first `length` tokens [1, length]."""
        return self._ids[:, :length]

    def __call__(self) -> None:
        self.table.halted.logical_or_((self._token == self._ends).any())
        out = self._model(
            input_ids=self._token, past_key_values=self.kv, use_cache=True, logits_to_keep=1
        )
        self._say(out.logits[:, -1])

    def _say(self, logits: Tensor) -> None:
        token, trouble = self.sampler.draw(self._ids, logits)
        self._token.copy_(token)
        self._ids.index_copy_(1, self._next, token)
        self._next.add_(1)
        self.said.copy_(torch.cat((token.view(1), trouble.view(1), self.table.counts)))
