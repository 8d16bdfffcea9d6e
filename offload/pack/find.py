"""Finds the pack of a model, or has it made from the model's checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import PreTrainedConfig

from offload.budget.resolve import Resolver
from offload.errors import BudgetError, SourceError
from offload.files import existing, offload_home, packs_folder
from offload.model import names, sources
from offload.model.checkpoint import Checkpoint, ExpectedSource
from offload.model.layout import is_gguf
from offload.model.names import FoundModel
from offload.model.seam import build_on_meta, find_experts, model_class
from offload.model.sources import check_generation_config
from offload.model.tokenizer import load_tokenizer
from offload.options import LoadOptions
from offload.pack.companions import follow, made_from
from offload.pack.describe import PackSource
from offload.pack.fingerprint import fingerprint, former_fingerprint, stamp
from offload.pack.make import check_room, make_pack
from offload.pack.recipe import AskedBits, Recipe, most_bits
from offload.pack.shelf import KeptPack, Origin, kept_packs, new_place
from offload.quant.hqq import CPU
from offload.quant.pack import Pack
from offload.units import gib

logger = logging.getLogger("offload")


def find_or_make_pack(
    source: str,
    options: LoadOptions,
    *,
    destination: Path | None = None,
    device: torch.device = CPU,
    resolver: Resolver | None = None,
) -> Path:
    """The folder of the pack for `source`, made if need be, at `destination` or where packs are.

    A pack of the same weights is found whatever its name is. Weights are quantised on `device`. A
    pack that does not fit, as `resolver` tells, is not made; `--bits fit` needs a `resolver`.
    """
    recipe, trusts = AskedBits.of(options).recipe(), options.trust_remote_code
    found = names.find(source, options)
    if found.is_pack:
        if destination is not None:
            raise SourceError(f"{source} is a pack already: name the checkpoint it was made from")
        if (own := KeptPack.read(found.folder)) and own.origin != Origin():
            own.origin.write(found.folder)  # tells when the pack was used
        return found.folder
    check_generation_config(found.folder)
    config = sources.read_config(found.name, found.folder, trust_remote_code=trusts)
    model = build_on_meta(config, model_class(config, str(found.folder), trusts))
    experts = find_experts(model)
    modules = [(module.path, module.num_experts) for module in experts]
    folder = packs_folder(options.pack_dir)
    if destination is None:
        kept = kept_packs(folder)
    else:
        kept = [pack] if (pack := KeptPack.read(destination)) else []
    kept = [pack for pack in kept if pack.experts == modules]
    mark = found.commit or stamp(found.folder)
    mine = [pack for pack in kept if mark in pack.stamps]
    if not mine and any(pack.origin.blobs for pack in kept if pack.origin.place == found.name):
        blobs = names.weight_blobs(found)
        mine = [pack for pack in kept if blobs and pack.origin.blobs == blobs]
    if (pack := _with_bits(mine, recipe)) is not None:
        return _used(pack, found, mark, next((p.weights for p in mine if p.weights), ""))
    if not is_gguf(found.folder):
        load_tokenizer(found.folder, trusts)  # raises before weights are fetched or quantised
    if found.commit is not None and recipe is not None and config.dtype is not None:
        expected = Checkpoint(ExpectedSource(model), model, experts)
        info = PackSource(found.name, "", expected, model, experts).describe(recipe)
        dense_bytes = info.dense_bytes(config.dtype.itemsize)
        place, cache = existing(destination or folder), existing(Path(constants.HF_HUB_CACHE))
        same = place.stat().st_dev == cache.stat().st_dev
        missing = (names.missing_bytes(found) or 0) * same  # takes room of the pack's disk, too
        what = "the pack, with the download," if missing else "the pack"
        check_room(place, info.expert_bytes + dense_bytes + missing, what)
        if resolver is not None:
            resolver.fit(info, config, model)
    names.fetch_weights(found)
    checkpoint = Checkpoint(sources.open_weights(found.folder, model), model, experts)
    weights = next((pack.weights for pack in mine if pack.weights), "")
    weights = weights or fingerprint(found.folder)
    mine += [pack for pack in kept if pack.weights == weights and pack not in mine]
    if any(not pack.weights for pack in kept):
        former = former_fingerprint(found.folder)
        mine += [pack for pack in kept if former in pack.stamps and pack not in mine]
    subject = PackSource(found.name, weights, checkpoint, model, experts)
    if recipe is None:
        assert resolver is not None, "what fits depends on the machine"
        recipe = _fitting_recipe(subject, resolver, config, {pack.bits for pack in mine})
    if (pack := _with_bits(mine, recipe)) is not None:
        return _used(pack, found, mark, weights)
    if resolver is not None:
        resolver.fit(subject.describe(recipe), config, model)
    path = destination or new_place(folder, found.name, recipe, weights)
    make_pack(path, subject, found.folder, recipe, device)
    if (made := KeptPack.read(path)) is not None:
        _note(made, found, mark, weights)
    return path


def _with_bits(packs: list[KeptPack], recipe: Recipe | None) -> KeptPack | None:
    """The first of `packs` that was made by `recipe`."""
    return next((pack for pack in packs if recipe and pack.bits == str(recipe)), None)


def _used(pack: KeptPack, found: FoundModel, mark: str, weights: str) -> Path:
    """The folder of `pack`, which is now used for the checkpoint `found` and follows its files."""
    follow(pack, found.folder, whole=found.commit is None)
    _note(pack, found, mark, weights)
    return pack.path


def _note(pack: KeptPack, found: FoundModel, mark: str, weights: str) -> None:
    """Note beside `pack` where its checkpoint is."""
    named = found.commit is not None or found.folder.is_relative_to(offload_home() / names.DEMO)
    blobs = names.weight_blobs(found)
    pack.note(
        mark,
        place=found.name if named else str(found.folder.resolve()),
        weights=weights,
        blobs=blobs or pack.origin.blobs,
        companions=made_from(found.folder),
    )


def _fitting_recipe(
    source: PackSource,
    resolver: Resolver,
    config: PreTrainedConfig,
    kept: set[str],
) -> Recipe:
    """The recipe with the most bits at which all experts are resident, else at which they fit RAM.

    A pack whose recipe is in `kept` is preferred while all of its experts are resident: free memory
    differs from one start to the next, and quantising takes long.
    """
    everything = replace(resolver, options=replace(resolver.options, expert_slots=None))
    device, memory = resolver.place.device, resolver.place.memory

    def resident(recipe: Recipe) -> bool:
        info = source.describe(recipe)
        try:
            return everything.fit(info, config, source.model).slots >= info.total_experts
        except BudgetError:
            return False

    def in_ram(recipe: Recipe) -> bool:  # without a GPU, `resident` decides this
        host = memory.ram if device.type != "cpu" else 0
        return source.describe(recipe).expert_bytes < host

    def made(recipe: Recipe) -> bool:
        return str(recipe) in kept and resident(recipe)

    chosen, best = most_bits(made, resident, in_ram), most_bits(resident, in_ram)
    space = gib(memory.device, 1)
    if chosen != best:
        logger.warning("%s is here and fits %s; --bits %s would too", chosen.name, space, best.name)
    elif resident(chosen):
        logger.warning("bits that fit %s: %s", space, chosen.name)
    else:
        logger.warning("even q2 does not fit %s: experts will be streamed", space)
    return chosen


def check_recipe(pack: Pack, asked: AskedBits) -> None:
    """Raise `SourceError` when `asked` is not how `pack` was made."""
    made = Recipe.parse(pack.info.bits)
    if (wanted := asked.on(made)) != made:
        raise SourceError(
            f"{pack.path} is a pack with {made.name}, not {wanted.name}: leave the option out, or "
            "name the checkpoint to make another pack"
        )
