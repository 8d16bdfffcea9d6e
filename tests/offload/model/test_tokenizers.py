"""A tokenizer in an unusual file is read, or the package that it needs is named."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from offload.errors import CheckpointError
from offload.model import sources
from offload.model.sources import load_tokenizer

CODE = "import tiktoken\n\n\nclass QWenTokenizer:\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint without a tokenizer, where no optional package is installed."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    monkeypatch.setattr(sources, "_importable", lambda module: False)
    return tmp_path


def test_tekken_json_alone_is_a_tokenizer(folder: Path) -> None:
    tokens = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    names = ("<unk>", "<s>", "</s>")
    config = {"pattern": r"\p{L}+|\p{N}|\s+", "num_vocab_tokens": 256, "version": "v7"}
    config |= {"default_vocab_size": 259, "default_num_special_tokens": 3}
    vocabulary = {
        "config": config,
        "vocab": [{"rank": at, "token_bytes": token} for at, token in enumerate(tokens)],
        "special_tokens": [{"rank": at, "token_str": name} for at, name in enumerate(names)],
    }
    (folder / "tekken.json").write_text(json.dumps(vocabulary))
    tokenizer = load_tokenizer(folder, False)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("hi")["input_ids"]) == "hi"


@pytest.mark.parametrize(
    ("data", "packages"),
    [(b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
def test_tokenizer_model_alone_names_the_package_that_reads_it(
    data: bytes, packages: str, folder: Path
) -> None:
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"pip install {packages}$"):
        load_tokenizer(folder, False)


def test_a_tokenizer_of_code_names_the_package_that_its_code_imports(folder: Path) -> None:
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    (folder / "tok.py").write_text(CODE.replace("tiktoken", "tiktoken_of_no_one"))
    about = {"tokenizer_class": "QWenTokenizer"}
    about["auto_map"] = {"AutoTokenizer": ["tok.QWenTokenizer", None]}  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"pip install tiktoken_of_no_one tiktoken$"):
        load_tokenizer(folder, True)


def test_a_folder_without_a_tokenizer_has_none(folder: Path) -> None:
    assert load_tokenizer(folder, False) is None
