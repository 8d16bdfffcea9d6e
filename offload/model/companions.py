"""The files beside the weights in a pack: config, tokenizer, chat template, remote code.

Knows: which of a checkpoint's files those are, and how they are made for a GGUF file, which has
them as metadata. Does not know: weights, packs.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offload.errors import CheckpointError, reason
from offload.json_file import read_object, unreadable
from offload.model.formats import gguf_model as gguf_config
from offload.model.formats.gguf_files import gguf_files, is_gguf
from offload.model.formats.gguf_part import GgufFile
from offload.model.formats.safetensors import INDEX

CONFIG = "config.json"
QUANTISATION = "quantization_config"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


def companions(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that belongs beside the weights of the model at `path`."""
    if is_gguf(path):
        yield from _of_gguf(path)
        return
    for pattern in COPIED:
        for file in sorted(path.glob(pattern)):
            if file.name == CONFIG:
                yield CONFIG, _plain_config(file)
            elif file.name != INDEX and file.is_file():
                yield file.name, _content(file)


def _plain_config(file: Path) -> bytes:
    """A config without word of quantisation, which a pack's dense weights no longer have."""
    config = read_object(file)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if not any(QUANTISATION in part for part in parts):
        return _content(file)
    for part in parts:
        part.pop(QUANTISATION, None)
    return json.dumps(config, indent=2).encode()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except PermissionError:
        raise unreadable(file) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch it again") from None


def _of_gguf(path: Path) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as scratch:
        gguf_config.read_config(path).save_pretrained(scratch)
        gguf_config.generation_config(path).save_pretrained(scratch)
        if "tokenizer.ggml.tokens" in GgufFile(path).fields:
            gguf_tokenizer(path).save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            yield file.name, file.read_bytes()


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, made by transformers. Raises `CheckpointError`."""
    first = gguf_files(path)[0]
    try:
        # transformers draws a bar of its own here, and there is no switch for it
        with contextlib.redirect_stderr(io.StringIO()):
            return AutoTokenizer.from_pretrained(
                first.parent, gguf_file=first.name, local_files_only=True
            )
    except Exception as error:  # whatever it raises on what is in the metadata
        raise CheckpointError(
            f"transformers cannot make the tokenizer in {first} ({reason(error)}): use the "
            "model's safetensors checkpoint"
        ) from None
