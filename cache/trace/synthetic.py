"""Traces without a model: routing whose locality can be set, the same for the same seed.

A token keeps each expert that the token before chose at a layer with probability `stickiness`. The
other experts are drawn by the layer's own popularity, in which ranks weigh 1 / rank^skew. With
stickiness 0 and skew 0 routing is uniform, the worst case for any cache.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from offload.cache.trace.trace import CacheError, Event, Guess, Trace, TraceHeader

GROUP_4BIT = 4.5  # bits a weight: 4, and a 16-bit scale and offset for 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide how many bytes move."""

    name: str
    layers: int
    experts: int
    top_k: int
    record_bytes: int
    dense_bytes: int  # weights that every token reads: attention, shared experts, head
    expert_bits: float  # as stored, scales included


def _shape(
    name: str, layers: int, experts: int, top_k: int, weights: int, dense: int, bits: float
) -> Shape:
    return Shape(name, layers, experts, top_k, int(weights * bits / 8), dense, bits)


# The weights of one expert are 3 matrices, hidden x inner, with sizes of the checkpoint's
# config.json. Dense bytes are the checkpoint's parameters at 16 bits, without its experts and
# without the embedding, of which a token reads one row.
MIXTRAL = _shape("Mixtral-8x7B", 32, 8, 2, 3 * 4096 * 14336, 2 * 1_474_000_000, GROUP_4BIT)
QWEN3_30B = _shape("Qwen3-30B-A3B", 48, 128, 8, 3 * 2048 * 768, 2 * 1_230_000_000, GROUP_4BIT)
# MXFP4 has 4 bits a weight and an 8-bit scale for 32 weights.
GPT_OSS_120B = _shape("gpt-oss-120b", 36, 128, 4, 3 * 2880 * 2880, 2 * 1_540_000_000, 4.25)
SHAPES = {"mixtral": MIXTRAL, "qwen3-30b": QWEN3_30B, "gpt-oss-120b": GPT_OSS_120B}


@dataclass(frozen=True)
class Routing:
    """How a synthetic router behaves."""

    stickiness: float = 0.3
    skew: float = 0.5
    recall: float | None = None  # share of choices guessed one layer ahead; None: no guesses
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("stickiness", self.stickiness), ("recall", self.recall or 0.0)):
            if not 0.0 <= value <= 1.0:
                raise CacheError(f"{name} {value} is not a probability: give 0 to 1")


def synthesize(shape: Shape, routing: Routing, tokens: int, prompt_tokens: int = 0) -> Trace:
    """A prompt of `prompt_tokens` in one call a layer, then `tokens` decoded one by one."""
    source = random.Random(routing.seed)
    draws = [_Layer(shape, routing, source) for _ in range(shape.layers)]
    events = []
    if prompt_tokens:
        for index, layer in enumerate(draws):
            rows = tuple(layer.next_token() for _ in range(prompt_tokens))
            events.append(Event(index, True, rows))
    for _ in range(tokens):
        rows = tuple(layer.next_token() for layer in draws)
        for index, row in enumerate(rows):
            guesses: tuple[Guess, ...] = ()
            if routing.recall is not None and index + 1 < shape.layers:
                guessed = _guess(source, rows[index + 1], shape.experts, routing.recall)
                guesses = (Guess(index + 1, guessed),)
            events.append(Event(index, False, (row,), guesses=guesses))
    header = TraceHeader(
        model=f"{shape.name} (synthetic)",
        experts=(shape.experts,) * shape.layers,
        top_k=shape.top_k,
        record_bytes=(shape.record_bytes,) * shape.layers,
        settings={"dense_bytes": shape.dense_bytes, "expert_bits": shape.expert_bits},
    )
    return Trace(header, events)


class _Layer:
    """One layer's router."""

    def __init__(self, shape: Shape, routing: Routing, source: random.Random) -> None:
        self._shape, self._routing, self._source = shape, routing, source
        self._by_rank = list(range(shape.experts))
        source.shuffle(self._by_rank)
        weights = [(rank + 1) ** -routing.skew for rank in range(shape.experts)]
        self._cumulative = list(accumulate(weights))
        self._last: tuple[int, ...] = ()

    def next_token(self) -> tuple[int, ...]:
        draw, stickiness = self._source, self._routing.stickiness
        chosen = [expert for expert in self._last if draw.random() < stickiness]
        while len(chosen) < self._shape.top_k:
            expert = draw.choices(self._by_rank, cum_weights=self._cumulative)[0]
            if expert not in chosen:
                chosen.append(expert)
        self._last = tuple(chosen)
        return self._last


def _guess(
    source: random.Random, right: tuple[int, ...], experts: int, recall: float
) -> tuple[int, ...]:
    """As many experts as `right` has; each of `right` is among them with probability `recall`."""
    guessed = [expert for expert in right if source.random() < recall]
    wrong = [expert for expert in range(experts) if expert not in right]
    source.shuffle(wrong)
    return (*guessed, *wrong[: len(right) - len(guessed)])
