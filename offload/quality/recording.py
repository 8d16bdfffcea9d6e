"""What a reference says about the prompts, kept in a temporary file.

Knows: how a model is opened and closed, how its log-probabilities are written and read back in the
same order, so that no other model need be in memory with it. Does not know: what is compared.

Letters: N tokens of all prompts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.engine.handle import Offload
from offload.errors import QualityError
from offload.quality.perplexity import Report, finite
from offload.quality.prompts import Prompts
from offload.quality.scoring import Sliding, Text, encode_text, score
from offload.quality.subject import Subject, subject_of

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Source:
    """A model that is loaded when its turn comes."""

    name: str
    load: Callable[[], Loaded]


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Loaded]:
    """The model `source`, closed afterwards."""
    model, tokenizer = source.load()
    try:
        yield model, tokenizer
    finally:
        handle = getattr(model, "offload", None)
        if isinstance(handle, Offload):
            handle.close()


def encode(tokenizer: PreTrainedTokenizerBase | None, prompts: Prompts) -> tuple[Text, ...]:
    """The prompts as tokens. Raises `QualityError` where there are too few."""
    pairs = zip(prompts.names, prompts.texts, strict=True)
    return tuple(encode_text(tokenizer, text, f"the prompt {name!r}") for name, text in pairs)


@dataclass(frozen=True)
class Recording:
    """A reference's log-probabilities [N, V] float32 for all prompts, one after the other."""

    file: IO[bytes]
    reference: Subject
    prompts: Prompts
    texts: tuple[Text, ...]
    sliding: Sliding

    @property
    def tokens(self) -> int:
        return sum(text.scored for text in self.texts)

    def read(self, count: int) -> Tensor:
        """The next `count` rows [count, V]."""
        vocabulary = self.reference.vocabulary
        buffer = bytearray(self.file.read(count * vocabulary * FLOAT_BYTES))
        return torch.frombuffer(buffer, dtype=torch.float32).view(count, vocabulary)


@contextlib.contextmanager
def record(
    reference: Source, prompts: Prompts, sliding: Sliding, report: Report | None = None
) -> Iterator[Recording]:
    """Run `reference` once, for any number of models to be compared with it."""
    with tempfile.TemporaryFile(prefix="offload-check-") as file:
        yield _record(reference, prompts, sliding, file, report)


def _record(
    source: Source, prompts: Prompts, sliding: Sliding, file: IO[bytes], report: Report | None
) -> Recording:
    with opened(source) as (model, tokenizer):
        subject, texts = subject_of(model, source.name), encode(tokenizer, prompts)
        recording = Recording(file, subject, prompts, texts, sliding)
        done = 0
        for text in texts:
            for scores in score(model, text, sliding):
                finite(scores.nll, done, "the reference's negative log-likelihood")
                _write(file, scores.log_probs)
                done += len(scores.targets)
                if report is not None:
                    report(done, recording.tokens)
        return recording


def _write(file: IO[bytes], rows: Tensor) -> None:
    try:
        file.write(rows.cpu().contiguous().numpy().data)
    except OSError as error:
        raise QualityError(
            f"cannot keep the reference's log-probabilities in {tempfile.gettempdir()} ({error}): "
            "free some space there or name another folder with TMPDIR"
        ) from None
