"""Hooks on a model: tensors cross to the card of each part, and one token gets quicker products."""

import functools
import struct
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from offload.quant.kernels.cpu import COLUMNS, MOST_TOKENS, NORM_COLUMNS, multiply_rows, rms_norm
from offload.quant.matmul import rows_kernel_works

MOST_NORMED = 2**16  # numbers; with more, several threads are quicker than one
MORE = (
    "position_bias",
    "softcap",
    "output_attentions",
)  # what asks for transformers' own attention

# (id of a tensor that crossed, device) -> (the tensor, which keeps its id taken; its copy there)
Moved = dict[tuple[int, torch.device], tuple[Tensor, Tensor]]


class Crossing:
    """Hooks on a model's parts, which live as long as the model does.

    They replace accelerate's hooks, which look at the arguments of every linear layer: here each
    decoder layer is looked at once. What all layers of a card are given alike (masks, rotary
    embeddings) crosses once a call, not once a layer.
    """

    def __init__(
        self, model: nn.Module, devices: Mapping[str, torch.device], home: torch.device
    ) -> None:
        """`devices` has the path and device of each part; logits are brought to `home`."""
        self._home = home
        self._moved: Moved = {}  # tensors moved in this call
        model.register_forward_pre_hook(self._begin)
        parts = dict(model.named_modules())
        for path, device in devices.items():
            if path in parts:  # else the path is that of a lone tensor
                hook = functools.partial(self._enter, device)
                parts[path].register_forward_pre_hook(hook, with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._moved.clear()  # the previous call may have broken off
        _make_current(self._home)

    def _enter(
        self, device: torch.device, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _make_current(device)
        return self._to(args, device), self._to(named, device)

    def _end(self, _: nn.Module, __: Any, out: Any) -> Any:
        out = self._to(out, self._home)
        self._moved.clear()
        _make_current(self._home)
        return out

    def _to(self, value: Any, device: torch.device) -> Any:
        """`value` with its tensors on `device`. A KV cache and other objects stay as they are.

        Dictionaries are changed in place, because layers pass tensors on in them.
        """
        if isinstance(value, Tensor):
            return value if value.device == device else self._copy(value, device)
        if type(value) in (tuple, list):
            return type(value)([self._to(item, device) for item in value])
        if isinstance(value, dict):
            for key, item in value.items():
                moved = self._to(item, device)
                if moved is not item:
                    value[key] = moved
        return value

    def _copy(self, value: Tensor, device: torch.device) -> Tensor:
        key = id(value), device
        if key not in self._moved:
            self._moved[key] = value, value.to(device, non_blocking=True)
        return self._moved[key][1]


def _make_current(device: torch.device) -> None:
    """Make `device` the current card, on which kernels that are not torch's are launched."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        torch.cuda.set_device(device)


class FewTokens:
    """Gives a model on the CPU quicker ways for few tokens: linear layers and attention.

    Linear layers of bfloat16 and float16 get a kernel that reads at the memory's rate; oneDNN and
    torch read at half of it (docs/log/cpu-kernels.md).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        _attending.update(self._modules)
        AttentionInterface.register("sdpa", _attention)
        self._linears = [
            module
            for module in self._modules
            if type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.is_contiguous()
            and module.in_features % COLUMNS == 0
        ]
        for module in self._linears:
            module.forward = functools.partial(_linear, ref(module))  # type: ignore[method-assign]
        self._norms = [module for module in self._modules if _is_rms_norm(module)]
        for module in self._norms:
            module.forward = functools.partial(_norm, ref(module), type(module).forward)

    def close(self) -> None:
        """Leave the model as it was."""
        for module in (*self._linears, *self._norms):
            module.__dict__.pop("forward", None)
        self._linears.clear()
        self._norms.clear()
        _attending.difference_update(self._modules)
        self._modules.clear()


def _linear(linear: ref[nn.Linear], x: Tensor) -> Tensor:
    module: Any = linear()  # a strong reference would keep a dropped model, in a circle
    weight, bias = module.weight, module.bias
    tokens = x.numel() // module.in_features
    if (
        0 < tokens <= MOST_TOKENS
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and rows_kernel_works(x.dtype, tokens)
    ):
        return multiply_rows(x, weight, bias)
    return functional.linear(x, weight, bias)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes what `rms_norm` does, from its only parameter and its epsilon."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if (
        "norm" not in type(module).__name__.lower()
        or not isinstance(weight, nn.Parameter)
        or len(list(module.parameters())) != 1
        or epsilon is None
        or weight.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or weight.dim() != 1
        or len(weight) % NORM_COLUMNS
    ):
        return False
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, len(weight), generator=random, dtype=torch.float32).bfloat16()
    try:
        theirs = module.forward(x * 3)
    except Exception:  # it takes other arguments than a norm
        return False
    ours = rms_norm(x * 3, weight, epsilon)
    return theirs.dtype == ours.dtype and torch.allclose(
        theirs.float(), ours.float(), rtol=2**-7, atol=0
    )


def _epsilon(module: nn.Module) -> int | None:
    """The bits of a norm's epsilon as a float32."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return int.from_bytes(struct.pack("<f", value), "little")
    return None


def _norm(norm: ref[nn.Module], forward: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    module: Any = norm()
    weight, epsilon = module.weight, _epsilon(module)
    if (
        x.numel() <= MOST_NORMED
        and x.dtype == weight.dtype == torch.bfloat16
        and epsilon is not None
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        return rms_norm(x, weight, epsilon)
    return forward(module, x)


_attending = WeakSet[nn.Module]()  # modules whose attention to one token takes the quicker way


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention by torch's fused kernel, with one query token's heads as its rows.

    For a single row the kernel is 5 to 20 times slower on a CPU than for several. The heads that
    share a key are such rows; where none do, the row is given twice.
    """
    batch, heads, tokens, _ = query.shape
    shared = heads // key.shape[1]
    plain = attention_mask is None and not any(rest.get(name) is not None for name in MORE)
    if tokens != 1 or query.device.type != "cpu" or not plain or module not in _attending:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **rest
        )
    if shared > 1:
        query = query.reshape(batch, key.shape[1], shared, -1)
    else:
        query = query.expand(-1, -1, 2, -1)
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling
    )
    return out[:, :, :shared].reshape(batch, 1, heads, -1), None
