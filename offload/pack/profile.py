"""What a model is made of, as its small files tell, without torch unless a GGUF file is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from offload.files import packs_folder, read_object, user_path
from offload.model.layout import CHOSEN, is_gguf, read_template
from offload.model.names import find
from offload.options import LoadOptions
from offload.pack.at_hand import EXPERTS, checkpoints, number, stored_as
from offload.pack.recipe import Recipe
from offload.pack.shelf import KeptPack, kept_packs, size_of

LICENSES = ("LICENSE*", "LICENCE*", "COPYING*")


def profile(model: str, options: LoadOptions) -> dict[str, Any]:
    """What there is to tell about the model `model`, by name; what is unknown is None.

    Only a hub model that is not on this machine is asked for on the hub. Raises `OffloadError`.
    """
    packs = kept_packs(packs_folder(options.pack_dir))
    path, pack = _place(model, packs, options)
    if pack is None and not is_gguf(path):
        config = read_object(path / "config.json")
        bits: Any = stored_as(config)
    elif pack is not None:
        config, bits = read_object(path / "config.json"), _bits_of_parts(pack)
    else:
        from offload.model.formats.gguf_config import gguf_config

        config, bits = gguf_config(path).to_dict(), "gguf"
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    template, source = _template(path), _checkpoint_of(pack) if pack else path
    return {
        "model": pack.source if pack else model,
        "architecture": next(iter(config.get("architectures") or ()), config.get("model_type")),
        "parameters": _parameters(pack) if pack else None,
        "layers": text.get("num_hidden_layers"),
        "experts_per_layer": number(config, EXPERTS),
        "experts_per_token": number(config, CHOSEN),
        "context": text.get("max_position_embeddings"),
        "bits": bits,
        "bytes": size_of(path),
        "chat_template": template is not None,
        "tools": bool(template and re.search(r"\btools\b", template)),
        "thinking": bool(template and re.search(r"think", template)),
        "license": _license(source) if source else None,
        "path": str(path),
        "packs": [each.path.name for each in packs if not pack and each.origin.place == model],
    }


def _place(model: str, packs: list[KeptPack], options: LoadOptions) -> tuple[Path, KeptPack | None]:
    """The folder or GGUF file of `model`, and the pack if it is one."""
    path = user_path(model)
    named = {pack.path.name: pack for pack in packs}
    if not path.exists() and model in named:
        return named[model].path, named[model]
    if pack := KeptPack.read(path):
        return path, pack
    if (path / "config.json").is_file() or (is_gguf(path) and path.is_file()):
        return path, None
    if options.revision is None:
        for each in checkpoints(packs):
            if each.name == model:
                return each.path, None
    return find(model, options).folder, None


def _bits_of_parts(pack: KeptPack) -> dict[str, str]:
    recipe = Recipe.parse(pack.bits)
    told = {part: str(scheme.bits) for part, scheme in recipe.parts.items() if scheme.quantised}
    rules = {f"layers {r.first}-{r.last} {r.part}": str(r.scheme.bits) for r in recipe.layer_rules}
    return {**told, **rules, "rest": "as stored"}


def _parameters(pack: KeptPack) -> int:
    """How many weights the whole model has."""
    layouts = [
        sum(matrix["rows"] * matrix["columns"] for matrix in layout["matrices"])
        for layout in pack.manifest["layouts"]
    ]
    layers = pack.manifest["layers"]
    experts = sum(layer["num_experts"] * layouts[layer["layout"]] for layer in layers)
    return int(pack.manifest["dense_parameters"] + experts)


def _template(path: Path) -> str | None:
    """The chat template beside the weights at `path`; None if there is none."""
    if is_gguf(path):
        from offload.model.formats.gguf import GgufFile

        found = GgufFile(path).fields.get("tokenizer.chat_template")
        return str(found) if found else None
    return read_template(path)


def _checkpoint_of(pack: KeptPack) -> Path | None:
    """The folder of the checkpoint that `pack` was made from, if it is here."""
    here = (each.path for each in checkpoints([pack]) if each.name == pack.place)
    return next(here, None)


def _license(path: Path) -> str | None:
    """What the model card says of the license, or the file with its text; None without both."""
    if is_gguf(path):
        from offload.model.formats.gguf import GgufFile

        found = GgufFile(path).fields.get("general.license")
        return str(found) if found else None
    card = path / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        if match := re.search(r"^license(?:_name)?:\s*[\"']?([\w.+-]+)", head, re.MULTILINE):
            return match[1]
    files = (file for pattern in LICENSES for file in sorted(path.glob(pattern)))
    return next((f"see {file.name}" for file in files), None)
