"""How many experts fit: arithmetic on a config and a pack's description, without allocating."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from offload.errors import BudgetError, UnsupportedModelError
from offload.lines import reason
from offload.machine.memory import ram
from offload.model.seam import (
    LAYER,
    build_on_meta,
    experts_modules,
    is_experts_module,
    model_class,
)
from offload.quant.matmul import REFERENCE_WEIGHTS
from offload.quant.pack import PackInfo
from offload.units import READ_WHOLE, SHARE, gib, parse_bytes

logger = logging.getLogger("offload")
BASE_BYTES = 200 * 2**20  # the libraries' own buffers and the allocator's slack
STAGING_BYTES = 128 * 2**20  # with small records more than two rows: fewer, larger kernels
MOST_STAGING_ROWS = 32
SCORES_SHARE = 8  # attention scores may take at most one eighth of the memory
UNPACKED_BYTES = 10  # a weight, while its matrix is dequantised: codes, float32 and the result
# Tensors as large as the attention scores that exist at the same time. gpt-oss holds three: scores,
# scores with sinks, and their softmax. The eager attention of most other models holds one of 16
# bits, its softmax in float32, which counts twice, and that softmax in 16 bits.
ALIVE = 4
# Tokens of a trial run. The number is odd so that layers which collect tokens until a block is full
# show that they hold an incomplete block.
PROBE = 255
DEPTH = 4  # deepest nesting of containers in a cache layer


@dataclass(frozen=True)
class Budget:
    """What goes into the compute device's memory. All sizes are in bytes."""

    available: int
    dense: int
    kv_cache: int
    workspace: int
    slot: int
    total_experts: int
    staging: int = 0  # staging rows, each as large as a slot; unused if all experts have slots

    def slots(self, asked: int | None) -> int:
        """Expert slots to allocate: `asked`, or as many as fit if None. Raises `BudgetError`."""
        left = self.available - self.dense - self.kv_cache - self.workspace
        fit = max(0, left // self.slot)
        if fit < self.total_experts or (asked is not None and asked < self.total_experts):
            fit = max(0, fit - self.staging)
        wanted = 1 if asked is None else asked
        if wanted < 1:
            raise BudgetError(
                f"{wanted} expert slots: at least one is needed, raise --expert-slots"
            )
        wanted = min(wanted, self.total_experts)
        if wanted > fit:
            staging = self.staging * self.slot if wanted < self.total_experts else 0
            needed = self.available - left + wanted * self.slot + staging
            streamed = f", {gib(staging)} to stream prompts through" if staging else ""
            raise BudgetError(
                f"not enough memory: {gib(needed)} needed, {gib(self.available)} allowed "
                f"({gib(self.dense)} of dense weights, {gib(self.kv_cache)} of KV cache, "
                f"{gib(self.workspace)} of workspace{streamed}, and {wanted} expert "
                f"slot{'s' * (wanted > 1)} of {self.slot / 2**20:.1f} MiB, of which {fit} fit): "
                "lower --ctx-size, --ubatch-size, --expert-slots or --expert-bits, or raise "
                "--vram (GPU) or --ram (CPU)"
            )
        return wanted if asked is not None else min(fit, self.total_experts)


@dataclass(frozen=True)
class Memory:
    """Bytes that may be used on the compute device and in RAM."""

    device: int
    ram: int

    @classmethod
    def of(cls, device: torch.device, vram: str | int | None, ram: str | int | None) -> Memory:
        """The sizes that the user gave, or a share of the free memory. Raises `BudgetError`."""
        if vram is not None and device.type == "cpu":
            logger.warning("--vram has no effect without a GPU: --ram is the limit here")
        card_bytes, ram_bytes = parse_bytes(vram), parse_bytes(ram)
        host = available_bytes(torch.device("cpu"), ram_bytes)
        return cls(host if device.type == "cpu" else available_bytes(device, card_bytes), host)


def available_bytes(device: torch.device, given: int | None) -> int:
    """Bytes that may be used on `device`: the size `given`, or a share of the free memory."""
    if given is not None:
        return given
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(ram().available * SHARE)


def hold_vram(device: torch.device, budget: int) -> None:
    """Limit torch to `budget` bytes beyond what it already holds.

    Beyond the limit torch raises an out-of-memory error, and the engine then gives slots back.
    Without the limit torch would take the memory of other programs.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    share = (torch.cuda.memory_reserved(device) + budget) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def kv_cache_bytes(
    config: PreTrainedConfig,
    context: int,
    dtype: torch.dtype,
    ubatch: int | None = None,
    fixed: bool = False,
) -> list[int]:
    """Each layer's bytes of KV cache, for one sequence of `context` tokens that is read `ubatch`
    tokens at a time (None: all at once).

    `fixed` asks about a cache whose tensors never move (`offload.generation.fixed_kv`): it holds a
    window at its full length, and no states of a prompt that are cut off later.
    """
    tokens = min(PROBE, context)
    key = (type(config), config.to_json_string(use_diff=False), dtype, tokens)
    if key not in _KEPT:
        try:
            _KEPT[key] = _measure_kept(config, dtype, tokens)
        except Exception as error:  # models raise many things on the meta device
            logger.debug("the KV cache is estimated: %s", reason(error))
            _KEPT[key] = None
    if (layers := _KEPT[key]) is None:
        return _estimated_kv_bytes(config, context, dtype)
    return [layer.bytes(context, ubatch or context, fixed) for layer in layers]


@dataclass(frozen=True)
class _Kept:
    """What one layer of a KV cache kept of the `tokens` of a trial run, and how it grows."""

    tokens: int
    used: int = 0  # bytes
    grows: int = 0  # bytes by which `used` grew over the last `step` tokens
    cut: int = 0  # bytes in memory behind `used`, which are freed by the next step
    cut_grows: int = 0
    step: int = 1
    window: int | None = None  # tokens before the present one that are kept; None: all

    def bytes(self, context: int, ubatch: int, fixed: bool) -> int:
        """What the layer keeps of `context` tokens, see `kv_cache_bytes`."""
        if self.window is not None and not fixed:
            context = min(context, self.window + ubatch)
        size = self.used + self.grows * (context - self.tokens) // self.step
        if not fixed:
            longer = max(0, min(context, ubatch) - self.tokens)
            size += self.cut + self.cut_grows * longer // self.step
        return size


_KEPT: dict[tuple[object, ...], list[_Kept] | None] = {}  # results, because trial runs are slow


def _measure_kept(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> list[_Kept]:
    """Run the model on the meta device, without its experts, and measure whatever its layers keep:
    latent, compressed or recurrent states, or a window. Raises whatever the model raises."""
    model = build_on_meta(config, model_class(config, "", False)).to(dtype).eval()

    def skip(hidden: Tensor, *_: Any) -> Tensor:
        return hidden  # the size of the cache stays the same

    for module in experts_modules(model):
        module.forward = skip
    firsts = _compute_once(model)
    long, short = _cache_layers(model, tokens), list[Any]()
    kept = []
    for index, layer in enumerate(long):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            if not layer.is_initialized:  # the layer was not run, or shares another one's cache
                kept.append(_Kept(tokens))
                continue
            a_token = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
            slides = type(layer) is DynamicSlidingWindowLayer
            window = layer.sliding_window - 1 if slides else None
            kept.append(_Kept(tokens, a_token * tokens, a_token, window=window))
            continue
        short = short or _cache_layers(model, max(1, tokens // 2))
        (used, cut), (used_before, cut_before) = _held_bytes(layer), _held_bytes(short[index])
        grows, cut_grows = max(0, used - used_before), max(0, cut - cut_before)
        kept.append(_Kept(tokens, used, grows, cut, cut_grows, max(1, tokens - tokens // 2)))
    counts = firsts or range(len(kept))
    return [kept[first] if first < len(kept) else _Kept(tokens) for first in counts]


def _compute_once(model: PreTrainedModel) -> list[int]:
    """Let each decoder layer that is like an earlier one return what that one did.

    A trial run of all layers takes a second, and those of a kind keep the same bytes. Returns for
    each layer the number of the first that is like it; nothing if the cache has other layers.
    """
    paths = (path for path, module in model.named_modules() if is_experts_module(module))
    match = LAYER.match(next(paths, ""))
    layers = list(model.get_submodule(match[1]).children()) if match else []
    caches = DynamicCache(config=model.config).layers
    if len(caches) != len(layers):
        return []
    returned: dict[int, Any] = {}

    def compute(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        returned[index] = forward(*args, **kwargs)
        return returned[index]

    def repeat(index: int, *_: Any, **__: Any) -> Any:
        return returned[index]

    kinds: dict[str, int] = {}
    firsts = []
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        first = kinds.setdefault(f"{_traits(cache)} {list(map(_traits, layer.modules()))}", index)
        own = partial(compute, index, layer.forward)
        layer.forward = own if first == index else partial(repeat, first)
        firsts.append(first)
    return firsts


_PLAIN = (int, float, str, tuple, list, dict, type(None))


def _traits(part: Any) -> tuple[Any, ...]:
    """What tells a module or a cache layer from others, but for its number and what is in it."""
    values = {name: value for name, value in vars(part).items() if name[0] != "_"}
    values.pop("layer_idx", None)
    told = {name: v if isinstance(v, _PLAIN) else id(v) for name, v in values.items()}
    tensors = part.parameters(recurse=False) if isinstance(part, nn.Module) else ()
    return type(part), told, [tensor.shape for tensor in tensors]


@torch.inference_mode()
def _cache_layers(model: PreTrainedModel, tokens: int) -> list[Any]:
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    layers: list[Any] = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache.layers
    return layers


def _held_bytes(layer: Any) -> tuple[int, int]:
    """Bytes of the tensors in a cache layer, and bytes that lie in memory behind them.

    A sliding-window layer returns a view. The full prompt stays allocated behind that view until
    the next step.
    """
    tensors = list(_tensors(layer, set(), DEPTH))
    used = sum(tensor.nbytes for tensor in tensors)
    return used, sum(tensor.untyped_storage().nbytes() for tensor in tensors) - used


def _tensors(part: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    """The tensors that `part` leads to, each once."""
    if id(part) in seen or depth < 0:
        return
    seen.add(id(part))
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple | dict) or hasattr(part, "__dict__"):
        items = part if isinstance(part, list | tuple | dict) else vars(part)
        for item in items.values() if isinstance(items, dict) else items:
            yield from _tensors(item, seen, depth - 1)


def _estimated_kv_bytes(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> list[int]:
    """Each layer's KV bytes as if it had full attention: 2 * kv_heads * head_dim values a token."""
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    values = []
    for layer in layers:
        heads = getattr(layer, "num_attention_heads", None) or 0
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        head_dim = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
        values.append(2 * int(kv_heads) * int(head_dim) * context * dtype.itemsize)
    return values


def keeps_scores(config: PreTrainedConfig) -> bool:
    """Whether transformers gives the model of `config` eager attention, which stores its scores.

    A model that comes with its own code counts as fused, because its code is unknown until it runs.
    """
    asked = getattr(config, "_attn_implementation", None)
    if asked is not None:
        return bool(asked == "eager")
    try:
        return not model_class(config, "", trust_remote_code=False)._supports_sdpa
    except UnsupportedModelError:
        return False


def score_bytes(config: PreTrainedConfig, context: int, itemsize: int) -> int:
    """Bytes of attention scores over `context` tokens, for each token of a prompt's chunk."""
    if not keeps_scores(config):
        return 0
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text]
    heads = max(int(getattr(layer, "num_attention_heads", None) or 0) for layer in layers)
    return ALIVE * heads * context * itemsize


def staging_rows(device: torch.device, slot_bytes: int) -> int:
    """The number of staging rows, through which a prompt's experts are streamed. They form two
    halves: one is filled while the experts in the other are computed."""
    if device.type == "cpu":
        return 2  # they take no memory: experts are computed from the mapped pack
    return max(2, min(MOST_STAGING_ROWS, STAGING_BYTES // slot_bytes) // 2 * 2)


def chunk_tokens(
    config: PreTrainedConfig, asked: int, context: int, memory: int, dtype: torch.dtype
) -> int:
    """Return how many prompt tokens go through the model at once.

    The result is `asked`, or less where the attention scores of so many tokens would take more than
    an eighth of the device's `memory`. A smaller result is a power of two: the last bits of an
    answer to a long prompt depend on the chunk length, which a little more or less free memory
    should therefore not change. A small enough `asked` fixes the length.

    With half the chunk length experts are loaded twice as often. But scores grow with the context:
    those of gpt-oss for 2048 tokens at a context of 32768 take 32 GiB, more than any home card has.
    Raises `BudgetError`.
    """
    if asked < 1:
        raise BudgetError(f"{asked} tokens at once: at least one is needed, raise --ubatch-size")
    if config.get_text_config().model_type in READ_WHOLE:
        return context
    tokens = min(asked, context)
    a_token = score_bytes(config, context, dtype.itemsize)
    if tokens * a_token * SCORES_SHARE <= memory:
        return tokens
    most = max(1, memory // SCORES_SHARE // a_token)
    return 1 << (most.bit_length() - 1)


def workspace_bytes(
    config: PreTrainedConfig, info: PackInfo, tokens: int, context: int, dtype: torch.dtype
) -> int:
    """Bytes of temporary tensors: one dequantised matrix, the activations of `tokens` at once, and
    the scores over a whole `context` for models whose attention stores them."""
    text = config.get_text_config()
    layouts = (*info.layouts, *info.dense_layouts)
    widest = max(m.rows * m.columns for layout in layouts for m in layout.matrices)
    chosen = getattr(text, "num_experts_per_tok", None) or 8
    cells = tokens * int(chosen) * int(text.hidden_size) * 4  # [T, k, H], float32 at most
    scores = tokens * score_bytes(config, context, dtype.itemsize)
    return BASE_BYTES + min(widest, REFERENCE_WEIGHTS) * UNPACKED_BYTES + 2 * cells + scores
