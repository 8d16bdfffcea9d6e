"""Plans as GPU kernels: the decisions of `cache.cache.ExpertCache` for one token, without the host.

Knows: the state of `offload.device.places`, and that one block of threads does everything, so that
barriers are all that orders it. Does not know: bytes, streams. Floating-point expressions are those
of `cache`, in double precision and never fused, so that both engines decide alike to the last bit.

Every thread loads a scalar for itself, and one of them stores it. So what all threads go on with is
loaded before a barrier (`_all_have_read`) and stored after it, and what was stored is loaded after
another: without, a slow thread would see the next state, and take another branch than the others.
The interpreter, which has one thread, cannot tell.

Letters: KB cells of a token, padded; P the places of everything; CHUNK slots looked at together.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NOBODY = tl.constexpr(1 << 30)


# One compilation for all layers, whatever a layer's number and where its rows of cells begin.
@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["index", "hits", "loads"])
def decide_kernel(
    index, layer, num_experts, k, ints, reals, hits, loads,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`ExpertCache.decide` for one token, whose experts are index [k].

    Writes for each cell [k] the slot it is computed from: into `hits` what is resident, into
    `loads` what has to be copied there first; -1 elsewhere.
    """
    at = tl.arange(0, KB)
    expert = _experts(index, at, k, num_experts)
    if tl.load(ints + P.halted) != 0:
        expert = tl.full([KB], -1, tl.int64)
    wanted = (expert >= 0) & _first_of_equals(expert, at)
    key = layer * P.experts + tl.maximum(expert, 0)
    before = tl.load(ints + P.slot_of + key, mask=expert >= 0, other=-1)
    if tl.load(ints + P.halted) == 0:
        _decide(layer, expert, wanted, key, before, ints, reals, P, KB, CHUNK)
    _all_have_written()
    after = tl.load(ints + P.slot_of + key, mask=expert >= 0, other=-1)
    tl.store(hits + at, before, mask=at < k)
    tl.store(loads + at, tl.where(before < 0, after, -1), mask=at < k)


@triton.jit(
    do_not_specialize=["layer"], do_not_specialize_on_alignment=["index", "experts", "loads"]
)
def look_ahead_kernel(
    index, layer, num_experts, k, ints, reals, experts, loads,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`ExpertCache.look_ahead` for a later layer, whose router would choose index [k].

    Writes the guessed `experts` [k] and the slots they are to be copied to, -1 for none.
    """
    at = tl.arange(0, KB)
    expert = _experts(index, at, k, num_experts)
    if tl.load(ints + P.halted) != 0:
        expert = tl.full([KB], -1, tl.int64)
    wanted = (expert >= 0) & _first_of_equals(expert, at)
    slot = tl.full([KB], -1, tl.int64)
    if tl.sum(wanted.to(tl.int32), 0) > 0:
        slot = _look_ahead(layer, expert, wanted, ints, reals, P, KB, CHUNK)
    tl.store(experts + at, expert, mask=at < k)
    tl.store(loads + at, slot, mask=at < k)


@triton.jit
def _experts(index, at, k, num_experts):
    """The experts [KB] a token is routed to, -1 for what is none: a sentinel, or padding."""
    expert = tl.load(index + at, mask=at < k, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1)


@triton.jit
def _first_of_equals(expert, at):
    earlier = (expert[:, None] == expert[None, :]) & (at[None, :] < at[:, None])
    return tl.sum(earlier.to(tl.int32), 1) == 0


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _rank(mask):
    """How many of `mask` come before each."""
    ones = mask.to(tl.int32)
    return tl.cumsum(ones, 0) - ones


@triton.jit
def _add(counter, number):
    """Only who stores it needs what it loads: no barrier."""
    tl.store(counter, tl.load(counter) + number)


@triton.jit
def _all_have_read():
    tl.debug_barrier()


@triton.jit
def _all_have_written():
    tl.debug_barrier()


@triton.jit
def _decide(
    layer, expert, wanted, key, slot, ints, reals,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    counters = ints + P.counters + layer * P.counts
    step = tl.load(ints + P.steps) + 1
    guessing = tl.load(ints + P.guessing + layer)
    _all_have_read()
    tl.store(ints + P.steps, step)
    if layer == 0:
        _add(ints + P.tokens, 1)
    _heat(layer, key, wanted, reals, P, CHUNK)
    if guessing != 0:
        _judge(layer, expert, wanted, ints, reals, P, KB)
    pool = layer if P.shared else 0
    unit = _step(layer, pool, ints, reals, P, CHUNK)
    _all_have_written()
    now = tl.load(ints + P.now + pool)
    inserted = tl.load(ints + P.inserted + pool)

    hit = wanted & (slot >= 0)
    useless = tl.load(ints + P.useless + slot, mask=hit, other=0)
    useless_keys = tl.load(ints + P.useless_keys) - _count(useless > 0)
    _all_have_read()
    tl.store(ints + P.useless + slot, tl.zeros_like(useless), mask=hit)
    tl.store(ints + P.in_use + slot, tl.full([KB], 0, tl.int64) + step, mask=hit)
    if P.lfru:
        score = tl.load(reals + P.score + key, mask=hit, other=0.0)
        tl.store(reals + P.score + key, score + unit, mask=hit)
    if not P.fifo:
        tl.store(ints + P.used + key, tl.full([KB], 0, tl.int64) + now, mask=hit)
        if not P.lfru:
            tl.store(ints + P.number + key, inserted + 1 + _rank(hit), mask=hit)
            inserted += _count(hit)

    missing = wanted & (slot < 0)
    _add(counters, _count(wanted))
    _add(counters + 1, _count(hit))
    _add(counters + 2, _count(missing))
    _all_have_written()
    if _count(missing) > 0:
        slot, useless_keys = _take(
            layer, step, missing, True, useless_keys, ints, reals, P, KB, CHUNK
        )
        put = missing & (slot >= 0)
        _put(key, slot, put, now, inserted, ints, P)
        tl.store(ints + P.in_use + slot, tl.full([KB], 0, tl.int64) + step, mask=put)
        inserted += _count(put)
        if P.lfru:
            score = tl.load(reals + P.score + key, mask=put, other=0.0)
            tl.store(reals + P.score + key, score + unit, mask=put)
    tl.store(ints + P.inserted + pool, inserted)
    tl.store(ints + P.useless_keys, useless_keys)


@triton.jit
def _look_ahead(
    layer, expert, wanted, ints, reals,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, KB)
    key = layer * P.experts + tl.maximum(expert, 0)
    before = tl.load(ints + P.slot_of + key, mask=wanted, other=-1)
    absent = wanted & (before < 0)
    guess = ints + P.guess + layer * 3 * P.k
    within = at < P.k
    tl.store(guess + at, tl.where(wanted, expert, -1), mask=within)
    tl.store(guess + P.k + at, absent.to(tl.int64), mask=within)
    tl.store(ints + P.guessing + layer, 1)
    slot = tl.full([KB], -1, tl.int64)
    trust = tl.load(reals + P.trust + layer)
    if trust >= 0.5:  # cache.trust.ENOUGH
        step = tl.load(ints + P.steps)
        useless_keys = tl.load(ints + P.useless_keys)
        ones = tl.full([KB], 1, tl.int64)
        _all_have_read()
        tl.store(ints + P.guessed + before, ones, mask=wanted & (before >= 0))
        _all_have_written()
        if _count(absent) > 0:
            slot, useless_keys = _take(
                layer, step, absent, trust > 0.5, useless_keys, ints, reals, P, KB, CHUNK
            )
            put = absent & (slot >= 0)
            pool = layer if P.shared else 0
            inserted = tl.load(ints + P.inserted + pool)
            now = tl.load(ints + P.now + pool)
            if P.lfru:
                now = tl.full([], -1, tl.int64)  # it was not used
            _all_have_read()
            _put(key, slot, put, now, inserted, ints, P)
            tl.store(ints + P.guessed + slot, ones, mask=put)
            tl.store(ints + P.inserted + pool, inserted + _count(put))
            _add(ints + P.counters + layer * P.counts + 6, _count(put))
            tl.store(ints + P.useless_keys, useless_keys)
    tl.store(guess + 2 * P.k + at, (slot >= 0).to(tl.int64), mask=within)
    return slot


@triton.jit
def _heat(layer, key, wanted, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """`cache.heat.Heat.use`."""
    unit = tl.load(reals + P.heat_unit + layer)
    uses = tl.load(reals + P.heat + key, mask=wanted, other=0.0)
    _all_have_read()
    tl.store(reals + P.heat + key, uses + unit, mask=wanted)
    unit = unit * tl.load(reals + P.heat_growth)
    if unit > tl.load(reals + P.most):
        _all_have_written()
        _divide(reals + P.heat + layer * P.experts, P.experts, unit, CHUNK)
        unit = unit * 0.0 + 1.0
    tl.store(reals + P.heat_unit + layer, unit)


@triton.jit
def _divide(values, number: tl.constexpr, unit, CHUNK: tl.constexpr):
    for start in range(0, number, CHUNK):
        at = start + tl.arange(0, CHUNK)
        value = tl.load(values + at, mask=at < number, other=0.0)
        tl.store(values + at, value / unit, mask=at < number)


@triton.jit
def _judge(layer, expert, wanted, ints, reals, P: tl.constexpr, KB: tl.constexpr):
    """`ExpertCache._judge`: what was guessed for this step beside what it asks for."""
    at = tl.arange(0, KB)
    guess = ints + P.guess + layer * 3 * P.k
    said = tl.load(guess + at, mask=at < P.k, other=-1)
    real = said >= 0
    absent = real & (tl.load(guess + P.k + at, mask=at < P.k, other=0) != 0)
    loaded = real & (tl.load(guess + 2 * P.k + at, mask=at < P.k, other=0) != 0)
    came_true = (said[:, None] == expert[None, :]) & wanted[None, :]
    right = real & (tl.sum(came_true.to(tl.int32), 1) > 0)
    slot = tl.load(ints + P.slot_of + layer * P.experts + said, mask=real, other=-1)
    trust = tl.load(reals + P.trust + layer)
    ordered = tl.load(ints + P.ordered)
    _all_have_read()
    counters = ints + P.counters + layer * P.counts
    _add(counters + 4, _count(real))
    _add(counters + 5, _count(right))
    _add(counters + 7, _count(loaded & right))
    _add(counters + 8, _count(wanted))
    for _ in range(_count(absent & right)):
        trust += 0.0625 * (1.0 - trust)  # cache.trust.RATE
    for _ in range(_count(absent & ~right)):
        trust += 0.0625 * (0.0 - trust)
    tl.store(reals + P.trust + layer, trust)
    tl.store(ints + P.guessed + slot, tl.zeros_like(slot), mask=slot >= 0)
    wasted = loaded & ~right
    tl.store(ints + P.useless + slot, ordered + 1 + _rank(wasted), mask=wasted)
    tl.store(ints + P.ordered, ordered + _count(wasted))
    _add(ints + P.useless_keys, _count(wasted))
    tl.store(ints + P.guessing + layer, 0)


@triton.jit
def _step(layer, pool, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """The pool's clock goes on; returns what a use counts now."""
    unit = tl.load(reals + P.unit + pool)
    _all_have_read()
    if P.shared or layer == 0:
        _add(ints + P.now + pool, 1)
        if P.lfru:
            unit = unit * tl.load(reals + P.growth)
            if unit > tl.load(reals + P.most):
                if P.shared:
                    _divide(reals + P.score + layer * P.experts, P.experts, unit, CHUNK)
                else:
                    _divide(reals + P.score, P.keys, unit, CHUNK)
                unit = unit * 0.0 + 1.0
            tl.store(reals + P.unit + pool, unit)
            tl.store(reals + P.inverse + pool, 1.0 / unit)
    return unit


@triton.jit
def _put(key, slot, put, now, inserted, ints, P: tl.constexpr):
    """`keys` become resident in as many slots."""
    tl.store(ints + P.slot_of + key, slot, mask=put)
    tl.store(ints + P.key_in + slot, key, mask=put)
    tl.store(ints + P.used + key, tl.zeros_like(slot) + now, mask=put)
    tl.store(ints + P.number + key, inserted + 1 + _rank(put), mask=put)


@triton.jit
def _take(
    layer, step, missing, may_evict, useless_keys, ints, reals,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`ExpertCache._take_slots`: free ones, useless ones, victims', one for each `missing`.

    Returns the slots [KB], -1 where there is none, and how many useless keys are left.
    """
    rank = _rank(missing)
    wanted = _count(missing)
    taken = tl.load(ints + P.taken)
    free = tl.minimum(wanted, (P.slots - taken).to(tl.int32))
    _all_have_read()
    tl.store(ints + P.taken, taken + free)
    slot = tl.where(missing & (rank < free), taken + rank, -1)
    if (free < wanted) & ((useless_keys > 0) | may_evict):
        _weigh(layer, step, ints, reals, P, CHUNK)
        evictions = 0
        for place in range(free, wanted):
            victim = tl.full([], -1, tl.int32)
            if useless_keys > 0:
                victim = _first_useless(step, ints, P, CHUNK)
            if (victim < 0) & may_evict:
                victim = _least_worth(layer, ints, reals, P, CHUNK)
            if victim >= 0:
                useless_keys -= (tl.load(ints + P.useless + victim) > 0).to(tl.int64)
                key = tl.load(ints + P.key_in + victim)
                _all_have_read()
                tl.store(ints + P.slot_of + key, -1)
                tl.store(ints + P.key_in + victim, -1)
                tl.store(ints + P.useless + victim, 0)
                tl.store(reals + P.worth + victim, INF)
                slot = tl.where(missing & (rank == place), victim.to(tl.int64), slot)
                evictions += 1
                _all_have_written()
        _add(ints + P.counters + layer * P.counts + 3, evictions)
    return slot, useless_keys


@triton.jit
def _first_useless(step, ints, P: tl.constexpr, CHUNK: tl.constexpr):
    """The slot of the useless key that is to leave first, or -1."""
    least = tl.full([CHUNK], 1 << 62, tl.int64)
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        order = tl.load(ints + P.useless + at, mask=at < P.slots, other=0)
        stays = _stays(at, step, ints, P)
        least = tl.minimum(least, tl.where((order > 0) & ~stays, order, 1 << 62))
    first = tl.min(least, 0)
    slot = tl.full([CHUNK], NOBODY, tl.int32)
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        order = tl.load(ints + P.useless + at, mask=at < P.slots, other=0)
        slot = tl.minimum(slot, tl.where(order == first, at, NOBODY))
    found = tl.min(slot, 0)
    return tl.where(found < NOBODY, found, -1)


@triton.jit
def _stays(at, step, ints, P: tl.constexpr):
    """Which slots are in use or guessed."""
    in_use = tl.load(ints + P.in_use + at, mask=at < P.slots, other=0) == step
    return in_use | (tl.load(ints + P.guessed + at, mask=at < P.slots, other=0) != 0)


@triton.jit
def _weigh(layer, step, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """What each slot is worth to whoever asks for one for `layer`; infinite: it stays."""
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key, pool, worth, _ = _own_worth(at, ints, reals, P)
        if P.shared:
            ahead = tl.where(pool > layer, pool - layer, pool - layer + P.layers)
            worth = worth * tl.load(reals + P.pace + ahead)
        leaves = (key >= 0) & ~_stays(at, step, ints, P)
        tl.store(reals + P.worth + at, tl.where(leaves, worth, INF), mask=at < P.slots)
    _all_have_written()


@triton.jit
def _own_worth(at, ints, reals, P: tl.constexpr):
    """The keys of slots, their pools, what they are worth there, and whether by a bonus."""
    key = tl.load(ints + P.key_in + at, mask=at < P.slots, other=-1)
    held = key >= 0
    pool = tl.where(held, key // P.experts, 0)
    if not P.shared:
        pool = pool * 0
    now = tl.load(ints + P.now + pool)
    used = tl.load(ints + P.used + key, mask=held, other=-1)
    if P.lfru:
        recent = used == now
        worth = tl.load(reals + P.score + key, mask=held, other=0.0)
        worth = worth * tl.load(reals + P.inverse + pool)
        worth = tl.where(recent, worth + tl.load(reals + P.bonus), worth)
    else:
        recent = used != used
        worth = 1.0 / (1 + now - used).to(tl.float64)
    return key, pool, worth, recent


@triton.jit
def _least_worth(layer, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """The slot to evict, or -1. Of equals the lowest layer's, then as its policy orders them."""
    lowest = tl.full([CHUNK], INF, tl.float64)
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        worth = tl.load(reals + P.worth + at, mask=at < P.slots, other=INF)
        lowest = tl.minimum(lowest, worth)
    least = tl.min(lowest, 0)
    number = tl.full([CHUNK], 0, tl.int32)
    slot = tl.full([CHUNK], NOBODY, tl.int32)
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        worth = tl.load(reals + P.worth + at, mask=at < P.slots, other=INF)
        equal = (worth == least) & (worth < INF)
        number += equal.to(tl.int32)
        slot = tl.minimum(slot, tl.where(equal, at, NOBODY))
    equals = tl.sum(number, 0)
    found = tl.min(slot, 0)
    if equals > 1:
        found = _first_in_order(least, ints, reals, P, CHUNK)
    return tl.where(equals > 0, found, -1)


@triton.jit
def _first_in_order(least, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """Of the slots worth `least` the one that leaves first: compared by pool, own worth, bonus,
    score and number, as `cache.allocation.Shared` and the policies do."""
    bound0 = tl.full([], 0.0, tl.float64)
    bound1, bound2, bound3, bound4 = bound0, bound0, bound0, bound0
    found = tl.full([], -1, tl.int32)
    for level in tl.static_range(6):
        lowest = tl.full([CHUNK], INF, tl.float64)
        for start in range(0, P.slots, CHUNK):
            at = start + tl.arange(0, CHUNK)
            stored = tl.load(reals + P.worth + at, mask=at < P.slots, other=INF)
            key, pool, worth, recent = _own_worth(at, ints, reals, P)
            value0 = pool.to(tl.float64)
            value1 = tl.where(key >= 0, worth, 0.0)
            value2 = recent.to(tl.float64)
            value3 = value2 * 0.0
            if P.lfru:
                value3 = tl.load(reals + P.score + key, mask=key >= 0, other=0.0)
            number = tl.load(ints + P.number + key, mask=key >= 0, other=0)
            value4 = number.to(tl.float64)  # exact below 2**53
            among = stored == least
            if level > 0:
                among &= value0 == bound0
            if level > 1:
                among &= value1 == bound1
            if level > 2:
                among &= value2 == bound2
            if level > 3:
                among &= value3 == bound3
            if level > 4:
                among &= value4 == bound4
            value = value0
            if level == 1:
                value = value1
            if level == 2:
                value = value2
            if level == 3:
                value = value3
            if level == 4:
                value = value4
            if level == 5:
                value = at.to(tl.float64)
            lowest = tl.minimum(lowest, tl.where(among, value, INF))
        bound = tl.min(lowest, 0)
        if level == 0:
            bound0 = bound
        if level == 1:
            bound1 = bound
        if level == 2:
            bound2 = bound
        if level == 3:
            bound3 = bound
        if level == 4:
            bound4 = bound
        if level == 5:
            found = bound.to(tl.int32)
    return found
