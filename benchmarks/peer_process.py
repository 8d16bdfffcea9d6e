"""One peer in a process of its own: a model that answers what it is asked over a pipe.

Each library is imported in its own process alone, so that none changes another's threads or
allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Spec:
    """What a peer is."""

    name: str
    kind: str  # "transformers", "accelerate", "ours" or "llama.cpp"
    bits: str  # of the weights: ours as `--bits`, llama.cpp's as the name of a mix
    slots: str | None = None  # of ours; without a number, experts are computed in place
    model: str = "demo"  # of ours
    experts: str | None = None  # transformers' `experts_implementation`
    memory_of: str | None = None  # bits of ours, whose memory accelerate is given
    memory: int | None = None  # the same in bytes, of weights
    file: Path | None = None  # llama.cpp's
    rounds: int | None = None  # fewer than the others: it is slow
    decode: int | None = None  # tokens a round, fewer than the others


class Model(Protocol):
    """What all peers can do."""

    def start(self, ids: list[int]) -> None:
        """Begin a sequence."""

    def feed(self, token: int) -> None:
        """Go on with it."""

    def logits(self) -> Vector:
        """[V] after the last token."""

    def facts(self) -> dict[str, Any]:
        """What stands beside its figures."""


class TorchModel:
    """A transformers model: plain, with accelerate's hooks, or ours."""

    def __init__(self, model: Any, facts: Callable[[], dict[str, Any]]) -> None:
        self._model, self.facts = model, facts
        self._cache: Any = None
        self._logits: Any = None

    def start(self, ids: list[int]) -> None:
        self._cache = None
        self._forward(ids)

    def feed(self, token: int) -> None:
        self._forward([token])

    def logits(self) -> Vector:
        values: Vector = self._logits[0, -1].float().numpy()
        return values

    def _forward(self, ids: list[int]) -> None:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids]),
                cache=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache, self._logits = out.cache, out.logits


class LlamaCppModel:
    """llama.cpp, by the package `llama-cpp-python`."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            model_path=str(file),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def start(self, ids: list[int]) -> None:
        self._model.reset()
        self._model.eval(ids)

    def feed(self, token: int) -> None:
        self._model.eval([token])

    def logits(self) -> Vector:
        pointer = self._library.llama_get_logits_ith(self._model.ctx, -1)
        values = np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))
        return values.astype(np.float32, copy=True)

    def facts(self) -> dict[str, Any]:
        return {"system": self._library.llama_print_system_info().decode()}


def open_peer(spec: Spec, context: int, threads: int, scratch: Path) -> Model:
    """The model that `spec` describes."""
    if spec.kind == "llama.cpp":
        assert spec.file is not None
        return LlamaCppModel(spec.file, context, threads)
    import torch

    torch.set_num_threads(threads)
    return _ours(spec, context) if spec.kind == "ours" else _transformers(spec, scratch)


def _transformers(spec: Spec, scratch: Path) -> Model:
    import torch
    from transformers import AutoModelForCausalLM

    from offload.model import demo
    from offload.progress import without_bars

    where: dict[str, Any] = {}
    if spec.memory is not None:
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        where = {
            "device_map": "auto",
            "max_memory": {"cpu": spec.memory},
            "offload_folder": str(scratch / "offloaded"),
        }
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            demo.checkpoint(),
            dtype=torch.bfloat16,
            experts_implementation=spec.experts,  # None would be grouped_mm
            **where,
        )
    places = list(getattr(model, "hf_device_map", {}).values())
    experts = model.config._experts_implementation
    if experts != spec.experts:
        raise ValueError(f"transformers runs experts as {experts}, not as {spec.experts}")
    return TorchModel(
        model,
        lambda: {
            "experts_implementation": experts,
            "modules": len(places),
            "modules_on_disk": places.count("disk"),
        },
    )


def _ours(spec: Spec, context: int) -> Model:
    import offload
    from offload.engine.handle import offload_of

    model, _ = offload.load(
        spec.model,
        device="cpu",
        bits=spec.bits if spec.model == "demo" else None,
        expert_slots=spec.slots,
        context=context,
        warm_start=False,
    )

    def facts() -> dict[str, Any]:
        stats = offload_of(model).stats()
        return {
            "slots": stats.slots,
            "total_experts": stats.total_experts,
            "hit_rate": stats.counts.hit_rate,
            "mib_per_token": stats.mib_per_token,
        }

    return TorchModel(model, facts)


class Worker:
    """What can be asked of a peer's process."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def distributions(self, prompts: list[list[int]]) -> Vector:
        """Log-probabilities [N, V] of the token after each prompt."""
        rows = []
        for prompt in prompts:
            self._model.start(prompt)
            logits = self._model.logits().astype(np.float64)
            logits -= logits.max()
            rows.append(logits - np.log(np.exp(logits).sum()))
        return np.stack(rows).astype(np.float32)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest token, `count` times."""
        self._model.start(prompt)
        out = [int(self._model.logits().argmax())]
        while len(out) < count:
            self._model.feed(out[-1])
            out.append(int(self._model.logits().argmax()))
        return out

    def timed(self, prompt: list[int], rest: list[int]) -> tuple[float, float]:
        """Seconds of a prefill, and of decoding with `rest` fed token by token."""
        begin = time.perf_counter()
        self._model.start(prompt)
        self._model.logits()
        middle = time.perf_counter()
        for token in rest:
            self._model.feed(token)
            self._model.logits()
        return middle - begin, time.perf_counter() - middle

    def facts(self) -> dict[str, Any]:
        import torch

        from offload.bench.run import peak_since

        return {**self._model.facts(), "peak_memory": peak_since(torch.device("cpu"))}


def give_back_freed() -> None:
    """Return memory that loading has freed and the allocator has kept."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def serve(pipe: Connection, spec: Spec, context: int, threads: int, scratch: Path) -> None:
    """Answer until the pipe is closed: a method's name and arguments in, ("ok" or "failed", value)
    out."""
    import torch

    from offload.bench.run import forget_peak

    try:
        worker = Worker(open_peer(spec, context, threads, scratch))
        give_back_freed()
        forget_peak(torch.device("cpu"))  # what loading took is not what running takes
        pipe.send(("ok", None))
        while (asked := pipe.recv()) is not None:
            name, arguments = asked
            pipe.send(("ok", getattr(worker, name)(*arguments)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
