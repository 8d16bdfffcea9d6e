"""A test of `offload bench`, its timed runs, and the row of figures that follows from them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from offload.budget.budget import kv_cache_bytes
from offload.engine.handle import offload_of
from offload.engine.stats import Stats


@dataclass(frozen=True)
class Test:
    """Prefill `n_prompt` tokens, then decode `n_gen`, after `n_depth` tokens that are not timed."""

    __test__: ClassVar[bool] = False  # this is not a class of pytest's, whatever its name says

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """The name that llama-bench gives it, like `pp512` or `tg128 @ d16`."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds after a run."""
        return self.n_depth + self.tokens


def make_tests(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:
    """At each depth all prefills, then all decodes, then the pairs.

    A test of no tokens is left out.
    """
    return [
        Test(prompt, gen, depth)
        for depth in depths
        for prompt, gen in (*((p, 0) for p in prompts), *((0, n) for n in gens), *pairs)
        if prompt or gen
    ]


@dataclass(frozen=True)
class Sample:
    """How long each part of a run took, and what the experts did in it."""

    prompt_ns: int  # until the logits of the first new token; 0 if there is no prompt
    token_ns: tuple[int, ...]  # one for each decoded token
    experts: Stats

    @property
    def ns(self) -> int:
        """Time of the whole run."""
        return self.prompt_ns + sum(self.token_ns)


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One test of one model. The fields are the keys of a JSON row, in its order.

    docs/bench.schema.json explains each; llama-bench's names are used for what it has too.
    """

    build: str
    cpu_info: str
    gpu_info: str  # "" without a GPU
    backends: str
    n_threads: int
    model: str
    model_type: str
    model_size: int  # bytes of the pack
    model_n_params: int
    bits: str
    policy: str
    lookahead: bool | None  # None: guessing goes on as long as it pays
    text: str  # "real" or "random"
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str  # UTC
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    expert_slots: int
    total_experts: int
    hit_rate: float
    mib_per_token: float
    wait_seconds: float
    lookahead_precision: float
    lookahead_recall: float
    link_gb_per_s: float  # at which expert records are copied to their slots; 10^9 bytes a second
    link_share: float  # bytes copied per second of the test, over link_gb_per_s
    first_token_ns: float | None  # from the prompt to the first logits; None without a prompt
    token_p50_ns: float | None  # percentiles over all decoded tokens; None if there are none
    token_p95_ns: float | None
    token_p99_ns: float | None
    peak_memory: int  # bytes
    memory_gb_per_s: float  # at which the compute device reads its memory
    link_bytes: int
    read_bytes: int
    bound_ts: float  # tokens/s if only the time for these bytes at these bandwidths counted
    bound_share: float  # of bound_ts that was reached
    bound_limit: str  # "link" or "memory": where most of the bound's time goes

    @property
    def name(self) -> str:
        """The model and its bits."""
        return f"{self.model} {self.bits}"

    @property
    def test(self) -> Test:
        """The test that was run."""
        return Test(self.n_prompt, self.n_gen, self.n_depth)

    @property
    def resident(self) -> float:
        """Share of the experts that have a slot."""
        return self.expert_slots / self.total_experts

    @property
    def lookahead_name(self) -> str:
        """The value of --lookahead."""
        return {True: "on", False: "off", None: "auto"}[self.lookahead]


def row_of(
    subject: dict[str, Any],
    test: Test,
    samples: Sequence[Sample],
    *,
    test_time: str,
    read_bytes: int,
    peak_memory: int,
) -> BenchRow:
    """The row of `test`, from one or more samples of it.

    `subject` has the fields that all rows of a loaded model share, the bandwidths among them.
    `read_bytes` counts what all samples together read from memory, as `bytes_read` does.
    """
    times = [sample.ns for sample in samples]
    speeds = [test.tokens / ns * 1e9 for ns in times]
    first, *rest = (sample.experts for sample in samples)
    experts = sum(rest, first)
    seconds = sum(times) / 1e9
    p50, p95, p99 = percentiles([ns for sample in samples for ns in sample.token_ns])
    copied, link = experts.bytes_copied, subject["link_gb_per_s"]
    link_seconds = copied / 1e9 / link if copied else 0.0
    memory_seconds = read_bytes / 1e9 / subject["memory_gb_per_s"]
    bound_seconds = link_seconds + memory_seconds
    return BenchRow(
        **subject,
        **asdict(test),
        test_time=test_time,
        avg_ns=round(statistics.fmean(times)),
        stddev_ns=round(spread(times)),
        avg_ts=statistics.fmean(speeds),
        stddev_ts=spread(speeds),
        samples_ns=tuple(times),
        samples_ts=tuple(speeds),
        expert_slots=experts.slots,
        total_experts=experts.total_experts,
        hit_rate=experts.counts.hit_rate,
        mib_per_token=experts.mib_per_token,
        wait_seconds=experts.counts.wait_seconds,
        lookahead_precision=experts.counts.lookahead_precision,
        lookahead_recall=experts.counts.lookahead_recall,
        link_share=copied / 1e9 / seconds / link if link else 0.0,
        first_token_ns=statistics.fmean(s.prompt_ns for s in samples) if test.n_prompt else None,
        token_p50_ns=p50,
        token_p95_ns=p95,
        token_p99_ns=p99,
        peak_memory=peak_memory,
        link_bytes=copied,
        read_bytes=read_bytes,
        bound_ts=test.tokens * len(samples) / bound_seconds,
        bound_share=bound_seconds / seconds,
        bound_limit="link" if link_seconds > memory_seconds else "memory",
    )


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percentiles(values: Sequence[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """The 50th, 95th and 99th percentile, interpolated between values; None if there are none."""
    if not values:
        return None, None, None
    several = values if len(values) > 1 else [*values, *values]  # which `quantiles` insists on
    cuts = statistics.quantiles(several, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


def bytes_read(model: PreTrainedModel, test: Test, samples: Sequence[Sample]) -> int:
    """Bytes of weights and KV cache that `samples` of `test` together read from memory."""
    engine, ubatch = offload_of(model).engine, offload_of(model).fit.ubatch
    calls = [min(ubatch, test.n_prompt - at) for at in range(0, test.n_prompt, ubatch)]
    calls += [1] * test.n_gen
    each = len(calls) * dense_bytes(model)
    held = test.n_depth
    for tokens in calls:
        held += tokens
        each += sum(kv_cache_bytes(model.config, held, model.dtype))
    records = sum(
        counts.requests * engine.record_bytes(layer)
        for sample in samples
        for layer, counts in enumerate(sample.experts.layers)
    )
    return each * len(samples) + records


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights other than experts that one call of the model reads."""
    info = offload_of(model).pack.info
    size = info.dense_bytes(model.dtype.itemsize)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None or model.config.get_text_config().tie_word_embeddings:
        return size
    # Of an embedding table that is not the head as well, a call reads single rows only.
    path = next(name for name, module in model.named_modules() if module is table)
    for dense in info.dense:
        if path in dense.modules:
            return size - (len(dense.modules) == 1) * info.dense_layout(dense).record_bytes
    return size - int(table.weight.nbytes)
