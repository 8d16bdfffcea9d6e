"""How many experts fit: arithmetic on a config and a pack's description, before anything is
allocated.

Knows: what takes memory and how much. Does not know: how it is allocated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig

from offload.budget.kv import cache_bytes
from offload.errors import BudgetError, UnsupportedModelError
from offload.lines import reason
from offload.model.seam import model_class
from offload.quant.matmul import REFERENCE_WEIGHTS
from offload.quant.pack import PackInfo
from offload.units import READ_WHOLE, SHARE, gib, parse_bytes

# Tensors of the scores' size at once. gpt-oss holds three (scores; with sinks; their softmax), the
# eager attention of most others one of 16 bits, its softmax in float32, which counts twice, and
# that in 16 bits again.
ALIVE = 4


def keeps_scores(config: PreTrainedConfig) -> bool:
    """Whether the model of `config` gets eager attention, as transformers 5.23 chooses.

    What code of a checkpoint's own does is not known before it runs: it counts as fused.
    """
    asked = getattr(config, "_attn_implementation", None)
    if asked is not None:
        return bool(asked == "eager")
    try:
        return not model_class(config, "", trust_remote_code=False)._supports_sdpa
    except UnsupportedModelError:
        return False


def score_bytes(config: PreTrainedConfig, context: int, itemsize: int) -> int:
    """Bytes that attention to `context` tokens keeps for each token of a prompt's chunk."""
    if not keeps_scores(config):
        return 0
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text]
    heads = max(int(getattr(layer, "num_attention_heads", None) or 0) for layer in layers)
    return ALIVE * heads * context * itemsize


logger = logging.getLogger("offload")
BASE_BYTES = 200 * 2**20  # libraries' own buffers, the allocator's slack
STAGING_BYTES = 128 * 2**20  # for small records more than two rows: fewer, larger kernels
MOST_STAGING_ROWS = 32
SCORES_SHARE = 8  # of the memory at most one in so many for attention scores, where any are kept
UNPACKED_BYTES = 10  # a weight while its matrix is dequantised: codes, float32, the result


@dataclass(frozen=True)
class Budget:
    """What goes into the compute device's memory, in bytes."""

    available: int
    dense: int
    kv_cache: int
    workspace: int
    slot: int
    total_experts: int
    staging: int = 0  # rows of a slot's size beside the slots, unless all experts have one

    def slots(self, asked: int | None) -> int:
        """The number of expert slots to allocate, `asked` or as many as fit. Raises
        `BudgetError`."""
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
            raise BudgetError(
                f"needs {wanted} expert slot{'s' * (wanted > 1)} of {self.slot / 2**20:.1f} MiB, "
                f"{fit} fit in {gib(self.available)} beside {gib(self.dense)} of dense weights, "
                f"{gib(self.kv_cache)} of KV cache and {gib(self.workspace)} of workspace"
                f"{self._staging_words()}: lower --ctx-size, --ubatch-size, --expert-slots or "
                "--expert-bits, or raise --vram (GPU) or --ram (CPU)"
            )
        return wanted if asked is not None else min(fit, self.total_experts)

    def _staging_words(self) -> str:
        size = gib(self.staging * self.slot)
        return f", and {size} that prompts are streamed through" if self.staging else ""


@dataclass(frozen=True)
class Memory:
    """What may be used, in bytes: on the compute device, and of RAM."""

    device: int
    ram: int

    @classmethod
    def of(cls, device: torch.device, vram: str | int | None, ram: str | int | None) -> Memory:
        """What the user gave, else a share of what is free. Raises `BudgetError`."""
        if vram is not None and device.type == "cpu":
            logger.warning("--vram has no effect without a GPU: --ram is the limit here")
        given = parse_bytes(ram)
        host = available_bytes(torch.device("cpu"), None, given)
        return cls(available_bytes(device, parse_bytes(vram), given), host)


def available_bytes(device: torch.device, vram: int | None, ram: int | None) -> int:
    """The budget on `device`: what the user gave, else a share of what is free."""
    given = ram if device.type == "cpu" else vram
    if given is not None:
        return given
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    return int(psutil.virtual_memory().available * SHARE)


def hold_vram(device: torch.device, budget: int) -> None:
    """Let torch take no more than `budget` beside what it has: more is out of memory, which leads
    to slots being given back, instead of other programs' shortage."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = (torch.cuda.memory_reserved(device) + budget) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def kv_cache_bytes(
    config: PreTrainedConfig,
    context: int,
    dtype: torch.dtype,
    ubatch: int | None = None,
    fixed: bool = False,
) -> int:
    """Bytes of the KV cache at `context` tokens, for one sequence read `ubatch` tokens at a time
    (None: at once); `fixed`: of one whose tensors never move, for CUDA graphs."""
    return sum(kv_cache_by_layer(config, context, dtype, ubatch, fixed))


def kv_cache_by_layer(
    config: PreTrainedConfig,
    context: int,
    dtype: torch.dtype,
    ubatch: int | None = None,
    fixed: bool = False,
) -> list[int]:
    """`kv_cache_bytes`, of each layer."""
    key = (type(config), config.to_json_string(), context, dtype, ubatch or context, fixed)
    if key not in _KV_CACHE:
        try:
            _KV_CACHE[key] = cache_bytes(config, context, dtype, ubatch or context, fixed)
        except Exception as error:  # whatever a model raises that does not run without memory
            logger.debug("the KV cache is estimated: %s", reason(error))
            _KV_CACHE[key] = _estimated_kv_bytes(config, context, dtype)
    return _KV_CACHE[key]


_KV_CACHE: dict[tuple[object, ...], list[int]] = {}  # a model is asked about several times


def _estimated_kv_bytes(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> list[int]:
    """Every layer counted as full attention (2 * heads * head_dim a token)."""
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    values = []
    for layer in layers:
        heads = getattr(layer, "num_attention_heads", None) or 0
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        head_dim = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
        values.append(2 * int(kv_heads) * int(head_dim) * context * dtype.itemsize)
    return values


def staging_rows(device: torch.device, slot_bytes: int) -> int:
    """Rows beside the slots for a prompt's experts: two halves, one filled while the other is
    computed from."""
    if device.type == "cpu":
        return 2  # takes no memory: they are computed from where they are mapped
    return max(2, min(MOST_STAGING_ROWS, STAGING_BYTES // slot_bytes) // 2 * 2)


def chunk_tokens(
    config: PreTrainedConfig, asked: int, context: int, memory: int, dtype: torch.dtype
) -> int:
    """Tokens of a prompt that go through the model at once: those asked for, or fewer where their
    attention scores would take more than an eighth of the device's `memory`. Fewer are a power of
    two: the last bits of an answer to a long prompt change with the chunk, so a little more or less
    free memory should not change it; `asked` small enough fixes it.

    A chunk half as long loads experts twice as often, but scores grow with the context: those of
    gpt-oss for 2048 tokens at 32768 take 32 GiB, more than any home card has. Raises `BudgetError`.
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
    """Bytes of what comes and goes: one dequantised matrix, the activations of `tokens` at once,
    and where a model's attention keeps them their scores with a whole `context`."""
    text = config.get_text_config()
    layouts = (*info.layouts, *info.dense_layouts)
    widest = max(m.rows * m.columns for layout in layouts for m in layout.matrices)
    chosen = getattr(text, "num_experts_per_tok", None) or 8
    cells = tokens * int(chosen) * int(text.hidden_size) * 4  # [T, k, H], float32 at most
    scores = tokens * score_bytes(config, context, dtype.itemsize)
    return BASE_BYTES + min(widest, REFERENCE_WEIGHTS) * UNPACKED_BYTES + 2 * cells + scores
