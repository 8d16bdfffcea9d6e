"""A model's shapes without its weights, from a manifest, from headers of files or from a config."""

from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from offload.errors import CheckpointError
from offload.files import read_object
from offload.model import demo, names, sources
from offload.model.checkpoint import Checkpoint, ExpectedSource
from offload.model.layout import INDEX, SINGLE, is_gguf, weight_files
from offload.model.seam import (
    build_on_meta,
    chosen_experts,
    find_experts,
    head_is_tied,
    model_class,
)
from offload.model.sources import open_weights
from offload.options import LoadOptions
from offload.pack.describe import PackSource
from offload.pack.recipe import Recipe
from offload.quant.pack import PackInfo, read_info


@dataclass(frozen=True)
class Outline:
    """A model whose packs can be described without its weights."""

    name: str
    config: PreTrainedConfig
    model: PreTrainedModel  # the whole model, on the meta device
    made: PackInfo | None  # the manifest, if it is a pack already
    top_k: int
    # The module of the token table, of which a token reads one row; None if it is the head too.
    table: str | None
    table_weights: int
    download_bytes: int | None  # of weights that are not here; None if they are, or if unknown
    from_config: bool  # dtypes are those of the config, because no weight file's header was read
    source: PackSource

    def describe(self, recipe: Recipe) -> PackInfo:
        """The manifest of the pack that `recipe` would make. Raises `RecipeError`."""
        if self.made is not None and Recipe.parse(self.made.bits) == recipe:
            return self.made
        return self.source.describe(recipe)

    def read_bytes(self, info: PackInfo, itemsize: int) -> int:
        """Bytes of the weights that each token reads beside the experts.

        `itemsize`: bytes of a weight that is kept as stored, when it is computed with.
        """
        of_table = 0
        if self.table is not None:
            records = (info.dense_layout(d) for d in info.dense if self.table in d.modules)
            record = next(records, None)
            of_table = record.record_bytes if record else self.table_weights * itemsize
        return info.dense_bytes(itemsize) - of_table

    def active_parameters(self, info: PackInfo) -> int:
        """Weights that a token is multiplied with."""
        chosen = sum(self.top_k * info.layout_of(i).weights for i in range(len(info.layers)))
        return chosen + info.dense_parameters - self.table_weights


def outline(name: str, options: LoadOptions) -> Outline:
    """The model `name`: a pack, a folder, a GGUF file, a hub id or the demo.

    Of a hub model only config.json and the weights' index are fetched, and nothing of one whose
    sizes `offload.model.known` has. Raises `OffloadError`.
    """
    trusts, folder, made = options.trust_remote_code, None, None
    found = known = None
    if name == names.DEMO and not (demo.demo_folder() / "config.json").is_file():
        config = demo.planned_config()
    elif known := names.find_known(name, options):
        config = CONFIG_MAPPING[known.model_type](**known.values, dtype="bfloat16")
    else:
        found = names.find(name, options, names.SHAPE_FILES)
        name, folder = found.name, found.folder
        config = sources.read_config(name, folder, trust_remote_code=trusts)
        made = read_info(folder) if found.is_pack else None
    cls = model_class(config, str(folder or name), trusts)
    model = build_on_meta(config, cls)
    experts = find_experts(model)
    here = folder is not None and made is None and _has_weights(folder)
    source = open_weights(folder, model) if here and folder else ExpectedSource(model)
    checkpoint = Checkpoint(source, model, experts)
    top_k = chosen_experts(config)
    if not top_k:
        raise CheckpointError(f"{name}: its config does not say how many experts a token uses")
    table, weights = _table(model)
    return Outline(
        name,
        config,
        model,
        made,
        top_k,
        table,
        weights,
        known.download_bytes if known else _download_bytes(found, here),
        not here,
        PackSource(name, "", checkpoint, model, experts),
    )


def _has_weights(folder: Path) -> bool:
    """Whether all weight files of a checkpoint are here, readable or not."""
    if is_gguf(folder):
        return True
    if (folder / INDEX).is_file():
        try:
            return bool(weight_files(folder))
        except CheckpointError:
            return False
    known = (SINGLE, "*.bin", "*.pt", "*.gguf")
    return any(True for pattern in known for _ in folder.glob(pattern))


def _download_bytes(found: names.FoundModel | None, here: bool) -> int | None:
    """Bytes of the weights that are not here; None if they are here, or if that is unknown."""
    if found is not None and found.repository is not None:
        return names.missing_bytes(found) or None
    return None if here or found is None else _index_bytes(found.folder)


def _index_bytes(folder: Path) -> int | None:
    """Bytes of a checkpoint's weights, if its index tells them."""
    if not (folder / INDEX).is_file():
        return None
    said = read_object(folder / INDEX).get("metadata")
    size = said.get("total_size") if isinstance(said, dict) else None
    return size if type(size) is int and size > 0 else None


def _table(model: PreTrainedModel) -> tuple[str | None, int]:
    """The module of the token table and its number of weights; (None, 0) if it is the head too."""
    table = model.get_input_embeddings()
    if table is None or head_is_tied(model):
        return None, 0
    path = next(path for path, module in model.named_modules() if module is table)
    return path, sum(p.numel() for p in table.parameters())
