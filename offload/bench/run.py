"""Times the tests of `offload bench`: for each setting the model is loaded, run and freed."""

import contextlib
import functools
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.bench.row import BenchRow, Sample, Test, bytes_read, row_of
from offload.engine.engine import Engine
from offload.engine.handle import TokenSource, offload_of
from offload.errors import GenerationError
from offload.generation.stream import forward, peak_memory
from offload.loading import load_and_tell
from offload.machine.measure import processor_name
from offload.options import LoadOptions
from offload.pack.recipe import bits_name
from offload.sampling import Sampling
from offload.trace.timeline import record_timeline
from offload.version import __version__

BLOCK_BYTES = 256 * 2**20  # more than the caches of most processors
ROUNDS = 8
FORGET = Path("/proc/self/clear_refs")  # writing "5" sets VmHWM to what is resident now (proc(5))
STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Make `peak_since` count from now on. Only Linux and CUDA can; elsewhere this does nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            FORGET.write_text("5")


def peak_since(device: torch.device) -> int:
    """Most bytes since `forget_peak`: allocated on a GPU, or resident in this process.

    Resident memory includes mapped files.
    """
    if device.type != "cuda":
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = STATUS.read_text().splitlines()
            mark = next(line for line in lines if line.startswith("VmHWM:"))
            return int(mark.split()[1]) * 1024
    return peak_memory(device)


def take_sample(model: PreTrainedModel, test: Test, ids: list[int]) -> Sample:
    """Run `test` once over the tokens `ids`.

    A decode reads the given tokens one by one, so that routing follows real text and does not
    depend on what the model would say. With `--engine device` steps are queued before their tokens
    are known: there the model reads its own greedy choices, after at least one given token.
    """
    handle = offload_of(model)
    tokens = torch.tensor([ids], device=model.device)  # [1, T]
    at, ubatch = test.n_depth, handle.fit.ubatch
    if not at and not test.n_prompt and handle.decoding is not None:
        at = 1
    logits, cache = forward(model, tokens[:, :at], None, ubatch) if at else (None, None)
    sync(model.device)
    before = handle.stats()
    ends = [time.perf_counter_ns()]
    if test.n_prompt:
        logits, cache = forward(model, tokens[:, at : at + test.n_prompt], cache, ubatch)
        at += test.n_prompt
        sync(model.device)
    answer: TokenSource | None = None
    if test.n_gen and handle.decoding is not None:
        assert logits is not None
        limit = test.n_gen + 1
        answer = handle.decoding.begin(
            model, tokens[:, :at], logits, cache, Sampling(), limit, at + limit, frozenset()
        )
    if answer is not None:
        answer()  # the token that the prompt's logits give; this also queues the next step
    ends.append(time.perf_counter_ns())
    for _ in range(test.n_gen):
        if answer is not None:
            answer()  # returns when the next token has arrived
        else:
            _, cache = forward(model, tokens[:, at : at + 1], cache)
            at += 1
            sync(model.device)  # as in real use, where the next token depends on this one
        ends.append(time.perf_counter_ns())
    prompt_ns, *token_ns = (end - begin for begin, end in itertools.pairwise(ends))
    experts = handle.stats() - before
    return Sample(prompt_ns if test.n_prompt else 0, tuple(token_ns), experts)


def sync(device: torch.device) -> None:
    """Wait until `device` has finished all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def real_text(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of English, from the documentation that comes with every Python."""
    ids: list[int] = []
    for name in sorted(topics.topics):
        ids += tokenizer(topics.topics[name], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    return (ids * -(-count // len(ids)))[:count]


def random_tokens(vocabulary: int, count: int) -> list[int]:
    """`count` tokens drawn uniformly, as llama-bench does.

    An expert cache does better or worse with them than with text.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def stretches(ids: list[int], length: int) -> Iterator[list[int]]:
    """Stretches of `length` tokens from `ids`, one after another and then again from the start.

    Each run of a test reads the next stretch: an expert cache that has just seen the same text
    would have more hits than in real use.
    """
    count = max(1, len(ids) // length)
    return itertools.cycle([ids[at * length : (at + 1) * length] for at in range(count)])


def measure_link(engine: Engine, copies: int = 64) -> float:
    """GB/s of whole expert records copied back to back: the most that loads can reach."""
    transfer, layer = engine.transfer, engine.layers[0]
    held = engine.cache.table.key_in(0)
    experts = [i % layer.num_experts for i in range(layer.num_experts + copies)]

    def copy(chosen: list[int]) -> float:
        tickets = [transfer.start(layer.index, expert, 0, urgent=True) for expert in chosen]
        for ticket in tickets:
            transfer.wait(ticket)
        sync(transfer.device)
        return transfer.busy_seconds

    try:
        before = copy(experts[: layer.num_experts])  # the first copy of each reads the disk
        seconds = copy(experts[layer.num_experts :]) - before
    finally:
        if held is not None:
            transfer.wait(transfer.start(*held, 0, urgent=True))
    return copies * engine.record_bytes(layer.index) / 1e9 / seconds


@functools.cache
def measure_memory(device: torch.device) -> float:
    """GB/s at which `device` reads its own memory while it computes: the best of a few sums."""
    block = torch.ones(BLOCK_BYTES // 4, device=device)
    seconds = []
    for _ in range(ROUNDS):
        sync(device)
        begin = time.perf_counter()
        block.sum()
        sync(device)
        seconds.append(time.perf_counter() - begin)
    return block.nbytes / 1e9 / min(seconds)


def _subject(model: PreTrainedModel, random: bool) -> dict[str, Any]:
    """The fields that all rows of a loaded model share; `random`: it reads random tokens."""
    offload = offload_of(model)
    device, options = offload.fit.device, offload.fit.options
    return {
        "build": __version__,
        "cpu_info": processor_name(),
        "gpu_info": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "backends": device.type.upper(),
        "n_threads": torch.get_num_threads(),
        "model": offload.pack.info.source,
        "model_type": str(model.config.model_type),
        "model_size": offload.pack.total_bytes,
        "model_n_params": offload.pack.info.parameters,
        "bits": bits_name(offload.pack.info),
        "policy": options.policy,
        "lookahead": options.lookahead,
        "text": "random" if random else "real",
        "link_gb_per_s": measure_link(offload.engine),
        "memory_gb_per_s": measure_memory(model.device),
    }


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tests: Sequence[Test],
    *,
    repetitions: int = 5,
    warmup: bool = True,
    random: bool = False,
) -> Iterator[BenchRow]:
    """Time each test `repetitions` times; yields its row as soon as it is done.

    Each repetition reads its own stretch of text; another call with the same arguments reads the
    same stretches. Raises `GenerationError` if there is no tokenizer for real text.
    """
    if tokenizer is None and not random:
        raise GenerationError("the model has no tokenizer for real text: pass --random")
    count = max(test.context for test in tests) * (repetitions + warmup)
    if random or tokenizer is None:
        ids = random_tokens(model.config.get_text_config().vocab_size, count)
    else:
        ids = real_text(tokenizer, count)
    subject, devices = _subject(model, random), offload_of(model).fit.devices
    for test in tests:
        texts = stretches(ids, test.context)
        if warmup:
            take_sample(model, test, next(texts))
        for device in devices:
            forget_peak(device)
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        samples = [take_sample(model, test, next(texts)) for _ in range(repetitions)]
        yield row_of(
            subject,
            test,
            samples,
            test_time=when,
            read_bytes=bytes_read(model, test, samples),
            peak_memory=sum(map(peak_since, devices)),
        )


def check_context(tests: Sequence[Test], context: int) -> None:
    """Raise `GenerationError` for tests that do not fit into `context` tokens."""
    longest = max(test.context for test in tests)
    if longest > context:
        raise GenerationError(
            f"a test needs {longest} tokens and the context holds {context}: raise --ctx-size"
        )


def sweep(
    source: str,
    settings: Sequence[LoadOptions],
    tests: Sequence[Test],
    *,
    threads: int | None,
    timeline: Path | None,
    **options: Any,
) -> Iterator[BenchRow]:
    """The rows of the model `source` with every setting, each as soon as it is measured.

    `threads` and `timeline` are as in `SharedOptions`, and `options` as in `run`.
    """

    def rows(setting: LoadOptions) -> Iterator[BenchRow]:
        first = setting is settings[0]
        model, tokenizer, _ = load_and_tell(source, setting, threads, note=first)
        with contextlib.closing(offload_of(model)), record_timeline(model, timeline):
            yield from run(model, tokenizer, tests, **options)

    for setting in settings:
        yield from rows(setting)
        gc.collect()  # a model's modules and hooks form cycles, and two models may not fit at once
