"""`load`: from a name to a model that generates."""

import contextlib
import inspect
import logging
import sys
import time
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from offload.budget.budget import hold_vram
from offload.budget.placement import Layers, device_of
from offload.budget.resolve import Resolver, find_place
from offload.engine.engine import make_engine
from offload.engine.few import FewTokens
from offload.engine.handle import Offload, OffloadedModel
from offload.engine.history import read_hot
from offload.engine.hooks import Crossing
from offload.errors import CheckpointError, SourceError
from offload.files import TRACE, check_output
from offload.fit import Card, Fit
from offload.generation.rope import follow_length
from offload.keywords import check_names, speak_python
from offload.machine.memory import check_ram
from offload.machine.threads import Threads
from offload.model import sources
from offload.model.demo import NOTE
from offload.model.names import DEMO
from offload.model.seam import (
    BUILDING,
    IMPLEMENTATION,
    QuantizedEmbedding,
    QuantizedLinear,
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
from offload.model.tokenizer import load_tokenizer
from offload.options import LoadKeywords, LoadOptions
from offload.pack.find import check_recipe, find_or_make_pack
from offload.pack.recipe import AskedBits
from offload.progress import without_bars
from offload.quant.errors import PackError
from offload.quant.manifest import REMAKE
from offload.quant.pack import Pack, PackInfo
from offload.quant.record import view_record
from offload.transfer.base import Transfer
from offload.transfer.cards import transfer_of
from offload.units import UBATCH

logger = logging.getLogger("offload")


class Loaded(NamedTuple):
    """What `load` returns; as a context manager, it closes the model at the end."""

    model: OffloadedModel
    tokenizer: PreTrainedTokenizerBase | None  # None if the checkpoint has none

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.model.offload.close()


def load(source: str | Path, **options: Unpack[LoadKeywords]) -> Loaded:
    """Load a Mixture-of-Experts model whose experts need not fit into memory.

    `source` is a checkpoint folder, a .gguf file, a pack, a hub id, or "demo". The first time, a
    checkpoint is quantised into a pack, which takes minutes; after that the pack opens in seconds.
    `help(offload.options.LoadOptions)` explains the options.

    Returns `(model, tokenizer)`; the tokenizer is None if the checkpoint has none. The model is a
    transformers model with one more attribute: `model.offload`, whose `stats()` tell how the
    experts were served and whose `close()` frees what they hold. `with load(...) as (model,
    tokenizer):` closes it at the end.

    Raises `OffloadError`; its message says what is wrong and what to do.
    """
    speak_python()
    check_names("load", options, LoadKeywords.__annotations__)
    if not isinstance(source, str | Path):
        raise SourceError(
            f'the model is {source!r}: name one, as a text or a path, like "demo" or a folder'
        )
    return load_with(source, LoadOptions(**options))


load.__signature__ = inspect.signature(load).replace(  # type: ignore[attr-defined]
    parameters=[
        inspect.signature(load).parameters["source"],
        *inspect.signature(LoadOptions).parameters.values(),
    ]
)


def load_with(source: str | Path, options: LoadOptions) -> Loaded:
    """`load`, with its options as one value."""
    check_output(options.trace, TRACE)
    check_ram(options.ram)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    asked, place = AskedBits.of(options), find_place(options)
    resolver = Resolver(options, place)
    for card in place.cards or (Card(0, place.device, place.memory.device),):
        if card.device.type == "cuda":
            hold_vram(card.device, card.memory)
    path = find_or_make_pack(str(source), options, device=place.device, resolver=resolver)
    trusts = options.trust_remote_code
    with contextlib.ExitStack() as undo:  # closes what was opened if anything below fails
        pack = Pack(path)
        undo.callback(pack.close)
        generation = check_generation_config(path, tell=True)
        check_recipe(pack, asked)
        config = sources.read_config(str(source), path, trust_remote_code=trusts)
        cls = model_class(config, str(path), trusts)
        whole = build_on_meta(config, cls) if place.cards else None
        fit = resolver.fit(pack.info, config, whole)
        _tell_shorter_chunks(fit)
        devices = {"": fit.device}  # the name of each part of the model -> its device
        if whole is not None:
            devices = Layers(whole).device_map(fit.shares, [card.device for card in fit.cards])
        tokenizer = load_tokenizer(path, trusts)
        model = _load_dense(pack, own_config(config, cls), generation, cls, fit, devices)
        transfer = transfer_of(pack, fit)
        undo.callback(transfer.close)
        _connect(model, pack, fit, transfer)
        undo.callback(model.offload.close)
        if options.trace is not None:
            model.offload.record(options.trace, noted_layers=1)
        if options.warm_start:
            model.offload.engine.warm(read_hot(pack.path, pack.info))
        undo.pop_all()
    return Loaded(model, tokenizer)


def load_and_tell(
    source: str, options: LoadOptions, *, note: bool = False
) -> tuple[OffloadedModel, PreTrainedTokenizerBase | None, float]:
    """`load_with` for commands. Returns the model, its tokenizer and the seconds this took.

    What each of several cards holds goes to stderr; with `note`, so does a line that explains the
    demo model.
    """
    begin = time.perf_counter()
    model, tokenizer = load_with(source, options)
    for share in model.offload.fit.shares:
        print(share.line(), file=sys.stderr)
    if note and source == DEMO:
        print(NOTE, file=sys.stderr)
    return model, tokenizer, time.perf_counter() - begin


def _tell_shorter_chunks(fit: Fit) -> None:
    """Log if prompts are read in shorter chunks than asked; warn if the user set the size."""
    asked = fit.options.ubatch_size
    if fit.ubatch < min(asked, fit.options.context):
        logger.log(
            logging.INFO if asked == UBATCH else logging.WARNING,
            "prompts are read %d tokens at once, not %d: this model's attention keeps its scores, "
            "which would take too much memory",
            fit.ubatch,
            asked,
        )


def _load_dense(
    pack: Pack,
    config: PreTrainedConfig,
    generation: GenerationConfig | None,
    cls: type[PreTrainedModel],
    fit: Fit,
    devices: dict[str, torch.device],
) -> OffloadedModel:
    """The model without its experts: all other weights are loaded onto `devices`.

    Raises `CheckpointError` or `PackError` if the weights are not those of the model.
    """
    if any(len(dense.modules) > 1 for dense in pack.info.dense):
        config = deepcopy(config)  # one record serves both modules; they have nothing to tie
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    quantised = [path for dense in pack.info.dense for path in dense.modules]
    with BUILDING, without_bars():
        bases = (OffloadedModel, without_packed_weights(cls, quantised))
        whole: Any = type(cls.__name__, bases, {"__module__": cls.__module__})
        loaded: tuple[OffloadedModel, dict[str, Any]]
        loaded = whole.from_pretrained(
            pack.path,
            config=config,
            generation_config=generation,
            dtype=fit.dtype,
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
        where = device_of(dense.modules[0], devices)  # a second module is tied to the first
        view = view_record(_in_memory(record, where), layout)["weight"]
        for path in dense.modules:
            module = model.get_submodule(path)
            assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
            if module.shape != (view.layout.rows, view.layout.columns):
                raise PackError(
                    f"{pack.path} has a matrix of another shape than the model's {path}: {REMAKE}"
                )
            module.bind(view, fit.dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _in_memory(tensor.data, tensor.device)
    if len(devices) > 1:
        remove_hook_from_submodules(model)  # accelerate adds one for each linear layer
        Crossing(model, devices, home=fit.device)
    model.requires_grad_(False)  # no gradients: slots are reused between layers
    return model


def _in_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device` and in memory of its own.

    A view of a mapped file would end the process if the file were truncated.
    """
    return tensor.clone() if device.type == "cpu" else tensor.to(device)


def _connect(model: OffloadedModel, pack: Pack, fit: Fit, transfer: Transfer) -> None:
    """Make an engine that serves the model's experts, and give the model its `offload`.

    Raises `PackError` if the pack's experts are not those of the model.
    """
    info = pack.info
    asked = [
        (module.path, module.num_experts, [matrix.shape for matrix in module.matrices])
        for module in described_experts(model)
    ]
    given = [
        (layer.module, layer.num_experts, [m.spec.shape for m in info.layout_of(i).matrices])
        for i, layer in enumerate(info.layers)
    ]
    if asked != given:  # kernels do not check these sizes
        raise PackError(
            f"{pack.path} was made for other experts modules than transformers "
            f"{transformers.__version__} has: {REMAKE}"
        )
    k = chosen_experts(model.config)
    engine = make_engine(info, fit, transfer, k)
    decoding = None
    if engine.device is not None:
        from offload.generation.decode import Loops  # loads Triton

        decoding = Loops(engine, engine.device)
    for module in experts_modules(model):
        install(module, engine.add_layer(module))
    engine.watch_calls(model)
    follow_length(model)
    if fit.looks_ahead or fit.options.trace is not None:  # a trace holds guesses too, for replays
        engine.watch_routers(model, routers(model, info))
    few = None
    if fit.device.type == "cpu":
        few = FewTokens(model, [router for router in routers(model, info) if router is not None])
    threads = Threads() if fit.device.type == "cpu" and fit.options.threads is None else None
    model.offload = Offload(pack, engine, fit, few, k, decoding, threads)
    weakref.finalize(model, model.offload.close)  # also if the user drops the model unclosed


def routers(model: PreTrainedModel, info: PackInfo) -> list[torch.nn.Module | None]:
    """The router of each MoE layer, or None where it cannot be found."""
    return [find_router(model, layer.module, layer.num_experts) for layer in info.layers]
