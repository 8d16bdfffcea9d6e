"""`load`: from a name to a model that generates.

Knows: the order in which everything is found, made, opened and put together. Does not know: the
details of any of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cache.predictors import WITH_ROUTER
from offload import demo, sources
from offload.budget import (
    Budget,
    Memory,
    kv_cache_bytes,
    parse_bytes,
    parse_slots,
    workspace_bytes,
)
from offload.cpu_linear import OneTokenLinear, native_is_quicker
from offload.cuda_transfer import CudaTransfer
from offload.engine import Engine
from offload.errors import BudgetError, CheckpointError, PackError, SourceError
from offload.files import user_path
from offload.generation_config import check_generation_config
from offload.handle import Offload, Options
from offload.home import offload_home
from offload.make_pack import PackMaker, PackSource, fingerprint
from offload.progress import without_bars
from offload.quantized import QuantizedEmbedding, QuantizedLinear
from offload.recipe import AskedBits, Recipe, most_bits
from offload.residency import ALLOCATION, POLICY, PREDICTOR, Residency
from offload.skeleton import (
    BUILDING,
    IMPLEMENTATION,
    build_on_meta,
    described_experts,
    experts_modules,
    find_experts,
    find_router,
    install,
    model_class,
    own_config,
    without_packed_weights,
)
from offload.transfer import HostTransfer, Transfer
from offload.warm import read_hot
from quant.hqq import CPU
from quant.pack import REMAKE, VERSION, Pack, PackInfo, is_pack
from quant.record import view_record

logger = logging.getLogger("offload")


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    bits: str | None = None,
    expert_bits: int | None = None,
    dense_bits: int | None = None,
    group_size: int | None = None,
    expert_slots: int | str | None = None,
    vram: str | int | None = None,
    ram: str | int | None = None,
    policy: str = POLICY,
    allocation: str = ALLOCATION,
    lookahead: bool | None = None,
    predictor: str = PREDICTOR,
    layers_ahead: int = 1,
    warm_start: bool = True,
    trace: str | Path | None = None,
    context: int = 4096,
    pack_dir: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a Mixture-of-Experts model whose experts need not fit.

    `source` is a checkpoint folder, a .gguf file, a pack, a hub id, or "demo". A checkpoint is
    quantised into a pack the first time (under `pack_dir`, else `$OFFLOAD_HOME/packs`); a pack
    opens in seconds.

    - `expert_bits`, `dense_bits`: 2, 3, 4, 5, 6, 8 or 16 (as stored); `group_size` weights share a
      scale; None: a pack's own, else 4, 16, 64. `bits`: a preset or rules for everything, see
      `offload.recipe`; "fit": the most bits at which all experts are resident.
    - `expert_slots`: experts resident on the compute device, over all layers, a number or a share
      like "25%"; None: as many as `vram` (GPU) or `ram` (CPU), bytes or "20GiB", allow.
    - `policy`: who is evicted, lru, slru, lfru, lfu or fifo; `allocation`: which layer gives a
      slot, shared, global or quota.
    - `lookahead`: load what the next layers will probably want; None: while measured to pay.
      `predictor` guesses that: router, previous, transitions or union; `layers_ahead` 1 to 3.
    - `warm_start`: load first what was hot when the pack was last closed, in the background.
    - `trace`: a file to record in what the routers choose (`offload trace`).
    - `context`: tokens the KV cache is budgeted for, and the most a conversation may have.
    - `dtype`: of the computation; None: as the checkpoint's config says.

    Returns `(model, tokenizer)`; the tokenizer is None when the checkpoint has none. The model is a
    transformers model with one more attribute, `model.offload` (`stats()`, `close()`).
    Raises `OffloadError`, whose message says what to do.
    """
    asked = AskedBits(bits, expert_bits, dense_bits, group_size)
    residency = Residency(policy, allocation, lookahead, predictor, layers_ahead, warm_start)
    place = find_device(device)
    ram_bytes = parse_bytes(ram)
    plan = Planner(
        place,
        Memory.of(place, vram, ram),
        dtype,
        expert_slots,
        residency,
        context,
    )
    path = find_or_make_pack(
        str(source),
        asked.recipe(),
        pack_dir=pack_dir,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        device=place,
        plan=plan,
    )
    with contextlib.ExitStack() as undo:  # what was begun, should the rest fail
        pack = Pack(path)
        undo.callback(pack.close)
        check_generation_config(path)
        _check_recipe(pack, asked)
        config = sources.read_config(str(source), path, trust_remote_code=trust_remote_code)
        options = plan(pack.info, config)
        tokenizer = _tokenizer(path, trust_remote_code)
        cls = model_class(config, str(path), trust_remote_code)
        model = _load_dense(pack, own_config(config, cls), cls, options)
        transfer = _transfer(pack, options, ram_bytes)
        undo.callback(transfer.close)
        _connect(model, pack, options, transfer)
        undo.callback(model.offload.close)
        if trace is not None:
            model.offload.record(trace)
        if warm_start:
            hot = read_hot(pack.path, pack.info)
            model.offload.engine.warm((layer, expert) for layer, expert, _ in hot)
        undo.pop_all()
    return model, tokenizer


@dataclass(frozen=True)
class Planner:
    """Resolves what was asked to numbers, before anything is made or allocated."""

    device: torch.device
    memory: Memory
    dtype: torch.dtype | None = None
    slots: int | str | None = None
    residency: Residency = field(default_factory=Residency)
    context: int = 4096

    def __call__(self, info: PackInfo, config: PreTrainedConfig) -> Options:
        """How a pack like `info` would be run. Raises `BudgetError`."""
        compute = self.dtype or _config_dtype(config)
        budget = Budget(
            self.memory.device,
            dense=info.dense_bytes(compute.itemsize),
            kv_cache=kv_cache_bytes(config, self.context, compute),
            workspace=workspace_bytes(config, info, self.context),
            slot=info.slot_bytes,
            total_experts=info.total_experts,
        )
        slots = budget.slots(parse_slots(self.slots, info.total_experts))
        return Options(self.device, compute, slots, self.residency, self.context)


def _check_recipe(pack: Pack, asked: AskedBits) -> None:
    """A pack is as it was made: asking for something else is an error, not ignored."""
    made = Recipe.parse(pack.info.bits)
    if (wanted := asked.on(made)) != made:
        raise SourceError(
            f"{pack.path} is a pack with {made.name}, not {wanted.name}: leave the option out, or "
            "name the checkpoint to make another pack"
        )


def find_device(name: str | torch.device | None) -> torch.device:
    """The compute device called `name`; None: a GPU if there is one. Raises `BudgetError`."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BudgetError(
            f"there is no device {name!r}: name cpu, cuda, or one like cuda:1"
        ) from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= gpus
    ):
        raise BudgetError(
            f"there is no device {str(name)!r} here: torch sees the CPU and {gpus} CUDA GPUs"
        )
    return device


def set_threads(count: int) -> None:
    """Compute with `count` CPU threads."""
    torch.set_num_threads(count)


def find_or_make_pack(
    source: str,
    recipe: Recipe | None,
    *,
    pack_dir: str | Path | None = None,
    destination: Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
    plan: Planner | None = None,
) -> Path:
    """The folder of the pack for `source`, made if need be, at `destination` or under `pack_dir`.

    Weights are quantised on `device`. What `plan` refuses is not made. A `recipe` of None is the
    one that fits what `plan` (then not None) has.
    """
    if source == sources.DEMO:
        found = sources.Source(sources.DEMO, demo.checkpoint(), is_pack=False)
    else:
        found = sources.find(
            source,
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
        )
    if found.is_pack:
        if destination is not None:
            raise SourceError(f"{source} is a pack already: name the checkpoint it was made from")
        return found.folder
    check_generation_config(found.folder)
    config = sources.read_config(found.name, found.folder, trust_remote_code=trust_remote_code)
    cls = model_class(config, str(found.folder), trust_remote_code)
    model = build_on_meta(own_config(config, cls), cls)
    experts = find_experts(model)
    mark = found.commit or fingerprint(found.folder)

    def place(recipe: Recipe) -> Path:
        return destination or pack_path(found.name, mark, recipe, pack_dir)

    if recipe is not None and destination is None and is_pack(place(recipe)):
        return place(recipe)
    sources.fetch_weights(found, local_files_only=local_files_only)
    maker = PackMaker(PackSource(found.name, mark, found.folder), model, experts)
    if recipe is None:
        assert plan is not None, "what fits depends on a plan"
        recipe = _fitting_recipe(maker, plan, config, place)
    if plan is not None:
        plan(maker.describe(recipe), config)
    maker.make(place(recipe), recipe, device)
    return place(recipe)


def _fitting_recipe(
    maker: PackMaker, plan: Planner, config: PreTrainedConfig, place: Callable[[Recipe], Path]
) -> Recipe:
    """The recipe for what `plan` has: the most bits at which all experts are resident, else in RAM.

    A pack that was made before is taken while all of it is resident: what is free changes from one
    start to the next, and quantising takes long.
    """
    everything = replace(plan, slots=None)

    def resident(recipe: Recipe) -> bool:
        info = maker.describe(recipe)
        try:
            return everything(info, config).slots >= info.total_experts
        except BudgetError:
            return False

    def in_ram(recipe: Recipe) -> bool:  # without a GPU that is what resident means
        host = plan.memory.ram if plan.device.type != "cpu" else 0
        return maker.describe(recipe).expert_bytes < host

    def made(recipe: Recipe) -> bool:
        return is_pack(place(recipe)) and resident(recipe)

    chosen, best = most_bits(made, resident, in_ram), most_bits(resident, in_ram)
    space = f"{plan.memory.device / 2**30:.1f} GiB"
    if chosen != best:
        logger.warning("%s is here and fits %s; --bits %s would too", chosen.name, space, best.name)
    elif resident(chosen):
        logger.warning("bits that fit %s: %s", space, chosen.name)
    else:
        logger.warning("no bits fit %s: %s, and experts are streamed", space, chosen.name)
    return chosen


def pack_path(name: str, mark: str, recipe: Recipe, pack_dir: str | Path | None) -> Path:
    """Where the pack of a model goes: its name says what it was made from and how."""
    whole = re.sub(r"[^\w.-]+", "--", name).encode()
    slug = whole[:100].decode(errors="ignore")  # a file's name has 255 bytes at most
    folder = user_path(pack_dir) if pack_dir else offload_home() / "packs"
    how = re.sub(r"[^\w.-]+", "-", str(recipe).replace("experts=", "e").replace("attention=", "a"))
    if len(how) > 40:
        how = how[:30] + "-" + hashlib.sha256(str(recipe).encode()).hexdigest()[:8]
    return folder / f"{slug}-{how}-v{VERSION}-{mark[:12]}"


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _load_dense(
    pack: Pack, config: PreTrainedConfig, cls: type[PreTrainedModel], options: Options
) -> PreTrainedModel:
    """The model with everything in place but its experts."""
    if any(len(dense.modules) > 1 for dense in pack.info.dense):
        config = _untied(config)  # one record serves both: there are no parameters to tie
    quantised = [path for dense in pack.info.dense for path in dense.modules]
    with BUILDING, without_bars():
        loaded: tuple[PreTrainedModel, dict[str, Any]]
        loaded = without_packed_weights(cls, quantised).from_pretrained(
            pack.path,
            config=config,
            dtype=options.dtype,
            device_map={"": options.device},
            experts_implementation=IMPLEMENTATION,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of its model ({missing[0]}, ...): fetch "
            f"it again"
        )
    if wrong := info["mismatched_keys"]:
        raise CheckpointError(f"config.json and weights do not match: {sorted(wrong)[0]}")
    for dense, record in pack.dense_records():
        layout = pack.info.dense_layout(dense)
        view = view_record(record.to(options.device), layout)["weight"]
        for path in dense.modules:
            module = model.get_submodule(path)
            assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
            if module.shape != (view.layout.rows, view.layout.columns):
                raise PackError(
                    f"{pack.path} has a matrix of another shape than the model's {path}: {REMAKE}"
                )
            module.bind(view, options.dtype)
    return model.requires_grad_(False)  # slots are reused: there is nothing to train


def _untied(config: PreTrainedConfig) -> PreTrainedConfig:
    copy = deepcopy(config)
    for part in (copy, copy.get_text_config()):
        part.tie_word_embeddings = False
    return copy


def _connect(model: PreTrainedModel, pack: Pack, options: Options, transfer: Transfer) -> None:
    """Put the engine behind the model's experts."""
    info = pack.info
    asked = [
        (module.path, module.num_experts, [matrix.shape for matrix in module.matrices])
        for module in described_experts(model)
    ]
    given = [
        (layer.module, layer.num_experts, [m.spec.shape for m in info.layout_of(i).matrices])
        for i, layer in enumerate(info.layers)
    ]
    if asked != given:  # kernels believe these sizes
        raise PackError(
            f"{pack.path} was made for other experts modules than transformers "
            f"{transformers.__version__} has: {REMAKE}"
        )
    residency = options.residency
    cache = residency.cache(options.slots, len(info.layers))
    everything_fits = options.slots >= info.total_experts
    ahead = residency.ahead(everything_fits)
    engine = Engine(info, cache, transfer, residency.balance(), ahead)
    for module in experts_modules(model):
        install(module, engine.add_layer(module))
    engine.watch_calls(model)
    if ahead.layers and ahead.predictor in WITH_ROUTER:
        engine.watch_routers(model, routers(model, info))
    single = options.device.type == "cpu" and options.dtype == torch.bfloat16
    one_token = OneTokenLinear(model) if single and native_is_quicker() else None
    model.offload = Offload(pack, engine, options, one_token, _top_k(model))
    weakref.finalize(model, model.offload.close)  # a model that is dropped frees what it held


def routers(model: PreTrainedModel, info: PackInfo) -> list[torch.nn.Module | None]:
    """The router of each MoE layer, None where it cannot be told."""
    return [find_router(model, layer.module, layer.num_experts) for layer in info.layers]


def _top_k(model: PreTrainedModel) -> int:
    """Experts a token, as the config says under one of its names; 0 when it does not."""
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
    return next((k for name in names if isinstance(k := getattr(config, name, None), int)), 0)


def _transfer(pack: Pack, options: Options, ram: int | None) -> Transfer:
    if options.device.type == "cpu":
        return HostTransfer(pack, options.slots)
    return CudaTransfer(pack, options.slots, options.device, ram)


def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a tokenizer class raises on what is in its files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {path} cannot be used ({reason}): fetch it again, or pass "
            "--trust-remote-code if it brings code that you trust"
        ) from None
