"""Finds the pack of a model, or has it made from the model's checkpoint."""

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from offload.budget.resolve import Resolver
from offload.errors import BudgetError, SourceError
from offload.files import offload_home, user_path
from offload.model import sources
from offload.model.checkpoint import Checkpoint
from offload.model.seam import build_on_meta, find_experts, model_class
from offload.model.sources import check_generation_config
from offload.options import LoadOptions
from offload.pack.describe import PackSource
from offload.pack.make import fingerprint, make_pack
from offload.pack.recipe import AskedBits, Recipe, most_bits
from offload.quant.hqq import CPU
from offload.quant.pack import VERSION, Pack, is_pack
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

    Weights are quantised on `device`. A pack that does not fit, as `resolver` tells, is not made;
    `--bits fit` needs a `resolver`.
    """
    recipe, trusts = AskedBits.of(options).recipe(), options.trust_remote_code
    found = sources.find(source, options)
    if found.is_pack:
        if destination is not None:
            raise SourceError(f"{source} is a pack already: name the checkpoint it was made from")
        return found.folder
    check_generation_config(found.folder)
    config = sources.read_config(found.name, found.folder, trust_remote_code=trusts)
    model = build_on_meta(config, model_class(config, str(found.folder), trusts))
    experts = find_experts(model)
    mark = found.commit or fingerprint(found.folder)

    def place(recipe: Recipe) -> Path:
        return destination or pack_path(found.name, mark, recipe, options.pack_dir)

    if recipe is not None and destination is None and is_pack(place(recipe)):
        return place(recipe)
    sources.fetch_weights(found, local_files_only=options.local_files_only)
    checkpoint = Checkpoint(sources.open_weights(found.folder, model), model, experts)
    subject = PackSource(found.name, mark, checkpoint, model, experts)
    if recipe is None:
        assert resolver is not None, "what fits depends on the machine"
        recipe = _fitting_recipe(subject, resolver, config, place)
    if resolver is not None:
        resolver.fit(subject.describe(recipe), config, model)
    make_pack(place(recipe), subject, found.folder, recipe, device)
    return place(recipe)


def _fitting_recipe(
    source: PackSource,
    resolver: Resolver,
    config: PreTrainedConfig,
    place: Callable[[Recipe], Path],
) -> Recipe:
    """The recipe with the most bits at which all experts are resident, else at which they fit RAM.

    A pack that was made before is preferred while all of its experts are resident: free memory
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
        return is_pack(place(recipe)) and resident(recipe)

    chosen, best = most_bits(made, resident, in_ram), most_bits(resident, in_ram)
    space = gib(memory.device, 1)
    if chosen != best:
        logger.warning("%s is here and fits %s; --bits %s would too", chosen.name, space, best.name)
    elif resident(chosen):
        logger.warning("bits that fit %s: %s", space, chosen.name)
    else:
        logger.warning("even q2 does not fit %s: experts will be streamed", space)
    return chosen


def pack_path(name: str, mark: str, recipe: Recipe, pack_dir: str | Path | None) -> Path:
    """The folder of a model's pack, whose name says what the pack was made from and how."""
    whole = re.sub(r"[^\w.-]+", "--", name).encode()
    slug = whole[:100].decode(errors="ignore")  # a file's name has 255 bytes at most
    folder = user_path(pack_dir) if pack_dir else offload_home() / "packs"
    how = re.sub(r"[^\w.-]+", "-", str(recipe).replace("experts=", "e").replace("attention=", "a"))
    if len(how) > 40:
        how = how[:30] + "-" + hashlib.sha256(str(recipe).encode()).hexdigest()[:8]
    return folder / f"{slug}-{how}-v{VERSION}-{mark[:12]}"


def check_recipe(pack: Pack, asked: AskedBits) -> None:
    """Raise `SourceError` when `asked` is not how `pack` was made."""
    made = Recipe.parse(pack.info.bits)
    if (wanted := asked.on(made)) != made:
        raise SourceError(
            f"{pack.path} is a pack with {made.name}, not {wanted.name}: leave the option out, or "
            "name the checkpoint to make another pack"
        )
