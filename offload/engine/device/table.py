"""The state of the cache as two flat tensors on the device, and the launches of its kernels.

Letters: L layers, E experts of the layer that has most, K experts a token, S slots. A key is the
number layer * E + expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from offload.cache.cache import CacheState
from offload.cache.eviction import pace
from offload.cache.heat import GROWTH, LayerHeat
from offload.cache.policies import (
    HALF_LIFE,
    MOST,
    REPEATS,
    Key,
    KeyState,
    PoolState,
    bonus_of,
    growth_of,
)
from offload.cache.statistics import LayerCounts
from offload.engine.device.kernels import decide_kernel, look_ahead_kernel

CHUNK = 512  # slots that the block of threads looks at together: one a thread spills no register
WARPS = 16
REGISTERS = 128  # for each thread: all there are, since nothing runs beside the block
COUNTS = (  # fields of `cache.statistics.LayerCounts`, in the order in which they are counted
    "requests",
    "hits",
    "misses",
    "evictions",
    "lookahead_guesses",
    "lookahead_right",
    "lookahead_loads",
    "lookahead_loads_right",
    "lookahead_asked",
)


@dataclass(frozen=True)
class Places:
    """Sizes of a cache, and with them the offset of every part of `ints` (int64) and `reals`
    (float64): `places.key_in` is where the part "key_in" begins.

    The value is frozen, so kernels take it as a constant.
    """

    layers: int  # L
    experts: int  # E
    k: int  # K
    slots: int  # S
    policy: str  # lfru or lru

    @property
    def lfru(self) -> bool:
        return self.policy == "lfru"

    @property
    def counts(self) -> int:
        return len(COUNTS)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where each part of `ints` and of `reals` lies in its tensor."""
        keys = self.layers * self.experts
        ints = (
            ("steps", 1),  # of layers so far; a key in use bears the number of the last one
            ("taken", 1),  # how many slots are no longer free; they are the first ones
            ("ordered", 1),  # the highest number given to a useless key
            ("halted", 1),  # not 0: the sequence is over and nothing is to be decided any more
            ("slot_of", keys),  # -1: not resident
            ("used", keys),  # its layer's step at the last use, or -1
            ("key_in", self.slots),  # -1: no key
            ("in_use", self.slots),  # the number of the step that used it last
            ("guessed", self.slots),  # 1: it stays until its layer's next step
            ("useless", self.slots),  # its place among keys loaded by a wrong guess, or 0
            ("now", self.layers),  # steps of the layer
            ("guessing", self.layers),  # 1: a guess was made for the layer's next step
            ("guess", self.layers * 3 * self.k),  # [L, 3, K]: expert or -1, was absent, was loaded
            ("tokens", 1),
            ("counters", self.layers * self.counts),  # [L, COUNTS]
        )
        reals = (
            ("growth", 1),  # factor by which a use counts more with each step
            ("bonus", 1),  # what a use at the last step is worth, in uses
            ("most", 1),  # what a use may count before scores are scaled down
            ("heat_growth", 1),
            ("pace", self.layers + 1),  # by the number of layers until the slot's layer is asked
            ("trust", self.layers),
            ("unit", self.layers),  # what a use counts now
            ("inverse", self.layers),  # 1 / unit
            ("heat_unit", self.layers),
            ("score", keys),
            ("heat", keys),
            ("worth", self.slots),  # while victims are chosen
        )
        found = {}
        for whole, parts in (("ints", ints), ("reals", reals)):
            begin = 0
            for name, length in parts:
                found[name] = slice(begin, begin + length)
                begin += length
            found[whole] = slice(begin, begin)  # `places.ints` and `places.reals` are whole lengths
        return found

    def __getattr__(self, name: str) -> int:
        """The offset of the part called `name`."""
        if name.startswith("_") or name not in self.parts:
            raise AttributeError(f"there is no part {name!r}")
        begin: int = self.parts[name].start
        return begin


class Table:
    """Which key is in which slot and what the cache knows, as the kernels see it."""

    def __init__(self, places: Places, device: torch.device) -> None:
        self.places = places
        self.ints = torch.zeros(places.ints, dtype=torch.int64, device=device)
        self.reals = torch.zeros(places.reals, dtype=torch.float64, device=device)
        # A cell is one choice of an expert by the token.
        cells = torch.full((4, places.layers, places.k), -1, dtype=torch.int32, device=device)
        # The slot that a cell is computed from: at once, or after a copy. -1: the other applies.
        self.hits, self.loads = cells[:2]
        # The experts guessed for a layer, and the slots that they are copied to, or -1.
        self.guesses, self.guess_loads = cells[2:]
        self._padded = triton.next_power_of_2(places.k)
        self._chunk = min(CHUNK, triton.next_power_of_2(places.slots))

    def decide(self, layer: int, num_experts: int, index: Tensor) -> None:
        """Decide into `hits` and `loads` how the experts `index` [.., k] of a token are served."""
        self._launch(decide_kernel, layer, num_experts, index, self.hits, self.loads)

    def look_ahead(self, layer: int, num_experts: int, index: Tensor) -> None:
        """Decide into `guesses` and `guess_loads` what to load for a later `layer`."""
        self._launch(look_ahead_kernel, layer, num_experts, index, self.guesses, self.guess_loads)

    def _launch(
        self, kernel: Any, layer: int, num_experts: int, index: Tensor, said: Tensor, loads: Tensor
    ) -> None:
        """Launch `kernel`, which writes what it decides for `layer` to `said` and `loads`."""
        kernel[(1,)](
            index,
            layer,
            num_experts,
            index.numel(),
            self.ints,
            self.reals,
            said[layer],
            loads[layer],
            P=self.places,
            KB=self._padded,
            CHUNK=self._chunk,
            num_warps=WARPS,
            maxnreg=REGISTERS,
            enable_fp_fusion=False,
        )

    @property
    def halted(self) -> Tensor:
        """[1] int64: not zero once nothing is to be decided any more."""
        return self.ints[self.places.parts["halted"]]

    @property
    def counts(self) -> Tensor:
        """[1 + L * COUNTS] int64: tokens, then what was counted at each layer."""
        return self.ints[self.places.tokens :]

    def upload(self, state: CacheState, counted: Sequence[int] = ()) -> None:
        """Go on from `state`, and count on from `counted`, laid out as `counts`, or from 0."""
        at, part = self.places, self.places.parts
        ints, reals = torch.zeros(at.ints, dtype=torch.int64), self.reals.new_zeros(at.reals).cpu()
        taken = sum(key is not None for key in state.keys)
        assert all(key is None for key in state.keys[taken:]), "free slots are not the last ones"
        ints[at.taken] = taken
        ints[at.steps] = 1  # no slot bears this number, so nothing is in use between two tokens
        for name in ("slot_of", "used", "key_in"):
            ints[part[name]] = -1
        held = torch.tensor([self._number(key) for key in state.keys if key], dtype=torch.int64)
        ints[at.key_in : at.key_in + taken] = held
        ints[at.slot_of + held] = torch.arange(taken)
        for order, key in enumerate(state.useless, start=1):
            ints[at.useless + int(ints[at.slot_of + self._number(key)])] = order
        ints[at.ordered] = len(state.useless)
        reals[at.growth], reals[at.bonus] = growth_of(HALF_LIFE), bonus_of(HALF_LIFE, REPEATS)
        reals[at.most], reals[at.heat_growth] = MOST, GROWTH
        for ahead in range(1, at.layers + 1):
            reals[at.pace + ahead] = pace(ahead, at.layers)
        for layer, pool in enumerate(state.pools):
            ints[at.now + layer] = pool.now
            reals[at.unit + layer], reals[at.inverse + layer] = pool.unit, 1.0 / pool.unit
            for key, known in pool.keys.items():
                reals[at.score + self._number(key)] = known.score
                ints[at.used + self._number(key)] = known.used
        reals[part["trust"]] = torch.tensor(state.trust, dtype=torch.float64)
        for layer, heat in enumerate(state.heat):
            reals[at.heat_unit + layer] = heat.unit
            for expert, uses in heat.uses.items():
                reals[at.heat + self._number((layer, expert))] = uses
        if counted:
            ints[at.tokens :] = torch.tensor(counted)
        self.ints.copy_(ints)
        self.reals.copy_(reals)

    def download(self) -> CacheState:
        """The state that the kernels arrived at. Waits for the kernels."""
        at, part, ints, reals = self.places, self.places.parts, self.ints.cpu(), self.reals.cpu()
        held = ints[part["key_in"]].tolist()
        resident = {key for key in held if key >= 0}
        orders = ints[part["useless"]].tolist()
        useless = sorted((order, held[slot]) for slot, order in enumerate(orders) if order)
        score, used = reals[part["score"]].tolist(), ints[part["used"]].tolist()
        heat, heat_unit = reals[part["heat"]].tolist(), reals[part["heat_unit"]].tolist()
        now, unit = ints[part["now"]].tolist(), reals[part["unit"]].tolist()
        pools, heats = [], []
        for layer in range(at.layers):
            keys = range(layer * at.experts, (layer + 1) * at.experts)
            known = {
                self._key(key): KeyState(score[key], used[key])
                for key in keys
                if score[key] or key in resident
            }
            pools.append(PoolState(now[layer], unit[layer], known))
            uses = {key % at.experts: heat[key] for key in keys if heat[key]}
            heats.append(LayerHeat(heat_unit[layer], uses))
        return CacheState(
            tuple(None if key < 0 else self._key(key) for key in held),
            tuple(pools),
            tuple(self._key(key) for _, key in useless),
            tuple(reals[part["trust"]].tolist()),
            tuple(heats),
        )

    def _number(self, key: Key) -> int:
        return key[0] * self.places.experts + key[1]

    def _key(self, number: int) -> Key:
        return divmod(number, self.places.experts)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other. Waits for the kernels."""
        at, part, ints = self.places, self.places.parts, self.ints.cpu()
        held, slot_of = ints[part["key_in"]].tolist(), ints[part["slot_of"]].tolist()
        taken = int(ints[at.taken])
        assert all(key >= 0 for key in held[:taken]), "a slot was given away and is empty"
        assert all(key < 0 for key in held[taken:]), "a free slot holds a key"
        assert sorted(slot for slot in slot_of if slot >= 0) == list(range(taken)), "a slot is lost"
        for slot, key in enumerate(held[:taken]):
            assert slot_of[key] == slot, f"slot {slot} does not hold {self._key(key)}"
        assert not ints[part["useless"]][taken:].any(), "a useless key is gone"
        assert not ints[part["guessed"]][taken:].any(), "a guess is gone"
        counters = ints[part["counters"]].view(at.layers, at.counts)
        assert bool((counters[:, 1] + counters[:, 2] == counters[:, 0]).all())


def add_counters(counters: Sequence[int], layers: list[LayerCounts]) -> None:
    """Add what the kernels counted [L * COUNTS] to `layers`."""
    for at, number in enumerate(counters):
        layer, place = divmod(at, len(COUNTS))
        counts, name = layers[layer], COUNTS[place]
        setattr(counts, name, getattr(counts, name) + number)
