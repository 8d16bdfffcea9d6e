"""Which card gets which layers and how many expert slots.

Each card gets a range of decoder layers, so a hidden state crosses once from each card to the next.
The ranges maximise the room on the tightest card, measured in slots for each expert of its layers.
The reason is that cards work in turn and each caches its own layers, so a token waits for the
misses of all of them. The hit rate grows ever more slowly with the resident share, so a card that
gives room away loses more hits than another card gains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import inf

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from offload.budget.budget import kv_cache_bytes
from offload.errors import BudgetError
from offload.fit import Share
from offload.model.seam import LAYER, find_experts, head_is_tied, layer_of
from offload.quant.pack import PackInfo
from offload.units import gib


@dataclass(frozen=True)
class Block:
    """One decoder layer: bytes of its dense weights and KV cache, and its number of experts."""

    dense: int
    kv_cache: int
    experts: int  # 0 in a layer without experts


@dataclass(frozen=True)
class Demand:
    """What a model needs, in bytes."""

    blocks: tuple[Block, ...]
    first: int  # weights before the layers, on the first card
    last: int  # weights after the layers, on the last card
    workspace: int  # on each card
    slot: int


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
    read at once, and `workspace` the bytes needed on each card. The sum equals what `Budget` counts
    for a single card.
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
    caches = kv_cache_bytes(config, context, dtype, ubatch)
    if len(caches) != layers.count:  # the config counts layers differently: share them evenly
        ends = [sum(caches) * at // layers.count for at in range(layers.count + 1)]
        caches = [end - begin for begin, end in pairwise(ends)]
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


def place(
    demand: Demand,
    available: Sequence[int],
    slots: int | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> tuple[Share, ...]:
    """Return every card's share, given the bytes `available` on each card.

    `slots` is the number of expert slots over all cards; None means as many as fit. `numbers` are
    the cards' numbers for messages; None means 0, 1, ... Raises `BudgetError`, which names the card
    with too little memory.
    """
    if len(available) > len(demand.blocks):
        raise BudgetError(
            f"{len(available)} GPUs for {len(demand.blocks)} layers: name fewer with --gpus"
        )
    room = _Room(demand, tuple(available), tuple(numbers or range(len(available))))
    cuts = _best_cuts(room)
    fit = [min(room.slots(card, *cut), room.experts(*cut)) for card, cut in enumerate(cuts)]
    experts = [room.experts(*cut) for cut in cuts]
    given = fit if slots is None else _divided(slots, experts, fit, room)
    return tuple(
        Share(
            room.numbers[card],
            range(*cut),
            sum(block.experts > 0 for block in demand.blocks[slice(*cut)]),
            experts[card],
            given[card],
            room.dense(card, *cut),
            room.kv_cache(*cut),
            demand.workspace,
        )
        for card, cut in enumerate(cuts)
    )


class _Room:
    """What a card would hold if it had the layers [begin, end)."""

    def __init__(
        self, demand: Demand, available: tuple[int, ...], numbers: tuple[int, ...]
    ) -> None:
        self.demand, self.available, self.numbers = demand, available, numbers
        self.cards, self.layers = len(available), len(demand.blocks)
        self._dense = [0, *accumulate(block.dense for block in demand.blocks)]
        self._kv_cache = [0, *accumulate(block.kv_cache for block in demand.blocks)]
        self._experts = [0, *accumulate(block.experts for block in demand.blocks)]

    def dense(self, card: int, begin: int, end: int) -> int:
        ends = (card == 0) * self.demand.first + (card == self.cards - 1) * self.demand.last
        return self._dense[end] - self._dense[begin] + ends

    def kv_cache(self, begin: int, end: int) -> int:
        return self._kv_cache[end] - self._kv_cache[begin]

    def experts(self, begin: int, end: int) -> int:
        return self._experts[end] - self._experts[begin]

    def left(self, card: int, begin: int, end: int) -> int:
        """Bytes left for slots. A negative number means that even the rest does not fit."""
        fixed = self.dense(card, begin, end) + self.kv_cache(begin, end) + self.demand.workspace
        return self.available[card] - fixed

    def slots(self, card: int, begin: int, end: int) -> int:
        return max(0, self.left(card, begin, end) // self.demand.slot)

    def least(self, begin: int, end: int) -> int:
        """Bytes of the slots that the card needs at the very least: one slot if it has experts."""
        return self.demand.slot if self.experts(begin, end) else 0

    def fits(self, card: int, begin: int, end: int) -> bool:
        return self.left(card, begin, end) >= self.least(begin, end)

    def ampleness(self, card: int, begin: int, end: int) -> float:
        """Slots that fit for each expert, perhaps more than one; -inf if the layers do not fit."""
        if not self.fits(card, begin, end):
            return -inf
        experts = self.experts(begin, end)
        return self.slots(card, begin, end) / experts if experts else inf


def _best_cuts(room: _Room) -> list[tuple[int, int]]:
    """Choose the range of layers of each card, at least one layer each. Raises `BudgetError`.

    Among the choices that leave the most room on the tightest card, take one with the most resident
    experts.
    """

    def last_begins(card: int, end: int) -> range:
        return range(card, end) if card else range(1)  # each card before has at least one layer

    @cache
    def tightest(card: int, end: int) -> float:
        """The best room on the tightest of cards 0 to `card` with the layers before `end`."""
        return max(
            min(tightest(card - 1, at) if card else inf, room.ampleness(card, at, end))
            for at in last_begins(card, end)
        )

    goal = tightest(room.cards - 1, room.layers)
    if goal == -inf:
        raise _too_little(room)

    @cache
    def resident(card: int, end: int) -> tuple[int, int]:
        """The most experts that can be resident if no card has less room than the goal, and the
        first layer of the last card."""
        best = (-1, 0)
        for at in last_begins(card, end):
            before = resident(card - 1, at)[0] if card else 0
            if before < 0 or room.ampleness(card, at, end) < goal:
                continue
            here = min(room.slots(card, at, end), room.experts(at, end))
            best = max(best, (before + here, at))
        return best

    cuts, end = [], room.layers
    for card in reversed(range(room.cards)):
        begin = resident(card, end)[1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]


def _too_little(room: _Room) -> BudgetError:
    """Fill one card after the other: the error of the first that cannot hold a layer."""
    begin = 0
    for card in range(room.cards):
        rest = room.cards - 1 - card  # later cards, each of which needs a layer
        ends = range(begin + 1 if rest else room.layers, room.layers - rest + 1)
        fitting = [end for end in ends if room.fits(card, begin, end)]
        if not fitting:
            end = ends[0]
            break
        begin = fitting[-1]
    need = room.least(begin, end) + room.available[card] - room.left(card, begin, end)
    layers = f"layers {begin} to {end - 1}" if end - begin > 1 else f"layer {begin}"
    return BudgetError(
        f"not enough memory on GPU {room.numbers[card]}: {gib(need)} needed for {layers}, KV "
        f"cache, workspace and one expert slot, {gib(room.available[card])} allowed: raise --vram, "
        "lower --ctx-size or --ubatch-size, or name more or larger GPUs with --gpus"
    )


def _divided(slots: int, experts: Sequence[int], fit: Sequence[int], room: _Room) -> list[int]:
    """Divide `slots` among the cards: the next slot always goes to the card with the smallest share
    of its experts resident, and no card gets more than `fit`."""
    given = [min(1, count) for count in experts]
    if slots < sum(given):
        raise BudgetError(
            f"{slots} expert slots for {len(experts)} GPUs: each needs at least one, raise "
            "--expert-slots"
        )
    wanted = min(slots, sum(experts))
    if wanted > sum(fit):
        held = ", ".join(f"{n} on GPU {room.numbers[card]}" for card, n in enumerate(fit))
        raise BudgetError(
            f"not enough memory for {wanted} expert slots of {gib(room.demand.slot)}, {sum(fit)} "
            f"fit ({held}): "
            "lower --ctx-size, --ubatch-size, --expert-slots or --expert-bits, or raise --vram"
        )
    while sum(given) < wanted:
        _, least = min((n / experts[at], at) for at, n in enumerate(given) if n < fit[at])
        given[least] += 1
    return given


class Layers:
    """The decoder layers of a model, and the parts before and after them."""

    def __init__(self, model: PreTrainedModel) -> None:
        match = LAYER.match(find_experts(model)[0].path)
        assert match is not None, "experts outside the decoder layers"
        self._model = model
        self.path = match[1]  # of the module list
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
        if head is not None and not head_is_tied(self._model):
            yield next(name for name, module in self._model.named_modules() if module is head)

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
        for tensors in (module.named_parameters, module.named_buffers):
            yield from (path + name for name, _ in tensors(recurse=False))
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
