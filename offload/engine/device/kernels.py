"""The decisions of `cache.cache.ExpertCache` for one token as GPU kernels, without the host.

Floating-point expressions are those of `cache`, in double precision and never fused, so both
engines decide alike to the last bit.

One block of threads does everything, so barriers alone keep its parts in order. Every thread loads
a scalar for itself, and one thread stores it. A scalar that all threads go on with is therefore
loaded before a barrier (`_all_have_read`) and stored after it, and a stored one is loaded after
another barrier (`_all_have_written`). Otherwise a slow thread would see the next state and take
another branch than the others. Triton's interpreter has one thread and cannot show such a mistake.

Letters: KB cells of a token, padded to a power of two; P the places of everything; CHUNK slots that
are looked at together.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NOBODY = tl.constexpr(1 << 30)  # a slot number above every real one
USELESS = tl.constexpr(float(1 << 52))  # taken off the worth of a useless key: it leaves first


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
    expert = _experts(index, at, k, num_experts, ints, P)
    wanted = (expert >= 0) & _first_of_equals(expert, at)
    key = layer * P.experts + tl.maximum(expert, 0)
    before = tl.load(ints + P.slot_of + key, mask=expert >= 0, other=-1)
    if tl.load(ints + P.halted) == 0:
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
        unit = _step(layer, ints, reals, P, CHUNK)
        _all_have_written()
        now = tl.load(ints + P.now + layer)

        hit = wanted & (before >= 0)
        tl.store(ints + P.useless + before, 0, mask=hit)
        tl.store(ints + P.in_use + before, step, mask=hit)
        if P.lfru:
            score = tl.load(reals + P.score + key, mask=hit, other=0.0)
            tl.store(reals + P.score + key, score + unit, mask=hit)
        tl.store(ints + P.used + key, now, mask=hit)

        missing = wanted & (before < 0)
        _add(counters, _count(wanted))
        _add(counters + 1, _count(hit))
        _add(counters + 2, _count(missing))
        _all_have_written()
        if _count(missing) > 0:
            slot = _take(layer, step, missing, INF, ints, reals, P, KB, CHUNK)
            put = missing & (slot >= 0)
            _put(key, slot, put, now, ints, P)
            tl.store(ints + P.in_use + slot, step, mask=put)
            if P.lfru:
                score = tl.load(reals + P.score + key, mask=put, other=0.0)
                tl.store(reals + P.score + key, score + unit, mask=put)
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
    expert = _experts(index, at, k, num_experts, ints, P)
    wanted = (expert >= 0) & _first_of_equals(expert, at)
    slot = tl.full([KB], -1, tl.int64)
    if _count(wanted) > 0:
        key = layer * P.experts + tl.maximum(expert, 0)
        before = tl.load(ints + P.slot_of + key, mask=wanted, other=-1)
        absent = wanted & (before < 0)
        guess = ints + P.guess + layer * 3 * P.k
        within = at < P.k
        tl.store(guess + at, tl.where(wanted, expert, -1), mask=within)
        tl.store(guess + P.k + at, absent.to(tl.int64), mask=within)
        tl.store(ints + P.guessing + layer, 1)
        trust = tl.load(reals + P.trust + layer)
        if trust >= 0.5:  # cache.guesses.ENOUGH
            step = tl.load(ints + P.steps)
            _all_have_read()
            tl.store(ints + P.guessed + before, 1, mask=wanted & (before >= 0))
            _all_have_written()
            if _count(absent) > 0:
                limit = tl.where(trust > 0.5, INF, 0.0)  # else only useless keys may leave
                slot = _take(layer, step, absent, limit, ints, reals, P, KB, CHUNK)
                put = absent & (slot >= 0)
                now = tl.load(ints + P.now + layer)
                if P.lfru:
                    now = tl.full([], -1, tl.int64)  # it was not used
                _put(key, slot, put, now, ints, P)
                tl.store(ints + P.guessed + slot, 1, mask=put)
                _add(ints + P.counters + layer * P.counts + 6, _count(put))
        tl.store(guess + 2 * P.k + at, (slot >= 0).to(tl.int64), mask=within)
    tl.store(experts + at, expert, mask=at < k)
    tl.store(loads + at, slot, mask=at < k)


@triton.jit
def _experts(index, at, k, num_experts, ints, P: tl.constexpr):
    """The experts [KB] a token is routed to; -1 for a sentinel or padding, and all -1 if halted."""
    expert = tl.load(index + at, mask=at < k, other=-1).to(tl.int64)
    asked = (expert >= 0) & (expert < num_experts) & (tl.load(ints + P.halted) == 0)
    return tl.where(asked, expert, -1)


@triton.jit
def _first_of_equals(expert, at):
    earlier = (expert[:, None] == expert[None, :]) & (at[None, :] < at[:, None])
    return tl.sum(earlier.to(tl.int32), 1) == 0


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _rank(mask):
    """For each place, how many places before it are set in `mask`."""
    ones = mask.to(tl.int32)
    return tl.cumsum(ones, 0) - ones


@triton.jit
def _add(counter, number):
    """Add without a barrier, since only the thread that stores needs the value it loads."""
    tl.store(counter, tl.load(counter) + number)


@triton.jit
def _all_have_read():
    tl.debug_barrier()


@triton.jit
def _all_have_written():
    tl.debug_barrier()


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
    """`ExpertCache._judge`: compare the guess made for this step with what the step asks for."""
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
        trust += 0.0625 * (1.0 - trust)  # cache.guesses.RATE
    for _ in range(_count(absent & ~right)):
        trust += 0.0625 * (0.0 - trust)
    tl.store(reals + P.trust + layer, trust)
    tl.store(ints + P.guessed + slot, 0, mask=slot >= 0)
    wasted = loaded & ~right
    tl.store(ints + P.useless + slot, ordered + 1 + _rank(wasted), mask=wasted)
    tl.store(ints + P.ordered, ordered + _count(wasted))
    tl.store(ints + P.guessing + layer, 0)


@triton.jit
def _step(layer, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """Advance the layer's clock; returns what a use counts now."""
    unit = tl.load(reals + P.unit + layer)
    _all_have_read()
    _add(ints + P.now + layer, 1)
    if P.lfru:
        unit = unit * tl.load(reals + P.growth)
        if unit > tl.load(reals + P.most):
            _divide(reals + P.score + layer * P.experts, P.experts, unit, CHUNK)
            unit = unit * 0.0 + 1.0
        tl.store(reals + P.unit + layer, unit)
        tl.store(reals + P.inverse + layer, 1.0 / unit)
    return unit


@triton.jit
def _put(key, slot, put, now, ints, P: tl.constexpr):
    """The keys of `put` become resident in their slots."""
    tl.store(ints + P.slot_of + key, slot, mask=put)
    tl.store(ints + P.key_in + slot, key, mask=put)
    tl.store(ints + P.used + key, now, mask=put)


@triton.jit
def _take(
    layer, step, missing, limit, ints, reals,
    P: tl.constexpr, KB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`ExpertCache._take_slots`: a free slot or that of a victim worth less than `limit`.

    Returns the slots [KB], one for each `missing`, -1 where there is none.
    """
    rank = _rank(missing)
    wanted = _count(missing)
    taken = tl.load(ints + P.taken)
    free = tl.minimum(wanted, (P.slots - taken).to(tl.int32))
    _all_have_read()
    tl.store(ints + P.taken, taken + free)
    slot = tl.where(missing & (rank < free), taken + rank, -1)
    if free < wanted:
        _weigh(layer, step, ints, reals, P, CHUNK)
        evictions = 0
        for place in range(free, wanted):
            victim = _least_worth(limit, reals, P, CHUNK)
            if victim >= 0:
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
    return slot


@triton.jit
def _weigh(layer, step, ints, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """Store what each slot is worth when `layer` needs one, as `cache.eviction.LayerPools` does.

    A useless key is worth less than 0, and the less the longer it is useless. The worth of a key
    that stays is infinite.
    """
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = tl.load(ints + P.key_in + at, mask=at < P.slots, other=-1)
        held = key >= 0
        giver = tl.where(held, key // P.experts, 0)
        now = tl.load(ints + P.now + giver)
        used = tl.load(ints + P.used + key, mask=held, other=-1)
        if P.lfru:
            score = tl.load(reals + P.score + key, mask=held, other=0.0)
            worth = _to_26_bits(score) * tl.load(reals + P.inverse + giver)
            worth = tl.where(used == now, worth + tl.load(reals + P.bonus), worth)
        else:
            worth = 1.0 / (1 + now - used).to(tl.float64)
        ahead = tl.where(giver > layer, giver - layer, giver - layer + P.layers)
        worth = worth * tl.load(reals + P.pace + ahead)
        order = tl.load(ints + P.useless + at, mask=at < P.slots, other=0)
        worth = tl.where(order > 0, order.to(tl.float64) - USELESS, worth)
        in_use = tl.load(ints + P.in_use + at, mask=at < P.slots, other=0) == step
        guessed = tl.load(ints + P.guessed + at, mask=at < P.slots, other=0) != 0
        leaves = held & ~in_use & ~guessed
        tl.store(reals + P.worth + at, tl.where(leaves, worth, INF), mask=at < P.slots)
    _all_have_written()


@triton.jit
def _to_26_bits(score):
    """`cache.policies.to_26_bits`."""
    large = score * 134217729.0  # cache.policies.SPLIT
    return large - (large - score)


@triton.jit
def _least_worth(limit, reals, P: tl.constexpr, CHUNK: tl.constexpr):
    """The slot worth least, the lowest among equals; -1 if none is worth less than `limit`."""
    lowest = tl.full([CHUNK], INF, tl.float64)
    slot = tl.full([CHUNK], NOBODY, tl.int32)
    for start in range(0, P.slots, CHUNK):
        at = start + tl.arange(0, CHUNK)
        worth = tl.load(reals + P.worth + at, mask=at < P.slots, other=INF)
        slot = tl.where(worth < lowest, at, slot)
        lowest = tl.minimum(lowest, worth)
    least = tl.min(lowest, 0)
    first = tl.min(tl.where(lowest == least, slot, NOBODY), 0)
    return tl.where(least < limit, first, -1)
