"""How the experts of a step are computed, once their slots are ready."""

# T tokens, k experts a token, S = T * k cells, M rows of one expert, H hidden

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.cache.cache import ExpertCache
from offload.cache.decision import Use
from offload.cache.policies import POLICIES
from offload.cache.sharded import Cache, ShardedCache, card_and_row
from offload.engine.layer import Call
from offload.fit import Fit
from offload.quant.experts import (
    MOST_IN_ONE_CALL,
    Routine,
    block_cells,
    decode,
    kernels_work,
    make_batch,
    prefill,
    routine_for,
)
from offload.quant.pack import PackInfo
from offload.quant.record import MatrixView, view_record
from offload.transfer.base import Transfer
from offload.transfer.cards import CardsTransfer

FEW_TOKENS = 4  # with at most so many tokens, each cell reads its expert's weights for itself


class Compute(Protocol):
    """Computes experts whose records are in slots."""

    def together(self, call: Call) -> bool:
        """Whether experts that are ready at the same time are best computed in one `run`."""

    def run(self, call: Call, uses: Sequence[Use], cells: Tensor) -> None:
        """Fill the cells of these experts among all `cells` [S, H] of `call`.

        The value of a cell does not depend on which experts are computed together.
        """

    def reduced(self, call: Call, cells: Tensor) -> Tensor:
        """The weighted sum [T, H] over each token's `cells` [S, H], in one fixed order."""

    def close(self) -> None:
        """Let go of the slots."""


class OneByOne:
    """Computes one expert after the other, by the layer's own functions and the fastest product."""

    def __init__(self, info: PackInfo, transfer: Transfer) -> None:
        self._info, self._transfer = info, transfer
        # (layout, address) -> matrices; a record that is mapped, and a slot, stay where they are
        self._views: dict[tuple[int, int], dict[str, MatrixView]] = {}

    def together(self, call: Call) -> bool:
        return False

    def reduced(self, call: Call, cells: Tensor) -> Tensor:
        return call.reduced(cells)

    def run(self, call: Call, uses: Sequence[Use], cells: Tensor) -> None:
        layer, k = call.layer, call.index.shape[1]
        for use in uses:
            where = call.cells_of[use.expert]
            rows = call.hidden if len(call.hidden) == 1 else call.hidden[[n // k for n in where]]
            out = layer.expert(rows, self._matrices(layer.index, use.slot))  # [M, H]
            if len(where) == 1:
                cells[where[0]] = out[0]
            else:
                cells[where] = out

    def _matrices(self, layer: int, slot: int) -> dict[str, MatrixView]:
        record = self._transfer.slot(slot)
        key = self._info.layers[layer].layout, record.data_ptr()
        if key not in self._views:
            self._views[key] = view_record(record, self._info.layouts[key[0]])
        return self._views[key]

    def close(self) -> None:
        self._views.clear()


class OneCall(OneByOne):
    """Computes few tokens' experts by one call of a compiled routine, and many tokens' one by one.

    A layer for which `quant.experts` has no routine that works here is computed one by one.
    """

    def __init__(self, info: PackInfo, transfer: Transfer) -> None:
        super().__init__(info, transfer)
        self._routines: dict[tuple[int, torch.dtype], Routine | None] = {}  # of each layer

    def together(self, call: Call) -> bool:
        return self._routine(call) is not None

    def run(self, call: Call, uses: Sequence[Use], cells: Tensor) -> None:
        routine = self._routine(call)
        if routine is None:
            super().run(call, uses, cells)
            return
        records, numbers = [], []
        for use in uses:
            record = self._transfer.slot(use.slot).data_ptr()
            for cell in call.cells_of[use.expert]:
                records.append(record)
                numbers.append(cell)
        routine(call.hidden, records, numbers, cells)
        _normed(call, numbers, cells)

    def reduced(self, call: Call, cells: Tensor) -> Tensor:
        routine = self._routine(call)
        if routine is None:
            return call.reduced(cells)
        return routine.reduced(cells, call.weights)

    def _routine(self, call: Call) -> Routine | None:
        hidden = call.hidden
        if hidden.shape[0] > MOST_IN_ONE_CALL:
            return None
        key = call.layer.index, hidden.dtype
        if key not in self._routines:
            self._routines[key] = routine_for(call.layer.program, hidden.dtype)
        return self._routines[key]


class Grouped:
    """Computes all experts in two launches of kernels that read records through a table of slots.

    A layer for which `quant.experts` finds no kernels that work here is computed one by one.
    """

    def __init__(self, info: PackInfo, transfer: Transfer) -> None:
        self._transfer = transfer
        self._one_by_one = OneByOne(info, transfer)

    def together(self, call: Call) -> bool:
        return True

    def reduced(self, call: Call, cells: Tensor) -> Tensor:
        return call.reduced(cells)

    def run(self, call: Call, uses: Sequence[Use], cells: Tensor) -> None:
        layer, hidden, cells_of = call.layer, call.hidden, call.cells_of
        program, slots = layer.program, self._transfer.slots
        if not kernels_work(program, hidden.dtype, slots.device):
            self._one_by_one.run(call, uses, cells)
            return
        if len(hidden) <= FEW_TOKENS:
            table = [-1] * len(cells)
            for use in uses:
                for cell in cells_of[use.expert]:
                    table[cell] = use.slot
            slot_of_cell = torch.tensor(table, dtype=torch.int32)
            # A tensor this small is copied at once. A blocking copy would wait for everything that
            # was queued before it, record copies included.
            there = slot_of_cell.to(slots.device, non_blocking=True)
            decode(hidden, slots, there, program, cells)
        else:
            size = block_cells(len(cells), layer.num_experts)
            cells_of_slot = {use.slot: cells_of[use.expert] for use in uses}
            prefill(hidden, slots, make_batch(cells_of_slot, size, slots.device), program, cells)
        _normed(call, [cell for use in uses for cell in cells_of[use.expert]], cells)

    def close(self) -> None:
        self._one_by_one.close()


class CardsCompute:
    """`Compute`'s interface over one `Compute` for each card and its slots."""

    def __init__(self, computes: Sequence[Compute]) -> None:
        self._computes = tuple(computes)

    def together(self, call: Call) -> bool:
        return all(compute.together(call) for compute in self._computes)

    def reduced(self, call: Call, cells: Tensor) -> Tensor:
        return self._computes[0].reduced(call, cells)

    def run(self, call: Call, uses: Sequence[Use], cells: Tensor) -> None:
        places = [card_and_row(use.slot, len(self._computes)) for use in uses]
        card = places[0][0]  # the experts of a layer are on one card
        here = [Use(use.expert, row) for use, (_, row) in zip(uses, places, strict=True)]
        self._computes[card].run(call, here, cells)

    def close(self) -> None:
        for compute in self._computes:
            compute.close()


def _normed(call: Call, where: list[int], cells: Tensor) -> None:
    """Apply the norm that some models have behind an expert to the cells at `where`."""
    module: Any = call.layer.module
    if module.has_post_expert_norm:
        cells[where] = module.post_expert_norm(cells[where])


def cache_of(info: PackInfo, fit: Fit) -> Cache:
    """Slots that are all empty."""
    policy = POLICIES[fit.options.policy]
    if len(fit.caching) > 1:
        return ShardedCache(
            [ExpertCache(share.slots, share.moe_layers, policy) for _, share in fit.caching]
        )
    return ExpertCache(fit.slots, len(info.layers), policy)


def compute_of(info: PackInfo, transfer: Transfer) -> Compute:
    """The `Compute` for the slots of `transfer`."""
    if isinstance(transfer, CardsTransfer):
        return CardsCompute([compute_of(info, card) for card in transfer.transfers])
    return (OneCall if transfer.device.type == "cpu" else Grouped)(info, transfer)
