"""The time that bytes and bandwidths alone would take.

    bound = bytes over the link / the link's rate + bytes read by compute / the memory's rate

Knows: which bytes a test moves and reads, and the rates measured on this machine. Does not know:
how long the test took.

Bytes over the link are those of every copy, guesses included. Compute reads, for each
call of the model, all dense weights (of a token table that is not also the head only a few rows,
which are not counted), the record of every expert that the call uses, and the KV cache. The link's
rate is that of whole records copied back to back (`rates`), the memory's that of a
sum over a large block. Copies that run while others are computed may beat the sum: then more
than 100% are reached. Arithmetic is not counted: a long prefill is limited by it and stays far from
this bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from offload.bench.sample import Sample
from offload.bench.tests import Test
from offload.budget.budget import kv_cache_bytes
from offload.engine.handle import offload_of


@dataclass(frozen=True)
class Rates:
    """What this machine's link and memory were measured to do, in 10^9 bytes a second."""

    link_gb_per_s: float
    memory_gb_per_s: float


@dataclass(frozen=True)
class Bound:
    """The bytes of a test's runs, and the least time for them."""

    tokens: int
    link_bytes: int
    read_bytes: int
    rates: Rates

    @property
    def link_seconds(self) -> float:
        return self.link_bytes / 1e9 / self.rates.link_gb_per_s if self.link_bytes else 0.0

    @property
    def memory_seconds(self) -> float:
        return self.read_bytes / 1e9 / self.rates.memory_gb_per_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.link_seconds + self.memory_seconds)

    @property
    def limited_by(self) -> str:
        """What most of the bound's time goes to."""
        return "link" if self.link_seconds > self.memory_seconds else "memory"


def bound_of(
    model: PreTrainedModel, test: Test, samples: tuple[Sample, ...], rates: Rates
) -> Bound:
    """The bound of `samples` of `test` together."""
    engine, ubatch = offload_of(model).engine, offload_of(model).options.ubatch
    calls = [min(ubatch, test.n_prompt - at) for at in range(0, test.n_prompt, ubatch)]
    calls += [1] * test.n_gen
    each = len(calls) * dense_bytes(model)
    held = test.n_depth
    for tokens in calls:
        held += tokens
        each += kv_cache_bytes(model.config, held, model.dtype)
    records = sum(
        counts.requests * engine.record_bytes(layer)
        for sample in samples
        for layer, counts in enumerate(sample.experts.layers)
    )
    return Bound(
        tokens=test.tokens * len(samples),
        link_bytes=sum(sample.experts.bytes_copied for sample in samples),
        read_bytes=each * len(samples) + records,
        rates=rates,
    )


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of what is not experts that one call of the model reads."""
    info = offload_of(model).pack.info
    size = info.dense_bytes(model.dtype.itemsize)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None or model.config.get_text_config().tie_word_embeddings:
        return size
    path = next(name for name, module in model.named_modules() if module is table)
    for dense in info.dense:
        if path in dense.modules:
            return size - (len(dense.modules) == 1) * info.dense_layout(dense).record_bytes
    return size - int(table.weight.nbytes)
