"""The object that a loaded model carries as `model.offload`."""

import html
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from offload.cache.sharded import ShardedCache
from offload.cache.statistics import LayerCounts
from offload.cache.trace.heatmap import HeatMap, as_html, of_cache
from offload.cache.trace.trace import CardSlots, TraceHeader, cards_text
from offload.engine.engine import Engine
from offload.engine.few import FewTokens
from offload.engine.history import RoutingTrace, write_hot
from offload.engine.stats import CardStats, Stats
from offload.fit import Fit
from offload.machine.threads import Threads
from offload.model.seam import IMPLEMENTATION, QuantizedEmbedding
from offload.quant.errors import OffloadError
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
    few_tokens: FewTokens | None
    top_k: int  # experts of a token
    # The `Loops` of `offload.generation.decode`, which queue a step before the token of the one
    # before it is read. With None, each token is waited for.
    decoding: Any = None
    threads: Threads | None = None  # which follow the load of the CPU; None: their number is fixed

    def __repr__(self) -> str:
        state = "closed" if self.engine.closed else str(self.stats())
        return f"Offload({self.pack.info.source!r}, {state})"

    def _repr_html_(self) -> str:
        """For notebooks: the figures, and a cell for each expert of each layer."""
        if self.engine.closed:
            return f"<code>{html.escape(repr(self))}</code>"
        return f"<code>{html.escape(repr(self))}</code>{as_html(self.heat_map())}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def heat_map(self) -> HeatMap:
        """Which experts are resident now, and how much each was used lately."""
        experts = [layer.num_experts for layer in self.pack.info.layers]
        return of_cache(self.engine.cache, experts)

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
        if self.few_tokens is not None:
            self.few_tokens.close()
        self.engine.close()
        self.pack.close()


if TYPE_CHECKING:  # in fact it stands before such a class in the order of bases
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


class OffloadedModel(_Base):  # type: ignore[misc]
    """What a loaded model has beside its transformers class, which follows in the order of bases.

    Its experts are in `offload`, not in its modules, so that what copies, converts or saves modules
    is refused with `OffloadError`.
    """

    offload: Offload

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights of the whole model, those in records included. None of them is trainable."""
        if only_trainable:
            return 0
        tables = {
            id(module): module.num_embeddings * module.embedding_dim
            for module in self.modules()
            if isinstance(module, nn.Embedding | QuantizedEmbedding)
        }
        return self.offload.pack.info.parameters - exclude_embeddings * sum(tables.values())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The model itself, if it is there and of that type already."""
        for given in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if isinstance(given, torch.dtype) and given != self.dtype:
                raise OffloadError(
                    f"the model computes in {self.dtype}: load it again with dtype={given}"
                )
            if isinstance(given, str | torch.device | int) and not isinstance(given, bool):
                there, here = torch.device(given), self.device
                if (there.type, there.index or 0) != (here.type, here.index or 0):
                    raise OffloadError(
                        f"the model is on {here}: load it again with device={str(there)!r}"
                    )
        return self

    def half(self, *_: Any) -> Self:
        return self.to(torch.float16)

    def bfloat16(self, *_: Any) -> Self:
        return self.to(torch.bfloat16)

    def float(self, *_: Any) -> Self:
        return self.to(torch.float32)

    def double(self, *_: Any) -> Self:
        return self.to(torch.float64)

    def cpu(self) -> Self:
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        return self.to("cuda" if device is None else torch.device("cuda", device))

    def set_experts_implementation(self, experts_implementation: Any) -> None:
        if experts_implementation != IMPLEMENTATION:
            raise OffloadError(
                "this model's experts are computed from their pack: load it with transformers for "
                "another experts implementation"
            )

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise OffloadError(
            "this model's experts are in its pack, not in its modules: copy the folder of the pack "
            "(model.offload.pack.path) instead of saving"
        )

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise OffloadError(
            "a loaded model cannot be copied or pickled, because its experts are in its pack: load "
            "it again where it is needed"
        )

    def __deepcopy__(self, _: Any) -> NoReturn:
        self.__reduce_ex__(0)


def offload_of(model: PreTrainedModel) -> Offload:
    """`model.offload`, with its type. Raises `OffloadError` for what `load` has not returned."""
    handle = getattr(model, "offload", None)
    if not isinstance(handle, Offload):
        raise OffloadError(
            f"the model is a {type(model).__name__} that load has not returned: give load's model"
        )
    return handle
