"""Hooks on a model: tensors cross to the card of each part, and one token gets quicker products."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from offload.quant.kernels.cpu import COLUMNS, MOST_TOKENS, multiply_rows
from offload.quant.matmul import rows_kernel_works

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


class FewTokensLinear:
    """Gives a model's linear layers of bfloat16 or float16 on the CPU a kernel for few tokens.

    oneDNN and torch read the weights at half the memory's rate (docs/log/cpu-kernels.md).
    """

    def __init__(self, model: nn.Module) -> None:
        self._linears = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.is_contiguous()
            and module.in_features % COLUMNS == 0
        ]
        for module in self._linears:
            module.forward = functools.partial(_few_tokens, module)  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave the model as it was."""
        for module in self._linears:
            module.__dict__.pop("forward", None)


def _few_tokens(module: nn.Linear, x: Tensor) -> Tensor:
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


def native_is_quicker() -> bool:
    """Whether torch's own kernel multiplies one row quicker than oneDNN on this CPU.

    A decode step calls a linear layer hundreds of times with one row, and oneDNN's overhead a call
    can exceed the product of a small layer. With AVX-512 torch's own kernel is then quicker
    (docs/log/cpu-kernels.md); with less it can be many times slower. The answer follows the
    processor, never a stopwatch: the two libraries round differently, and logits must not depend on
    the load."""
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class OneTokenLinear:
    """Switches oneDNN off while a model works on a single token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._before: bool | None = None  # the state to put oneDNN's switch back to
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave()  # torch skips the leaving hook when Ctrl-C ends a forward
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.numel() == 1:
            self._before = torch.backends.mkldnn.set_flags(False)[0]

    def _leave(self, *_: Any) -> None:
        if self._before is not None:
            torch.backends.mkldnn.set_flags(self._before)
            self._before = None

    def close(self) -> None:
        """Leave the model as it was."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
