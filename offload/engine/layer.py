"""One MoE layer: its experts, its calls, and its router where somebody else asks it."""

from __future__ import annotations

# T tokens, k experts a token, S = T * k cells, M rows of one expert, H hidden, I inner
import functools
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.quant.matmul import matmul
from offload.quant.pack import PackInfo
from offload.quant.program import Program, recognise
from offload.quant.record import MatrixView, RecordLayout


class NormFinder:
    """Finds, in the first forward pass, the norm of a decoder layer that feeds its router."""

    def __init__(self, block: nn.Module) -> None:
        """`block`: the decoder layer, or whatever else is around router and norm."""
        self.norm: nn.Module | None = None
        self._last: dict[nn.Module, Tensor] = {}  # kept, so that no other tensor takes its place
        self._hooks = [
            module.register_forward_hook(self._saw)
            for module in block.modules()
            if "norm" in type(module).__name__.lower()
        ]

    def _saw(self, module: nn.Module, _: object, out: object) -> None:
        if isinstance(out, Tensor):
            self._last.pop(module, None)  # the latest comes last
            self._last[module] = out

    def asked(self, hidden: Tensor) -> None:
        """Find the norm whose output is `hidden`, about which the router is asked."""
        for module, out in reversed(self._last.items()):
            if out.data_ptr() == hidden.data_ptr():
                self.norm = module
                break
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._last.clear()


@torch.no_grad()
def scale_between(norm: nn.Module | None, later: nn.Module | None, like: Tensor) -> Tensor | None:
    """The factors [H] that turn `norm`'s output into `later`'s; None when no factors do."""
    if norm is None or later is None:
        return None
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, like.shape[-1], generator=generator).to(like.device, like.dtype)
    there = next(later.parameters(), probes).device  # a later layer may be on another card
    theirs = later.forward(probes.to(there)).float().to(like.device)
    first, second = theirs / norm.forward(probes).float()
    same = torch.allclose(first, second, rtol=0.05, atol=1e-3) and bool(second.isfinite().all())
    return second.to(like.dtype) if same else None


# layer, hidden [T, H], top-k index and weights [T, k] -> what the experts add [T, H]
Serve = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]


class Layer:
    """One MoE layer's experts, called by transformers in place of its own."""

    def __init__(self, serve: Serve, index: int, module: nn.Module, info: PackInfo) -> None:
        """`serve` answers the calls of this layer, which is number `index` of the pack's `info`."""
        self._serve = serve
        self.index = index
        self.module = module
        self.num_experts = info.layers[index].num_experts
        self.layout = info.layout_of(index)
        self.router: nn.Module | None = None  # of this layer
        self.device: torch.device | None = None  # where its router is; None: not asked
        self.asked: Tensor | None = None  # what this layer's router was just asked about
        # The other arguments of the router; None if it was never called.
        self.constants: tuple[Any, ...] | None = None
        self.finder: NormFinder | None = None  # of the norm that feeds the router
        self.scales: dict[int, Tensor | None] = {}  # later layer -> what its norm makes of ours

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._serve(self, hidden, top_k_index, top_k_weights)

    @functools.cached_property
    def program(self) -> Program:
        """What an expert of this layer computes from its record."""
        return program_of(self.module, self.layout)

    def watch(
        self, model: nn.Module, router: nn.Module, owned: Set[int]
    ) -> torch.utils.hooks.RemovableHandle:
        """Note what the router is asked; `owned` are the ids of the model's parameters and
        buffers."""
        self.router = router
        self.device = next(router.parameters()).device
        self.finder = NormFinder(_around(model, self.module))
        return router.register_forward_pre_hook(functools.partial(self._asked, owned))

    def guess(self, hidden: Tensor) -> list[int]:
        """The experts this layer's router would choose for `hidden` [.., H] of one token."""
        index = self.ask(hidden)
        if index is None:
            return []
        chosen = index.flatten().tolist()  # sync: the decision is made on the host
        return [expert for expert in chosen if 0 <= expert < self.num_experts]

    def ask(self, hidden: Tensor) -> Tensor | None:
        """The router's index [.., k] for `hidden`, still on the device; None: it has no answer."""
        if self.router is None or self.constants is None:
            return None
        there = hidden.to(self.device)  # the router may be on another card
        answer = self.router.forward(there, *self.constants)  # hooks are for the model's own calls
        index = answer[2] if isinstance(answer, tuple) and len(answer) > 2 else None
        if not isinstance(index, Tensor) or index.is_floating_point():
            self.router = None  # not a router as transformers writes them
            return None
        return index

    def _asked(self, owned: Set[int], _: nn.Module, args: tuple[Any, ...]) -> None:
        """When the router is asked, keep the hidden state of a single token, and nothing of many.

        With many tokens nearly every expert is chosen, so that guessing is no help.
        """
        self.constants = args[1:]
        if any(rest is not None and id(rest) not in owned for rest in self.constants):
            self.router = None  # the router looks at more than the hidden state
        if self.finder is not None and self.finder.norm is None and args:
            self.finder.asked(args[0])
        one_token = bool(args) and args[0].numel() == args[0].shape[-1]
        self.asked = args[0] if one_token else None

    def as_seen_by(self, later: Layer, hidden: Tensor) -> Tensor:
        """`hidden` as it would be if `later`'s norm had made it in place of this layer's."""
        if later.index not in self.scales:
            mine, theirs = (at.finder.norm if at.finder else None for at in (self, later))
            self.scales[later.index] = scale_between(mine, theirs, hidden)
        scale = self.scales[later.index]
        return hidden if scale is None else hidden * scale

    def expert(self, x: Tensor, matrices: dict[str, MatrixView]) -> Tensor:
        """One expert's output [M, H] for its tokens `x` [M, H], before the router's weight."""
        module: Any = self.module  # what the experts seam promises is not in its type
        if module.has_gate:
            inner = module._apply_gate(matmul(x, matrices["gate_up_proj"]))  # [M, I]
        else:
            inner = module.act_fn(matmul(x, matrices["up_proj"]))  # [M, I]
        out = matmul(inner, matrices["down_proj"])  # [M, H]
        if not module.has_post_expert_norm:
            return out
        normed: Tensor = module.post_expert_norm(out)
        return normed


@dataclass
class Call:
    """One call of a layer: T tokens, each with the k experts that the router chose for it."""

    layer: Layer
    hidden: Tensor  # [T, H]
    index: Tensor  # [T, k] int64; a number past the layer's experts is a sentinel
    weights: Tensor  # [T, k]
    reads_prompt: bool | None  # whether the model reads a prompt; None: it is not known

    @functools.cached_property
    def chosen(self) -> list[list[int]]:
        """`index` on the host."""
        chosen: list[list[int]] = self.index.tolist()  # sync: the decision is made on the host
        return chosen

    @functools.cached_property
    def cells_of(self) -> dict[int, list[int]]:
        """The cells (token * k + place) of each expert.

        The experts are in the order of their last cells, so what the last tokens chose is loaded
        last and stays longest.
        """
        cells: dict[int, list[int]] = {}
        cell = 0
        for places in self.chosen:
            for expert in places:
                if 0 <= expert < self.layer.num_experts:
                    cells.setdefault(expert, []).append(cell)
                cell += 1
        if len(self.chosen) > 1:  # the same order as `cache.trace.trace.Event.distinct`
            return dict(sorted(cells.items(), key=lambda item: item[1][-1]))
        return cells

    @property
    def prompt(self) -> bool:
        """Whether the tokens are of a prompt."""
        return len(self.chosen) > 1 if self.reads_prompt is None else self.reads_prompt

    @property
    def of_last_token(self) -> int:
        """How many experts the last token chose (as `cache.trace.trace.Event.admit`)."""
        return len(self.cells_of.keys() & set(self.chosen[-1]))

    def reduced(self, cells: Tensor) -> Tensor:
        """The weighted sum [T, H] over each token's `cells` [S, H], in one fixed order."""
        weighted = cells.view(*self.index.shape, -1) * self.weights.unsqueeze(-1)  # [T, k, H]
        return weighted.sum(dim=1).to(self.hidden.dtype)


def program_of(module: Any, layout: RecordLayout) -> Program:
    """What an experts module of transformers computes with its two matrices."""
    function = module._apply_gate if module.has_gate else module.act_fn
    interleaved = not module.is_concatenated
    numbers = [value for value in vars(module).values() if isinstance(value, int | float)]
    gate = recognise(function, module.has_gate, interleaved, numbers)
    return Program(layout, module.has_gate, interleaved, gate, function)


def _around(model: nn.Module, experts: nn.Module) -> nn.Module:
    """The decoder layer that `experts` is part of."""
    path = next(name for name, module in model.named_modules() if module is experts)
    parts = path.split(".")
    deep = max((at for at, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return model.get_submodule(".".join(parts[: deep + 1]))
