"""The state of the cache as tensors on the compute device.

Knows: how `cache.state.CacheState` becomes tensors and tensors become that again, and how to have
the kernels decide. Does not know: bytes, streams, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from offload.cache.allocation import pace
from offload.cache.decision import CacheState, HeatState
from offload.cache.heat import GROWTH
from offload.cache.policies import HALF_LIFE, MOST, REPEATS, bonus_of, growth_of
from offload.cache.policy import Key, KeyState, PoolState
from offload.cache.statistics import LayerCounts
from offload.engine.device.kernels import decide_kernel, look_ahead_kernel
from offload.engine.device.places import COUNTS, Places

CHUNK = 512  # slots the block of threads looks at together: one a thread, so none is spilled
WARPS = 16
REGISTERS = 128  # a thread: all there are, for nothing runs beside the block's threads


class Table:
    """Who is resident, as the kernels see it."""

    def __init__(self, places: Places, device: torch.device) -> None:
        self.places = places
        self.ints = torch.zeros(places.ints, dtype=torch.int64, device=device)
        self.reals = torch.zeros(places.reals, dtype=torch.float64, device=device)
        cells = (places.layers, places.k)
        # The slot that each cell of a layer's step is computed from: at once, or after a copy.
        self.hits = torch.full(cells, -1, dtype=torch.int32, device=device)
        self.loads = torch.full(cells, -1, dtype=torch.int32, device=device)
        # What was guessed for a layer, and the slots it is copied to.
        self.guesses = torch.full(cells, -1, dtype=torch.int32, device=device)
        self.guess_loads = torch.full(cells, -1, dtype=torch.int32, device=device)
        self._padded = triton.next_power_of_2(places.k)
        self._chunk = min(CHUNK, triton.next_power_of_2(places.slots))

    def decide(self, layer: int, num_experts: int, index: Tensor) -> None:
        """Decide how the experts `index` [.., k] of one token are served: `hits`, `loads`."""
        self._launch(decide_kernel, layer, num_experts, index, self.hits, self.loads)

    def look_ahead(self, layer: int, num_experts: int, index: Tensor) -> None:
        """Decide what to load for a later `layer`: `guesses`, `guess_loads`."""
        self._launch(look_ahead_kernel, layer, num_experts, index, self.guesses, self.guess_loads)

    def _launch(
        self,
        kernel: Any,
        layer: int,
        num_experts: int,
        index: Tensor,
        said: Tensor,
        loads: Tensor,
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
        """[1] int64: not zero where nothing is to be decided any more."""
        return self.ints[self.places.halted : self.places.halted + 1]

    @property
    def counts(self) -> Tensor:
        """[1 + L * COUNTS] int64: tokens, and what was counted at each layer."""
        return self.ints[self.places.tokens :]

    def upload(self, state: CacheState, counted: Sequence[int] = ()) -> None:
        """Go on from `state`, and count on from `counted` (as `counts`); else from 0."""
        at = self.places
        ints, reals = torch.zeros(at.ints, dtype=torch.int64), self.reals.new_zeros(at.reals).cpu()
        taken = sum(key is not None for key in state.keys)
        assert all(key is None for key in state.keys[taken:]), "free slots are not the last ones"
        ints[at.taken] = taken
        ints[at.steps] = 1  # no slot bears its number: nothing is in use between two tokens
        ints[at.slot_of : at.slot_of + at.keys] = -1
        ints[at.key_in : at.key_in + at.slots] = -1
        ints[at.used : at.used + at.keys] = -1
        numbers = [self._number(key) for key in state.keys if key is not None]
        held = torch.tensor(numbers, dtype=torch.int64)
        ints[at.key_in : at.key_in + taken] = held
        ints[at.slot_of + held] = torch.arange(taken)
        for order, key in enumerate(state.useless, start=1):
            ints[at.useless + int(ints[at.slot_of + self._number(key)])] = order
        ints[at.ordered] = ints[at.useless_keys] = len(state.useless)
        reals[at.growth], reals[at.bonus] = growth_of(HALF_LIFE), bonus_of(HALF_LIFE, REPEATS)
        reals[at.most], reals[at.heat_growth] = MOST, GROWTH
        for ahead in range(1, at.layers + 1):
            reals[at.pace + ahead] = pace(ahead, at.layers)
        for index, pool in enumerate(state.pools):
            ints[at.now + index], ints[at.inserted + index] = pool.now, pool.inserted
            reals[at.unit + index], reals[at.inverse + index] = pool.unit, 1.0 / pool.unit
            keys = torch.tensor([self._number(key) for key in pool.keys], dtype=torch.int64)
            known = list(pool.keys.values())
            reals[at.score + keys] = torch.tensor([k.score for k in known], dtype=torch.float64)
            ints[at.number + keys] = torch.tensor([k.number for k in known], dtype=torch.int64)
            ints[at.used + keys] = torch.tensor([k.used for k in known], dtype=torch.int64)
        reals[at.trust : at.trust + at.layers] = torch.tensor(state.trust, dtype=torch.float64)
        for layer, heat in enumerate(state.heat):
            reals[at.heat_unit + layer] = heat.unit
            for expert, uses in heat.uses.items():
                reals[at.heat + self._number((layer, expert))] = uses
        if counted:
            ints[at.tokens :] = torch.tensor(counted)
        self.ints.copy_(ints)
        self.reals.copy_(reals)

    def download(self) -> CacheState:
        """The state the kernels came to. Waits for them."""
        at, ints, reals = self.places, self.ints.cpu(), self.reals.cpu()
        held = ints[at.key_in : at.key_in + at.slots].tolist()
        order = ints[at.useless : at.useless + at.slots].tolist()
        useless = sorted((place, held[slot]) for slot, place in enumerate(order) if place)
        score = _part(reals, at.score, at.layers, at.experts).tolist()
        number = _part(ints, at.number, at.layers, at.experts).tolist()
        used = _part(ints, at.used, at.layers, at.experts).tolist()
        heat = _part(reals, at.heat, at.layers, at.experts).tolist()
        pools = []
        for pool in range(at.layers if at.shared else 1):
            layers = [pool] if at.shared else range(at.layers)
            keys = {
                (layer, expert): KeyState(score[layer][expert], number[layer][expert], step)
                for layer in layers
                for expert, step in enumerate(used[layer])
                if number[layer][expert]
            }
            now, inserted = int(ints[at.now + pool]), int(ints[at.inserted + pool])
            pools.append(PoolState(now, float(reals[at.unit + pool]), inserted, keys))
        return CacheState(
            tuple(None if key < 0 else self._key(key) for key in held),
            tuple(pools),
            tuple(self._key(key) for _, key in useless),
            tuple(reals[at.trust : at.trust + at.layers].tolist()),
            tuple(
                HeatState(
                    float(reals[at.heat_unit + layer]),
                    {expert: uses for expert, uses in enumerate(heat[layer]) if uses},
                )
                for layer in range(at.layers)
            ),
        )

    def _number(self, key: Key) -> int:
        return key[0] * self.places.experts + key[1]

    def _key(self, number: int) -> Key:
        return divmod(number, self.places.experts)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the parts contradict each other. Waits for the kernels."""
        at, ints = self.places, self.ints.cpu()
        held = ints[at.key_in : at.key_in + at.slots].tolist()
        slot_of = ints[at.slot_of : at.slot_of + at.keys].tolist()
        taken = int(ints[at.taken])
        assert all(key >= 0 for key in held[:taken]), "a slot was given away and is empty"
        assert all(key < 0 for key in held[taken:]), "a free slot holds a key"
        assert sorted(key for key in slot_of if key >= 0) == list(range(taken)), "a slot is lost"
        for slot, key in enumerate(held[:taken]):
            assert slot_of[key] == slot, f"slot {slot} does not hold {self._key(key)}"
        useless = ints[at.useless : at.useless + at.slots].tolist()
        assert sum(place > 0 for place in useless) == int(ints[at.useless_keys])
        assert not any(useless[taken:]), "what is useless is gone"
        assert not ints[at.guessed + taken : at.guessed + at.slots].any(), "a guess is gone"
        counters = _part(ints, at.counters, at.layers, at.counts)
        assert bool((counters[:, 1] + counters[:, 2] == counters[:, 0]).all())


def add_counters(counters: Sequence[int], layers: list[LayerCounts]) -> None:
    """Add what the kernels counted [L * COUNTS] to `layers`."""
    for at, number in enumerate(counters):
        layer, place = divmod(at, len(COUNTS))
        counts, name = layers[layer], COUNTS[place]
        setattr(counts, name, getattr(counts, name) + number)


def _part(flat: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return flat[start : start + rows * columns].view(rows, columns)
