"""Quicker ways for few tokens on a CPU: linear layers, norms and attention of transformers' models.

Parts are recognised by what they are and compute, never by a model's name.
"""

import functools
import struct
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from offload.quant.kernels.cpu import COLUMNS, MOST_TOKENS, NORM_COLUMNS, multiply_rows, rms_norm
from offload.quant.matmul import rows_kernel_works

# Arguments that only transformers' own attention understands.
MORE = ("position_bias", "softcap", "output_attentions")


class FewTokens:
    """Gives a model on the CPU quicker ways, and takes them away again.

    A linear layer of bfloat16 or float16 gets a kernel that reads at the memory's rate; oneDNN and
    torch read at half of it (docs/log/cpu-kernels.md). A norm becomes one call, where it is six.
    """

    def __init__(self, model: nn.Module, routers: Iterable[nn.Module]) -> None:
        self._modules = list(model.modules())[1:]  # without the model, which would keep itself
        _attending.update(self._modules)
        AttentionInterface.register("sdpa", _attention)
        self._replaced: list[nn.Module] = []
        for module in self._modules:
            if _has_plain_rows(module):
                self._replace(module, _linear)
            elif (epsilon := _rms_epsilon(module)) is not None:
                self._replace(module, functools.partial(_norm, epsilon))
        for router in routers if native_is_quicker() else ():
            self._replace(router, _without_onednn)

    def _replace(self, module: nn.Module, way: Callable[..., Any]) -> None:
        # A strong reference to the module would keep a dropped model, in a circle.
        module.forward = functools.partial(way, ref(module))
        self._replaced.append(module)

    def close(self) -> None:
        """Leave the model as it was."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._replaced.clear()
        _attending.difference_update(self._modules)
        self._modules.clear()


def _has_plain_rows(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
        and module.in_features % COLUMNS == 0
    )


def _linear(linear: ref[nn.Linear], x: Tensor) -> Tensor:
    module: Any = linear()
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
def _rms_epsilon(module: nn.Module) -> int | None:
    """The epsilon, as `rms_norm` takes it, of a module that computes what `rms_norm` does from its
    only parameter; None of any other."""
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
        return None
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, len(weight), generator=random, dtype=torch.float32).bfloat16()
    try:
        theirs, ours = module.forward(x * 3), rms_norm(x * 3, weight, epsilon)
    except Exception:  # it takes other arguments than a norm, or no kernel compiles here
        return None
    same = theirs.dtype == ours.dtype and torch.allclose(
        theirs.float(), ours.float(), rtol=2**-7, atol=0
    )
    return epsilon if same else None


def _epsilon(module: nn.Module) -> int | None:
    """The bits of a norm's epsilon as a float32."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return int.from_bytes(struct.pack("<f", value), "little")
    return None


def _norm(epsilon: int, norm: ref[nn.Module], x: Tensor) -> Tensor:
    """The norm of `x` [batch, tokens, ..., D]."""
    module: Any = norm()
    weight = module.weight
    if (
        x.dim() > 2
        and x.shape[0] * x.shape[1] <= MOST_TOKENS
        and x.dtype == weight.dtype == torch.bfloat16
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        return rms_norm(x, weight, epsilon)
    normed: Tensor = type(module).forward(module, x)
    return normed


def native_is_quicker() -> bool:
    """Whether torch's own kernel multiplies one row by a small matrix quicker than oneDNN does.

    The answer follows the processor, never a stopwatch: the two round differently, and logits must
    not depend on the load. Without AVX-512 torch's own can be many times slower.
    """
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _without_onednn(router: ref[nn.Module], hidden: Tensor, *rest: Any) -> Any:
    """A router multiplies a parameter of its own, which is no linear layer."""
    module: Any = router()
    forward = functools.partial(type(module).forward, module)
    if hidden.numel() != hidden.shape[-1] or hidden.dtype != torch.bfloat16:
        return forward(hidden, *rest)
    before = torch.backends.mkldnn.set_flags(False)[0]
    try:
        return forward(hidden, *rest)
    finally:
        torch.backends.mkldnn.set_flags(before)


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
        theirs: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **rest
        )
        return theirs
    if shared > 1:
        query = query.reshape(batch, key.shape[1], shared, -1)
    else:
        query = query.expand(-1, -1, 2, -1)
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling
    )
    return out[:, :, :shared].reshape(batch, 1, heads, -1), None
