"""`load`: from a name to a model that generates.

Knows: the order in which everything is found, made, opened and put together. Does not know: the
details of any of it.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cache.cache import ExpertCache
from cache.lookahead import LookaheadBalance
from cache.policy import POLICIES
from offload import demo, sources
from offload.budget import (
    Budget,
    available_bytes,
    kv_cache_bytes,
    parse_bytes,
    parse_slots,
    workspace_bytes,
)
from offload.cpu_linear import OneTokenLinear, native_is_quicker
from offload.cuda_transfer import CudaTransfer
from offload.engine import Engine
from offload.errors import BudgetError, CheckpointError, SourceError, UnsupportedModelError
from offload.handle import Offload, Options
from offload.home import offload_home
from offload.make_pack import PackSource, Recipe, fingerprint, make_pack
from offload.progress import without_bars
from offload.skeleton import (
    IMPLEMENTATION,
    build_on_meta,
    experts_modules,
    find_experts,
    find_router,
    install,
    model_class,
    own_config,
    without_experts,
)
from offload.transfer import HostTransfer, Transfer
from quant.pack import Pack, PackInfo, is_pack


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    expert_bits: int | None = None,
    dense_bits: int | None = None,
    group_size: int | None = None,
    expert_slots: int | str | None = None,
    vram: str | int | None = None,
    ram: str | int | None = None,
    policy: str = "lru",
    lookahead: bool | None = None,
    context: int = 4096,
    pack_dir: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a Mixture-of-Experts model whose experts need not fit.

    `source` is a checkpoint folder, a pack, a hub id, or "demo". A checkpoint is quantised into a
    pack the first time (under `pack_dir`, else `$OFFLOAD_HOME/packs`); a pack opens in seconds.

    - `expert_bits` 4, 8 or 16 (as stored), `group_size` weights share a scale, `dense_bits` 16;
      None: a pack's own, else 4, 64, 16.
    - `expert_slots`: experts resident on the compute device, over all layers, a number or a share
      like "25%"; None: as many as `vram` (GPU) or `ram` (CPU), bytes or "20GiB", allow.
    - `lookahead`: load what the next layer's router will probably want; None: while measured to
      pay.
    - `context`: tokens the KV cache is budgeted for, and the most a conversation may have.
    - `dtype`: of the computation; None: as the checkpoint's config says.

    Returns `(model, tokenizer)`; the tokenizer is None when the checkpoint has none. The model is a
    transformers model with one more attribute, `model.offload` (`stats()`, `close()`).
    Raises `OffloadError`, whose message says what to do.
    """
    recipe = Recipe.asked(expert_bits, dense_bits, group_size)
    if policy not in POLICIES:
        raise UnsupportedModelError(
            f"there is no policy {policy!r}: choose {' or '.join(POLICIES)}"
        )
    place = find_device(device)
    ram_bytes = parse_bytes(ram)
    available = available_bytes(place, parse_bytes(vram), ram_bytes)

    def plan(info: PackInfo, config: PreTrainedConfig) -> Options:
        """Everything resolved to numbers, before anything is made or allocated."""
        compute = dtype or _config_dtype(config)
        budget = Budget(
            available,
            dense=info.dense_parameters * compute.itemsize,
            kv_cache=kv_cache_bytes(config, context, compute),
            workspace=workspace_bytes(config, info, context),
            slot=info.slot_bytes,
            total_experts=info.total_experts,
        )
        slots = budget.slots(parse_slots(expert_slots, info.total_experts))
        return Options(place, compute, slots, policy, lookahead, context)

    path = find_or_make_pack(
        str(source),
        recipe,
        pack_dir=pack_dir,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        check=plan,
    )
    with contextlib.ExitStack() as undo:  # what was begun, should the rest fail
        pack = Pack(path)
        undo.callback(pack.close)
        _check_recipe(pack, expert_bits, dense_bits, group_size)
        config = sources.read_config(str(source), path, trust_remote_code=trust_remote_code)
        options = plan(pack.info, config)
        tokenizer = _tokenizer(path, trust_remote_code)
        cls = model_class(config, str(path), trust_remote_code)
        model = _load_dense(path, own_config(config, cls), cls, options)
        transfer = _transfer(pack, options, ram_bytes)
        undo.callback(transfer.close)
        _connect(model, pack, options, transfer)
        undo.pop_all()
    return model, tokenizer


def _check_recipe(
    pack: Pack, expert_bits: int | None, dense_bits: int | None, group_size: int | None
) -> None:
    """A pack is as it was made: asking for something else is an error, not ignored."""
    asked = {"expert_bits": expert_bits, "dense_bits": dense_bits, "group_size": group_size}
    for name, value in asked.items():
        if value is not None and value != getattr(pack.info, name):
            raise SourceError(
                f"{pack.path} is a pack with {name} {getattr(pack.info, name)}, not {value}: leave "
                "the option out, or name the checkpoint to make another pack"
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
    recipe: Recipe,
    *,
    pack_dir: str | Path | None = None,
    destination: Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    check: Callable[[PackInfo, PreTrainedConfig], object] | None = None,
) -> Path:
    """The folder of the pack for `source`, made if need be, at `destination` or under `pack_dir`.

    `check` is called, and may raise, when all about the pack is known and before it is made.
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
    config = sources.read_config(found.name, found.folder, trust_remote_code=trust_remote_code)
    cls = model_class(config, str(found.folder), trust_remote_code)
    model = build_on_meta(own_config(config, cls), cls)
    experts = find_experts(model)
    mark = found.commit or fingerprint(found.folder)
    path = destination or pack_path(found.name, mark, recipe, pack_dir)
    if destination is None and is_pack(path):
        return path
    sources.fetch_weights(found, local_files_only=local_files_only)

    def check_pack(info: PackInfo) -> None:
        if check is not None:
            check(info, config)

    make_pack(path, PackSource(found.name, mark, found.folder), model, experts, recipe, check_pack)
    return path


def pack_path(name: str, mark: str, recipe: Recipe, pack_dir: str | Path | None) -> Path:
    """Where the pack of a model goes: its name says what it was made from and how."""
    slug = re.sub(r"[^\w.-]+", "--", name)
    folder = Path(pack_dir).expanduser() if pack_dir else offload_home() / "packs"
    return (
        folder
        / f"{slug}-e{recipe.expert_bits}-d{recipe.dense_bits}-g{recipe.group_size}-{mark[:12]}"
    )


def _config_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _load_dense(
    path: Path, config: PreTrainedConfig, cls: type[PreTrainedModel], options: Options
) -> PreTrainedModel:
    with without_bars():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = without_experts(cls).from_pretrained(
            path,
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
    return model.requires_grad_(False)  # slots are reused: there is nothing to train


def _connect(model: PreTrainedModel, pack: Pack, options: Options, transfer: Transfer) -> None:
    """Put the engine behind the model's experts."""
    info = pack.info
    modules = experts_modules(model)
    paths = [name for name, module in model.named_modules() if module in modules]
    if paths != [layer.module for layer in info.layers]:
        raise SourceError(
            f"{pack.path} was made for other experts modules than transformers "
            f"{transformers.__version__} has: delete the folder and load the model again to remake "
            f"it"
        )
    cache = ExpertCache(options.slots, len(info.layers), POLICIES[options.policy]())
    balance = LookaheadBalance() if options.lookahead is None else None
    engine = Engine(info, cache, transfer, balance)
    for module in modules:
        install(module, engine.add_layer(module))
    everything_fits = options.slots >= info.total_experts  # then nothing is ever loaded twice
    if options.lookahead is not False and not everything_fits:
        routers = [find_router(model, layer.module, layer.num_experts) for layer in info.layers]
        engine.watch_routers(model, routers)
    single = options.device.type == "cpu" and options.dtype == torch.bfloat16
    one_token = OneTokenLinear(model) if single and native_is_quicker() else None
    model.offload = Offload(pack, engine, options, one_token)
    weakref.finalize(model, model.offload.close)  # a model that is dropped frees what it held


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
