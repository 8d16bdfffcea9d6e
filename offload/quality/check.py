"""A model is compared with a reference on the same tokens; the two are never in memory together."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.budget.resolve import find_device
from offload.engine.handle import Offload
from offload.errors import QualityError, SourceError
from offload.lines import reason
from offload.model import sources
from offload.options import LoadOptions
from offload.progress import without_bars
from offload.quality.comparison import Comparison, Positions, kl_divergence
from offload.quality.prompts import Prompts
from offload.quality.scoring import Report, Scores, Sliding, Text, encode_text, finite, score
from offload.quant.pack import is_pack

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
FLOAT_BYTES = 4
UNQUANTISED = "experts=16,dense=16"


@dataclass(frozen=True)
class MeasuredModel:
    """A model by its name and shape, with the settings it was run with."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    settings: dict[str, Any]  # bits, dtype, device, and which library ran it

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for the figures of two checks to be comparable: all but settings."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}


def measured_model(model: PreTrainedModel, source: str) -> MeasuredModel:
    """Describe `model`, which was loaded from `source`.

    The name of a pack is that of the checkpoint it was made from.
    """
    text = model.config.get_text_config()
    handle = getattr(model, "offload", None)
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "runner": "transformers",
    }
    if isinstance(handle, Offload):
        info = handle.pack.info
        source = info.source
        settings["runner"] = "offload"
        settings["bits"] = info.bits
    return MeasuredModel(
        name=source,
        model_type=model.config.model_type,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        settings=settings,
    )


@dataclass(frozen=True)
class ModelLoader:
    """A model's name, and how it is loaded when its turn comes."""

    name: str
    load: Callable[[], Loaded]


@contextlib.contextmanager
def opened(loader: ModelLoader) -> Iterator[Loaded]:
    """Load a model and its tokenizer, and close the model afterwards."""
    model, tokenizer = loader.load()
    try:
        yield model, tokenizer
    finally:
        handle = getattr(model, "offload", None)
        if isinstance(handle, Offload):
            handle.close()


def reference_bits(name: str) -> str | None:
    """The `bits` that the reference `name` is loaded with: all 16, but None for a pack, which has
    its own."""
    return None if is_pack(Path(name).expanduser()) else UNQUANTISED


def load_plain(
    source: str, options: LoadOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint `source` (folder, hub id or "demo") with transformers alone.

    Nothing is quantised or offloaded, so the whole model must fit into memory. Raises
    `SourceError`, also for a pack.
    """
    found = sources.find(source, options)
    if found.is_pack:
        raise SourceError(f"{source} is a pack, which transformers cannot run: omit --plain")
    sources.fetch_weights(found, local_files_only=options.local_files_only)
    folder = found.folder
    local = {"local_files_only": True, "trust_remote_code": options.trust_remote_code}
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", device_map={"": find_device(options.device)}, **local
            )
        return model, AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError) as error:  # of a config class or a tokenizer class
        raise SourceError(f"transformers cannot run {source} alone ({reason(error)})") from None


def encode(tokenizer: PreTrainedTokenizerBase | None, prompts: Prompts) -> tuple[Text, ...]:
    """Encode the prompts. Raises `QualityError` if one has too few tokens."""
    pairs = zip(prompts.names, prompts.texts, strict=True)
    return tuple(encode_text(tokenizer, text, f"the prompt {name!r}") for name, text in pairs)


@dataclass(frozen=True)
class LogitsRecord:
    """A reference's log-probabilities [N, V] float32 of all prompts, one after the other."""

    file: IO[bytes]
    reference: MeasuredModel
    prompts: Prompts
    texts: tuple[Text, ...]
    sliding: Sliding

    @property
    def tokens(self) -> int:
        return sum(text.scored for text in self.texts)

    def read(self, count: int) -> Tensor:
        """Read the next `count` rows [count, V]."""
        vocabulary = self.reference.vocabulary
        buffer = bytearray(self.file.read(count * vocabulary * FLOAT_BYTES))
        return torch.frombuffer(buffer, dtype=torch.float32).view(count, vocabulary)


@contextlib.contextmanager
def record_logits(
    reference: ModelLoader, prompts: Prompts, sliding: Sliding, report: Report | None = None
) -> Iterator[LogitsRecord]:
    """Run `reference` once, and keep its log-probabilities in a temporary file.

    Any number of models can then be compared with them. `report` is called with the progress.
    Raises `QualityError`.
    """
    with tempfile.TemporaryFile(prefix="offload-check-") as file:
        # The model must not live in this frame, which stays until the record is no longer needed.
        yield _recorded(reference, prompts, sliding, file, report)


def _recorded(
    loader: ModelLoader, prompts: Prompts, sliding: Sliding, file: IO[bytes], report: Report | None
) -> LogitsRecord:
    with opened(loader) as (model, tokenizer):
        texts = encode(tokenizer, prompts)
        record = LogitsRecord(file, measured_model(model, loader.name), prompts, texts, sliding)
        done = 0
        for text in texts:
            for scores in score(model, text, sliding):
                finite(scores.nll, done, "the reference's negative log-likelihood")
                _write(file, scores.log_probs)
                done += len(scores.targets)
                if report is not None:
                    report(done, record.tokens)
        return record


def _write(file: IO[bytes], rows: Tensor) -> None:
    try:
        file.write(rows.cpu().contiguous().numpy().data)
    except OSError as error:
        raise QualityError(
            f"cannot keep the reference's log-probabilities in {tempfile.gettempdir()} ({error}): "
            "free some space there or name another folder with TMPDIR"
        ) from None


@dataclass(frozen=True)
class CheckResult:
    """What was compared, with the figures of all prompts together and of each prompt."""

    model: MeasuredModel
    reference: MeasuredModel
    prompts: Prompts
    sliding: Sliding
    overall: Comparison
    by_prompt: tuple[Comparison, ...]

    def named(self) -> list[tuple[str, Comparison]]:
        """The figures of each prompt, with its name."""
        return list(zip(self.prompts.names, self.by_prompt, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The object that `offload check --json` prints and that a baseline contains."""
        return {
            "model": asdict(self.model),
            "reference": asdict(self.reference),
            "prompts": {"names": list(self.prompts.names), "sha256": self.prompts.sha256},
            "window": self.sliding.window,
            "stride": self.sliding.stride,
            "figures": self.overall.to_json(),
            "by_prompt": {name: comparison.to_json() for name, comparison in self.named()},
        }


def compare_models(
    model: ModelLoader,
    reference: ModelLoader,
    prompts: Prompts,
    sliding: Sliding,
    report: Report | None = None,
) -> CheckResult:
    """Run `reference` over the prompts, free it, run `model`, and compare the two.

    `report` is called with the progress of each run. Raises `QualityError` if the two have
    different vocabularies, or if a score is not finite.
    """
    with record_logits(reference, prompts, sliding, report) as record:
        return compare_with_record(model, record, report)


def compare_with_record(
    loader: ModelLoader, record: LogitsRecord, report: Report | None = None
) -> CheckResult:
    """Run a model and compare it with a record. Raises `QualityError` as `compare_models` does."""
    gc.collect()  # transformers' models contain reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next model's budget asks the driver how much is free
    record.file.seek(0)
    with opened(loader) as (model, tokenizer):
        measured, reference = measured_model(model, loader.name), record.reference
        if (
            measured.vocabulary != reference.vocabulary
            or encode(tokenizer, record.prompts) != record.texts
        ):
            raise QualityError(
                f"{loader.name} and {reference.name} have different vocabularies "
                f"({measured.vocabulary} and {reference.vocabulary} tokens): their next-token "
                "distributions cannot be compared"
            )
        done = 0
        by_prompt = []
        for text in record.texts:
            parts = []
            for scores in score(model, text, record.sliding):
                parts.append(_positions(scores, record, done))
                done += len(scores.targets)
                if report is not None:
                    report(done, record.tokens)
            by_prompt.append(Positions.joined(parts))
    return CheckResult(
        measured,
        reference,
        record.prompts,
        record.sliding,
        Comparison.of(Positions.joined(by_prompt)),
        tuple(Comparison.of(positions) for positions in by_prompt),
    )


def _positions(scores: Scores, record: LogitsRecord, at: int) -> Positions:
    """Compare `scores` with the next rows of `record`, which follow `at` scored tokens."""
    base = record.read(len(scores.targets)).to(scores.log_probs.device)
    nll = finite(scores.nll, at, "the model's negative log-likelihood")
    kl = finite(kl_divergence(base, scores.log_probs).cpu(), at, "the KL divergence")
    same_top = base.argmax(-1) == scores.log_probs.argmax(-1)
    return Positions(kl, same_top.cpu(), nll, Scores(scores.targets, base).nll)
