"""A model is compared with a reference on the same prompts, and only one is in memory at a time."""

import contextlib
import gc
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
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
from offload.files import asked_text
from offload.generation.rope import follow_length
from offload.lines import reason
from offload.model import names
from offload.options import LoadOptions
from offload.progress import without_bars
from offload.quality.comparison import Comparison, Positions, kl_divergence
from offload.quality.scoring import Report, Scores, Sliding, Text, encode_text, finite, score_all

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
FLOAT_BYTES = 4
UNQUANTISED = "experts=16,dense=16"
BUILT_IN = Path(__file__).with_name("prompts.txt")
HEADING = re.compile(r"^--- +(\S.*?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Prompts:
    """Named texts; `sha256` depends on the names and the texts, but not on the file's layout."""

    names: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        parts = chain.from_iterable(zip(self.names, self.texts, strict=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_prompts(file: Path | None = None) -> Prompts:
    """Read the prompts of `file`. None stands for prose, code, maths, dialogue and Hebrew, which
    this project wrote itself.

    A line `--- NAME` begins the prompt NAME; text before the first such line is the prompt "1".
    Raises `OffloadError`.
    """
    first, *rest = HEADING.split(asked_text(file or BUILT_IN, "prompts"))
    pairs = [("1", first), *zip(rest[::2], rest[1::2], strict=True)]
    named = {name: body.strip("\n") for name, body in pairs if body.strip()}
    if not named:
        raise QualityError(f"{file} holds no prompts: write texts, each under a line `--- NAME`")
    if len(named) < sum(bool(body.strip()) for _, body in pairs):
        raise QualityError(f"{file} has two prompts with the same name: names must differ")
    return Prompts(tuple(named), tuple(named.values()))


@dataclass(frozen=True)
class MeasuredModel:
    """A model by its name and shape, with the settings it was run with."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocabulary: int
    settings: dict[str, Any]  # bits, dtype, device, and which library ran it


def measured_model(model: PreTrainedModel, source: str) -> MeasuredModel:
    """Describe `model`, which was loaded from `source`.

    The name of a pack is that of the checkpoint it was made from.
    """
    text = model.config.get_text_config()
    handle = getattr(model, "offload", None)
    settings: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "runner": "transformers",
    }
    if isinstance(handle, Offload):
        source = handle.pack.info.source
        settings |= {"runner": "offload", "bits": handle.pack.info.bits}
    return MeasuredModel(
        source,
        model.config.model_type,
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        settings,
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
    handle = getattr(model, "offload", None)
    with contextlib.closing(handle) if isinstance(handle, Offload) else contextlib.nullcontext():
        yield model, tokenizer


def reference_bits(name: str, pack_dir: str | Path | None = None) -> str | None:
    """The `bits` that the reference `name` is loaded with: all 16, but None for a pack, which has
    its own."""
    found = names.find_here(name, pack_dir)
    return None if found is not None and found.is_pack else UNQUANTISED


def load_plain(source: str, options: LoadOptions) -> Loaded:
    """Load the checkpoint `source` (folder, hub id or "demo") with transformers alone.

    Nothing is quantised or offloaded, so the whole model must fit into memory. Raises
    `SourceError`, also for a pack.
    """
    found = names.find(source, options)
    if found.is_pack:
        raise SourceError(f"{source} is a pack, which transformers cannot run: omit --plain")
    names.fetch_weights(found)
    own = {"local_files_only": True, "trust_remote_code": options.trust_remote_code}
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = {"": find_device(options.device)}
    try:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                found.folder, dtype="auto", device_map=where, **own
            )
        follow_length(model)
        return model, AutoTokenizer.from_pretrained(found.folder, **own)
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
        for _, done, scores in score_all(model, texts, sliding, report):
            finite(scores.nll, done, "the reference's negative log-likelihood")
            _write(file, scores.log_probs)
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
        parts: list[list[Positions]] = [[] for _ in record.texts]
        for at, done, scores in score_all(model, record.texts, record.sliding, report):
            parts[at].append(_positions(scores, record, done))
    by_prompt = [Positions.joined(part) for part in parts]
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
