"""`load`: from a name to a model that generates.

Knows: the order in which everything is found, made, opened and put together. Does not know: the
details of any of it.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from offload.budget.blocks import Layers, device_of
from offload.budget.budget import hold_vram
from offload.budget.resolve import Gpus, Planner, find_place
from offload.cache.guesses import WITH_ROUTER
from offload.engine.cpu_linear import OneTokenLinear, native_is_quicker
from offload.engine.crossing import Crossing
from offload.engine.engine import make_engine
from offload.engine.handle import Offload
from offload.engine.warm import read_hot
from offload.errors import CheckpointError, UnsupportedModelError
from offload.model import sources
from offload.model.quantized import QuantizedEmbedding, QuantizedLinear
from offload.model.seam import (
    BUILDING,
    IMPLEMENTATION,
    build_on_meta,
    chosen_experts,
    described_experts,
    experts_modules,
    find_router,
    install,
    model_class,
    own_config,
    without_packed_weights,
)
from offload.model.sources import check_generation_config
from offload.options import Card, Options
from offload.pack.find import check_recipe, find_or_make_pack
from offload.pack.recipe import AskedBits
from offload.progress import without_bars
from offload.quant.errors import PackError
from offload.quant.pack import REMAKE, Pack, PackInfo
from offload.quant.record import view_record
from offload.residency import ALLOCATION, POLICY, PREDICTOR, Residency
from offload.transfer.base import Transfer
from offload.transfer.cards import transfer_of
from offload.units import UBATCH, parse_bytes

logger = logging.getLogger("offload")

ENGINES = ("auto", "host", "device")


def check_engine(name: str) -> None:
    """Raise `UnsupportedModelError` for a name that is none."""
    if name not in ENGINES:
        raise UnsupportedModelError(f"there is no engine {name!r}: choose {' or '.join(ENGINES)}")


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    gpus: Gpus | None = None,
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
    engine: str = "auto",
    trace: str | Path | None = None,
    context: int = 4096,
    ubatch_size: int = UBATCH,
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
    - `gpus`: cards that share the model, like "0,1": layers by free memory, a cache and a link
      each; `vram` is then for each card, or one size for each like "20GiB,10GiB".
    - `policy`: who is evicted, lru, slru, lfru, lfu or fifo; `allocation`: which layer gives a
      slot, shared, global or quota.
    - `lookahead`: load what the next layers will probably want; None: while measured to pay, where
      the host plans (on the device a guess costs the host nothing, and is not weighed: as True).
      `predictor` guesses that: router, previous, transitions or union; `layers_ahead` 1 to 3.
    - `warm_start`: load first what was hot when the pack was last closed, in the background.
    - `engine`: who plans a token's steps: host, device (CUDA: without waiting for the host, see
      docs/structure.md), or auto: the device where it can.
    - `trace`: a file to record in what the routers choose (`offload trace`).
    - `context`: tokens the KV cache is budgeted for, and the most a conversation may have.
    - `ubatch_size`: tokens of a prompt that go through the model at once; every expert they need is
      loaded once for all of them. Fewer where attention keeps scores (gpt-oss) and those would take
      more than an eighth of the memory.
    - `dtype`: of the computation; None: as the checkpoint's config says.

    Returns `(model, tokenizer)`; the tokenizer is None when the checkpoint has none. The model is a
    transformers model with one more attribute, `model.offload` (`stats()`, `close()`).
    Raises `OffloadError`, whose message says what to do.
    """
    asked = AskedBits(bits, expert_bits, dense_bits, group_size)
    residency = Residency(policy, allocation, lookahead, predictor, layers_ahead, warm_start)
    check_engine(engine)
    place = find_place(device, gpus, vram, ram)
    ram_bytes = parse_bytes(ram)
    plan = Planner(
        place.device,
        place.memory,
        dtype,
        expert_slots,
        residency,
        context,
        ubatch_size,
        place.cards,
        engine,
    )
    for card in place.cards or (Card(0, place.device, place.memory.device),):
        if card.device.type == "cuda":
            hold_vram(card.device, card.memory)
    path = find_or_make_pack(
        str(source),
        asked.recipe(),
        pack_dir=pack_dir,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        device=place.device,
        plan=plan,
    )
    with contextlib.ExitStack() as undo:  # what was begun, should the rest fail
        pack = Pack(path)
        undo.callback(pack.close)
        check_generation_config(path)
        check_recipe(pack, asked)
        config = sources.read_config(str(source), path, trust_remote_code=trust_remote_code)
        cls = model_class(config, str(path), trust_remote_code)
        whole = build_on_meta(own_config(config, cls), cls) if place.cards else None
        options = plan(pack.info, config, whole)
        _tell_shorter_chunks(options, ubatch_size)
        devices = _devices(options, whole)
        tokenizer = _tokenizer(path, trust_remote_code)
        model = _load_dense(pack, own_config(config, cls), cls, options, devices)
        transfer = transfer_of(pack, options, ram_bytes)
        undo.callback(transfer.close)
        _connect(model, pack, options, transfer, engine)
        undo.callback(model.offload.close)
        if trace is not None:  # with what routers say of the next layer, for replays to act on
            if not model.offload.engine.watches_routers:
                model.offload.engine.watch_routers(model, routers(model, pack.info))
            model.offload.record(trace, noted_layers=1)
        if warm_start:
            model.offload.engine.warm(read_hot(pack.path, pack.info))
        undo.pop_all()
    return model, tokenizer


def _tell_shorter_chunks(options: Options, asked: int) -> None:
    """Warn who asked for longer ones."""
    if options.ubatch < min(asked, options.context):
        logger.log(
            logging.INFO if asked == UBATCH else logging.WARNING,
            "prompts are read %d tokens at once, not %d: this model's attention keeps its scores, "
            "which would take too much memory",
            options.ubatch,
            asked,
        )


def _devices(options: Options, whole: PreTrainedModel | None) -> dict[str, torch.device]:
    """Every part of the model and its device."""
    if whole is None:
        return {"": options.device}
    return Layers(whole).device_map(options.shares, [card.device for card in options.cards])


def _load_dense(
    pack: Pack,
    config: PreTrainedConfig,
    cls: type[PreTrainedModel],
    options: Options,
    devices: dict[str, torch.device],
) -> PreTrainedModel:
    """The model with everything in place, its parts on `devices`, but its experts."""
    if any(len(dense.modules) > 1 for dense in pack.info.dense):
        config = _untied(config)  # one record serves both: there are no parameters to tie
    quantised = [path for dense in pack.info.dense for path in dense.modules]
    with BUILDING, without_bars():
        loaded: tuple[PreTrainedModel, dict[str, Any]]
        loaded = without_packed_weights(cls, quantised).from_pretrained(
            pack.path,
            config=config,
            dtype=options.dtype,
            device_map=devices,
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
        where = device_of(dense.modules[0], devices)  # of two, one is tied to it
        view = view_record(_in_memory(record, where), layout)["weight"]
        for path in dense.modules:
            module = model.get_submodule(path)
            assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
            if module.shape != (view.layout.rows, view.layout.columns):
                raise PackError(
                    f"{pack.path} has a matrix of another shape than the model's {path}: {REMAKE}"
                )
            module.bind(view, options.dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _in_memory(tensor.data, tensor.device)
    if len(devices) > 1:
        remove_hook_from_submodules(model)  # accelerate's, one for each linear layer
        Crossing(model, devices, home=options.device)
    return model.requires_grad_(False)  # slots are reused: there is nothing to train


def _in_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, not in a mapped file: one cut short under it would end the process."""
    return tensor.clone() if device.type == "cpu" else tensor.to(device)


def _untied(config: PreTrainedConfig) -> PreTrainedConfig:
    copy = deepcopy(config)
    for part in (copy, copy.get_text_config()):
        part.tie_word_embeddings = False
    return copy


def _connect(
    model: PreTrainedModel, pack: Pack, options: Options, transfer: Transfer, asked_engine: str
) -> None:
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
    ahead = options.residency.ahead(everything_fits=options.slots >= info.total_experts)
    k = chosen_experts(model.config)
    engine = make_engine(asked_engine, info, options, transfer, ahead, k)
    decoding = None
    if engine.device is not None:
        from offload.generation.tokens import Loops  # loads Triton

        decoding = Loops(engine, engine.device)
    for module in experts_modules(model):
        install(module, engine.add_layer(module))
    engine.watch_calls(model)
    if ahead.layers and ahead.predictor in WITH_ROUTER:
        engine.watch_routers(model, routers(model, info))
    single = options.device.type == "cpu" and options.dtype == torch.bfloat16
    one_token = OneTokenLinear(model) if single and native_is_quicker() else None
    model.offload = Offload(pack, engine, options, one_token, k, decoding)
    weakref.finalize(model, model.offload.close)  # a model that is dropped frees what it held


def routers(model: PreTrainedModel, info: PackInfo) -> list[torch.nn.Module | None]:
    """The router of each MoE layer, None where it cannot be told."""
    return [find_router(model, layer.module, layer.num_experts) for layer in info.layers]


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
