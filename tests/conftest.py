"""Fixtures every test may use: homes, tiny checkpoints that speak bytes, and a scripted model.

Nothing here touches the user's home or the network. A test marked `demo` runs with the home it
was given (`demo_home`), where the demo's weights are; every other test has an empty one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not os.isatty(0):  # with -s, a pipe that somebody left open would be read as a part of prompts
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
os.environ["XDG_CONFIG_HOME"] = os.devnull  # the user's own file of options is not read

import pytest
import torch

# Triton decides when it is first imported whether kernels are compiled or interpreted. A process
# that is to compile them starts without this.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import offload.generation.stream
import offload.quant.encode
from offload.files import offload_home
from offload.options import LoadOptions
from offload.quant.errors import OffloadError
from tests.rounding import round_to_codes
from tests.tiny import save_tiny

DEMO_HOME = offload_home()  # before any test changes OFFLOAD_HOME
SESSION_HOME = tempfile.TemporaryDirectory(prefix="offload-tests-")  # of session fixtures
THREADS = torch.get_num_threads()

PAD, BEGIN, END = 256, 257, 258  # ids below 256 are the bytes themselves
VOCABULARY = 320  # the model's; ids from 259 on stand for nothing
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# A GPU machine may have nothing beyond pytest: its tests run nevertheless.
if importlib.util.find_spec("hqq") is None:
    offload.quant.encode.quantize = round_to_codes
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    settings.register_profile("tests", deadline=None, database=None)
    settings.load_profile("tests")


@pytest.fixture(scope="session")
def demo_home() -> Path:
    """The home this run was started with: `$OFFLOAD_HOME`, else the user's cache."""
    return DEMO_HOME


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set what fixtures of every scope see: the home, and the threads.

    Tiny products are done before a second thread wakes up; on a busy machine it only waits.
    """
    is_demo = item.get_closest_marker("demo") is not None
    os.environ["OFFLOAD_HOME"] = str(DEMO_HOME) if is_demo else SESSION_HOME.name
    torch.set_num_threads(THREADS if is_demo else 1)


@pytest.fixture(autouse=True)
def home(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`OFFLOAD_HOME` of this test: an empty folder, or `demo_home` when it is marked `demo`.

    Messages name flags until the test calls `offload.load`, whatever tests did before.
    """
    monkeypatch.setattr(OffloadError, "reworded", str)
    if request.node.get_closest_marker("demo") is not None:
        return DEMO_HOME
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("OFFLOAD_HOME", str(path))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token whose id is the byte, so every character beyond ASCII is split."""
    vocabulary = {sign: byte for byte, sign in bytes_to_unicode().items()}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|pad|>", "<|begin|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )


def save_with_tokenizer(model_type: str, folder: Path, **changes: Any) -> Path:
    """A tiny fp32 checkpoint of `model_type` with the byte tokenizer; it decodes greedily."""
    ids = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
    save_tiny(model_type, folder, vocab_size=VOCABULARY, **ids, **changes)
    make_tokenizer().save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests; all of its workers have the same."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted here: the simulated one is tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral checkpoint with a tokenizer. Copy it before changing it."""
    return save_with_tokenizer("mixtral", tmp_path_factory.mktemp("checkpoints") / "tiny-mixtral")


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss checkpoint with a tokenizer. Copy it before changing it."""
    return save_with_tokenizer("gpt_oss", tmp_path_factory.mktemp("checkpoints") / "tiny-gpt-oss")


@pytest.fixture(scope="session")
def mixtral_pack(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral as a 4-bit pack. Copy it before changing it."""
    from offload.pack.find import find_or_make_pack

    destination = tmp_path_factory.mktemp("packs") / "tiny-mixtral-q4"
    return find_or_make_pack(str(mixtral), LoadOptions(), destination=destination)


class ScriptCache:
    """In place of transformers' KV cache."""

    is_croppable = True

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.step = 0  # of the answer
        self.said: int | None = None  # the answer's last token, not read yet

    def crop(self, count: int) -> None:
        """Forget the last `-count` ids, as transformers' caches do."""
        del self.ids[count:]
        self.said = None


class Script:
    """What a model is made to say, token by token, and the prompts it was given.

    After its ids it says `END` for ever. `at` is called before each step with its number.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prompts: list[list[int]] = []
        self.read: list[int] = []  # tokens of each prompt that were not in the KV cache
        self.at: Callable[[int], None] = lambda step: None

    def say(self, text: str) -> None:
        self.ids = list(text.encode())

    @property
    def prompt(self) -> str:
        """The last prompt as text."""
        return bytes(self.prompts[-1]).decode()

    def forward(
        self,
        model: Any,
        ids: Tensor,
        cache: ScriptCache | None,
        ubatch: int = 1,
        before: Tensor | None = None,
    ) -> tuple[Tensor, ScriptCache]:
        """In place of `offload.generation.stream.forward`."""
        cache = cache or ScriptCache()
        read = ids[0].tolist()
        if read != [cache.said]:
            self.prompts.append(cache.ids + read)
            self.read.append(len(read))
            cache.step = 0
        cache.ids += read
        self.at(cache.step)
        logits = torch.full((1, VOCABULARY), -1e4)
        cache.said = self.ids[cache.step] if cache.step < len(self.ids) else END
        logits[0, cache.said] = 0.0
        cache.step += 1
        return logits, cache


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Every model of this test says what this script says; its experts are not asked."""
    scripted = Script()
    monkeypatch.setattr(offload.generation.stream, "forward", scripted.forward)
    return scripted


def random_splits(data: bytes, chooser: random.Random) -> list[bytes]:
    """`data` cut into pieces of 1 to 5 bytes, anywhere."""
    pieces = []
    while data:
        size = chooser.randint(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces
