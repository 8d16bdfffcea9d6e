"""Opens the tokenizer beside a model's weights."""

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offload.errors import CheckpointError
from offload.files import read_object
from offload.lines import reason

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")
# Files that need a package when there is no tokenizer.json: module and package that read them.
NEEDS = {
    "tekken.json": ("mistral_common", "mistral-common"),
    "*.tiktoken": ("tiktoken", "tiktoken"),
    "tiktoken.model": ("tiktoken", "tiktoken"),
    "tokenizer.model": ("sentencepiece", "sentencepiece protobuf"),
}


def load_tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder of a pack or checkpoint; None if it has none.

    Raises `CheckpointError`.
    """
    if not any(any(path.glob(name)) for name in (*TOKENIZER_FILES, *NEEDS)):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a tokenizer class may raise anything when its files are wrong
        raise CheckpointError(
            f"the tokenizer in {path} cannot be used ({reason(error)}): "
            f"{_remedy(path, error, trust_remote_code)}"
        ) from None


def _remedy(path: Path, error: Exception, trusted: bool) -> str:
    settings = path / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_object(settings) and not trusted:
        return "read the code it brings, and pass --trust-remote-code if you trust it"
    for pattern, (module, package) in NEEDS.items():
        wanted = any(path.glob(pattern)) and not (path / "tokenizer.json").is_file()
        if wanted and importlib.util.find_spec(module) is None:
            return f"{pattern} needs a package, so run pip install {package}"
    if isinstance(error, ImportError):
        return "install what it needs with pip"
    return "fetch it again"
