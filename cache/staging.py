"""Rows beside the slots for streamed and early experts, and the steps that carry out a decision."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from offload.cache.decision import Decision, Use, Wave
from offload.cache.sharded import Cache, ShardedCache


class Kept(NamedTuple):
    """An expert that came to a row early and for which the decision then has a slot.

    The expert is computed from its row and copied to its slot afterwards.
    """

    expert: int
    row: int
    slot: int


class Step(NamedTuple):
    """Copies to begin, then experts to compute, whose copies began in this step or before."""

    begin: tuple[Use, ...]
    hits: tuple[Use, ...]
    loads: tuple[Use, ...]
    kept: tuple[Kept, ...] = ()
    beside: bool = False  # the loads are in staging rows, not in slots


class Staging:
    """Staging rows in two halves that take turns: one is filled while the other is computed from.

    The rows are numbered like slots: the first is `first`, and neighbours are `apart` apart. There
    are none or at least two of them.
    """

    def __init__(self, first: int, rows: int, apart: int = 1) -> None:
        if rows < 0 or rows == 1:
            raise ValueError(f"staging takes two rows or more, or none, not {rows}")
        self.rows = rows
        self._first, self._apart = first, apart
        self._half = rows // 2
        self._second = False  # whether the second half is the next to be filled
        self._early: list[tuple[Use, ...]] = []  # copies begun early: one entry per half filled
        self._early_layer: int | None = None

    def early(self, layer: int, experts: Sequence[int], halves: int = 2) -> list[Use]:
        """Choose rows for the first of `experts` before `layer` is decided, and return the copies.

        At most `halves` of the two halves are filled, fewer where some are filled already. Call
        this once the step before has begun its last load: while that step computes from one half,
        the other half is free.
        """
        if layer != self._early_layer:
            self._early, self._early_layer = [], layer
        begun = {use.expert for batch in self._early for use in batch}
        wanted = [expert for expert in experts if expert not in begun]
        halves = min(halves, 2 - len(self._early))
        batches = self._batches(wanted[: halves * self._half])
        self._early += batches
        return [use for batch in batches for use in batch]

    def start_over(self) -> None:
        """Forget what is in the rows."""
        self._early.clear()

    def steps(self, decision: Decision) -> list[Step]:
        """The steps that carry out `decision`, in order.

        Experts that came early are computed first, so that their rows can be filled again. A
        streamed expert is begun as soon as its half is free, also while a wave takes over the slots
        of the wave before.
        """
        early = self._begun(decision)
        if not decision.streamed and not early:
            return [Step(wave.loads, wave.hits, wave.loads) for wave in decision.waves]
        there = {use.expert for batch in early for use in batch}
        slots = {use.expert: use.slot for wave in decision.waves for use in wave.loads}
        waves = [step for wave in decision.waves if (step := _without(there, wave)) is not None]
        late = self._batches([expert for expert in decision.streamed if expert not in there])
        steps = [_beside(batch, slots) for batch in early]
        first, gap = len(steps), len(waves)
        if waves and first:  # their slots are free at once
            steps[0], waves[0] = _with(steps[0], waves[0].begin), waves[0]._replace(begin=())
        steps += [*waves, *(_beside(batch, {}) for batch in late)]
        for number, batch in enumerate(late, first):
            before = number - 2  # the batch that was in this half before
            at = 0 if before < 0 else before + 1 + gap * (before >= first)
            steps[at] = _with(steps[at], batch)
        return steps

    def _begun(self, decision: Decision) -> list[tuple[Use, ...]]:
        """The early copies that `decision` needs, one half in each entry.

        The next half to be filled is then the other one than that of the last entry.
        """
        early, self._early = self._early, []
        if decision.layer != self._early_layer or len(decision.waves) > 1:
            return []  # later waves would overwrite the slots that early experts are kept in
        asked = {*decision.streamed, *(use.expert for wave in decision.waves for use in wave.loads)}
        needed = [tuple([use for use in batch if use.expert in asked]) for batch in early]
        needed = [batch for batch in needed if batch]
        if needed:
            self._second = needed[-1][0].slot < self._first + self._apart * self._half
        return needed

    def _batches(self, experts: Sequence[int]) -> list[tuple[Use, ...]]:
        """`experts` in batches of at most one half of the rows, the halves in turn."""
        assert self._half or not experts, "streamed without staging"
        cut = []
        for at in range(0, len(experts), self._half or 1):
            row = self._first + self._apart * self._half * self._second
            some = experts[at : at + self._half]
            cut.append(tuple([Use(expert, row + self._apart * i) for i, expert in enumerate(some)]))
            self._second = not self._second
        return cut


def _beside(batch: tuple[Use, ...], slots: Mapping[int, int]) -> Step:
    """A step that computes `batch` from rows; `slots` has the slots that experts are kept in."""
    kept = (Kept(*use, slots[use.expert]) for use in batch if use.expert in slots)
    return Step((), (), batch, tuple(kept), beside=True)


def _with(step: Step, begin: tuple[Use, ...]) -> Step:
    """`step` with `begin` among the copies that it begins."""
    return step._replace(begin=step.begin + begin)


def _without(experts: set[int], wave: Wave) -> Step | None:
    """The step of `wave` without the loads of `experts`; None where nothing is left of it."""
    loads = tuple([use for use in wave.loads if use.expert not in experts])
    return Step(loads, wave.hits, loads) if wave.hits or loads else None


def staging_of(cache: Cache, rows: int) -> list[Staging]:
    """For each layer of the model the `rows` rows behind the slots of its card."""
    caches = cache.caches if isinstance(cache, ShardedCache) else (cache,)
    of_layers = []
    for card, part in enumerate(caches):
        staging = Staging(part.table.slots * len(caches) + card, rows, len(caches))
        of_layers += [staging] * len(part.heat.layers)
    return of_layers


def nearly_all(chosen: int, experts: int) -> bool:
    """Whether so many of a layer's `experts` were `chosen` that the next layer's begin early.

    Between two layers' experts lie attention, a router and a wait for its answer; the PCIe port
    rests meanwhile unless copies were begun early. Were routers even, T tokens would leave
    (1 - k/E)^T of the experts unchosen: with Mixtral's 2 of 8 one in a hundred after 16 tokens.
    Routers are not even, so the choices are counted: the layer at work has just shown how many of
    its experts this very prompt chooses.

    An early copy that is needed saves at most its own time; one that is not needed costs as much.
    This was simulated for an RTX 4090 whose port does 26.8 GB/s, with a quarter of the experts
    resident, 1 ms between layers and the second of two prompts of 4 to 512 tokens (popularity
    1 / rank^0.5 and 1 / rank^1.2). If copies begin early once seven of eight experts were chosen,
    prompts take up to 4% less time and at worst 0.7% more. With half of the experts as the limit
    they take 11% more at worst; with all of them Qwen3-30B's uneven routers gain nothing up to 256
    tokens.
    """
    return chosen * 8 >= experts * 7


def absent(cache: Cache, layer: int, experts: int) -> list[int]:
    """Those of a layer's `experts` (a number) that have no slot, the hottest first."""
    without = [expert for expert in range(experts) if not cache.is_resident(layer, expert)]
    return sorted(without, key=lambda expert: -cache.heat.of(layer, expert))
