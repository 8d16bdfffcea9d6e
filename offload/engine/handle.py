"""The object that a loaded model carries as `model.offload`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from offload.cache.sharded import ShardedCache
from offload.cache.statistics import LayerCounts
from offload.cache.trace.trace import CardSlots, TraceHeader, cards_text
from offload.engine.engine import Engine
from offload.engine.history import RoutingTrace, write_hot
from offload.engine.hooks import OneTokenLinear
from offload.engine.stats import CardStats, Stats
from offload.fit import Fit
from offload.quant.pack import Pack
from offload.transfer.cards import CardsTransfer
from offload.version import __version__


class TokenSource(Protocol):
    """Gives the tokens of one sequence."""

    def __call__(self) -> int:
        """The next one. Raises `GenerationError` when the model's logits cannot be believed, or
        memory ran out and there is nothing to give back."""

    def cache(self) -> Any:
        """The KV cache of the prompt and of all given tokens but the last; None if it is lost."""


@dataclass(eq=False)
class Offload:
    """A model's experts: `model.offload`."""

    pack: Pack
    engine: Engine
    fit: Fit
    one_token: OneTokenLinear | None
    top_k: int  # experts of a token
    # The `Loops` of `offload.generation.decode`, which queue a step before the token of the one
    # before it is read. With None, each token is waited for.
    decoding: Any = None

    def stats(self) -> Stats:
        """Hits, misses, bytes, waiting and look-ahead since the model was loaded."""
        whole = self.engine.stats()
        return replace(whole, cards=tuple(self._cards(whole))) if self.fit.cards else whole

    def _cards(self, whole: Stats) -> Iterator[CardStats]:
        transfer, first = self.engine.transfer, 0
        links = transfer.transfers if isinstance(transfer, CardsTransfer) else (transfer,)
        copied = [
            (n.loads - n.loads_beside * transfer.streams_in_place) * self.engine.record_bytes(layer)
            for layer, n in enumerate(whole.layers)
        ]  # bytes
        for (_, share), link in zip(self.fit.caching, links, strict=True):
            layers = slice(first, first + share.moe_layers)
            first = layers.stop
            counts = sum(whole.layers[layers], LayerCounts())
            yield CardStats(share, counts, sum(copied[layers]), link.busy_seconds)

    def record(self, path: str | Path, noted_layers: int = 0) -> None:
        """Write a trace of what the routers choose from now on to `path`, until `close` or another
        trace; with `noted_layers` also what routers of so many later layers would have said.

        The slots are emptied first, so that a replay can do exactly what this run does.
        """
        self.engine.record(RoutingTrace(path, self.trace_header()), noted_layers)

    def trace_header(self) -> TraceHeader:
        """The header that describes this model and this run in a trace."""
        info, options, cache = self.pack.info, self.fit.options, self.engine.cache
        parts = cache.caches if isinstance(cache, ShardedCache) else ()
        layouts = [info.layout_of(i) for i in range(len(info.layers))]
        stored = sum(8 * layout.record_bytes for layout in layouts)
        return TraceHeader(
            model=info.source,
            experts=tuple(layer.num_experts for layer in info.layers),
            top_k=self.top_k,
            record_bytes=tuple(self.engine.record_bytes(i) for i in range(len(info.layers))),
            settings={
                "slots": cache.table.slots,  # some may have been given back
                "cards": cards_text(CardSlots(len(n.heat.layers), n.table.slots) for n in parts),
                "policy": options.policy,
                "allocation": "shared",
                "lookahead": options.lookahead,
                "warm_start": options.warm_start,
                "device": self.fit.device.type,
                "dense_bytes": info.dense_bytes(self.fit.dtype.itemsize),  # for the simulator
                "expert_bits": stored / sum(layout.weights for layout in layouts),
                "version": __version__,
            },
        )

    def close(self) -> None:
        """Free the slots, the mapping and the copy thread. The model cannot be used afterwards."""
        if self.fit.options.warm_start and not self.engine.closed:
            write_hot(self.pack.path, self.engine.cache.heat)
        if self.one_token is not None:
            self.one_token.close()
        self.engine.close()
        self.pack.close()


def offload_of(model: PreTrainedModel) -> Offload:
    """`model.offload`, with its type."""
    handle = model.offload
    assert isinstance(handle, Offload)
    return handle
