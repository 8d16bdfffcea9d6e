"""The names of a checkpoint's files and of what its config says, without torch."""

import re
from pathlib import Path

from offload.errors import CheckpointError
from offload.files import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The names that configs have for the number of experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")


def read_template(folder: Path) -> str | None:
    """The chat template in the folder of a model; None if there is none."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (file := folder / name).is_file() and (given := read_object(file).get("chat_template")):
            return str(given)
    return None


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files in `folder`. Raises `CheckpointError` when one is missing."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        if shards := _shards(folder):
            return shards
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise CheckpointError(
                f"{folder} has its weights as pickle (.bin), which can run code when opened: "
                "convert them to safetensors first"
            )
        if any(folder.glob("*.gguf")):
            raise CheckpointError(
                f"{folder} has its weights as GGUF: name the .gguf file instead of the folder"
            )
        if others := sorted(file.name for file in folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder} has {others[0]} and neither {SINGLE} nor {INDEX}: fetch the model's "
                "transformers checkpoint; if this is it, name the file so"
            )
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: it is not a checkpoint")
    try:
        files = sorted(set(read_object(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): fetch it again") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} names a file outside its folder ({file!r}): refused")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file}, which is not safetensors: refused")
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file} is missing, though {INDEX} names it: fetch it again"
            )
    return files


def _shards(folder: Path) -> list[str]:
    """Names of the files of a checkpoint in several files that has no index; empty if it is none.

    Raises `CheckpointError` when one is missing.
    """
    found = {file.name: _SHARD.fullmatch(file.name) for file in folder.glob("*.safetensors")}
    shards = {name: match for name, match in found.items() if match}
    if not shards:
        return []
    stem, count = max((match["stem"], match["count"]) for match in shards.values())
    wanted = [f"{stem}-{at:05d}-of-{count}.safetensors" for at in range(1, int(count) + 1)]
    if missing := [name for name in wanted if name not in shards]:
        raise CheckpointError(
            f"{folder} has no {INDEX}, and {len(missing)} of {len(wanted)} files are missing "
            f"({missing[0]}, ...): fetch it again"
        )
    return wanted


_SHARD = re.compile(r"(?P<stem>model)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether `path` names a GGUF file rather than a checkpoint folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def gguf_files(path: Path) -> list[Path]:
    """All files of the model that `path` is one of, in order. Raises `CheckpointError`."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    files = [
        path.with_name(f"{part['stem']}-{number:05d}-of-{part['count']}{path.suffix}")
        for number in range(1, int(part["count"]) + 1)
    ]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, a part of {path.name}: fetch it again")
    return files


def model_name(path: Path) -> str:
    """The name of the model in `path`: the file's name without suffix and number."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def models_in(folder: Path) -> list[Path]:
    """The GGUF models in `folder`, each by its first file."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*")):
        if is_gguf(file) and file.is_file():
            found.setdefault(model_name(file), file)
    return list(found.values())
