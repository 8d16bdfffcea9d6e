"""Rotary factors that depend on a sequence's length, kept right while it is read in pieces."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_length: ContextVar[int] = ContextVar("length", default=0)  # of the sequence that is being read


def follow_length(model: PreTrainedModel) -> None:
    """Choose the factors of `model` by `whole_length`, as if a sequence were read in one call."""
    for module in model.modules():
        if "longrope" in (kinds := _kinds(module)) or "dynamic" in kinds:
            module.register_forward_pre_hook(_with_last, with_kwargs=True)
            module.register_forward_hook(_without_last)


@contextlib.contextmanager
def whole_length(tokens: int) -> Iterator[None]:
    """Inside the `with` block, a model reads pieces of a sequence of so many `tokens`."""
    token = _length.set(tokens)
    try:
        yield
    finally:
        _length.reset(token)


def switches(model: PreTrainedModel, before: int, after: int) -> bool:
    """Whether a sequence of `before` tokens has other factors than one of `after`, so that its KV
    cache cannot serve."""
    longest = longest_short(model)
    return longest is not None and (before > longest) != (after > longest)


def longest_short(model: PreTrainedModel) -> int | None:
    """The most tokens for which `model` has its factors for short sequences; None: it has no
    others."""
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for rope in (given, *given.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    kind = getattr(module, "rope_type", None)
    return tuple(kind.values()) if isinstance(kind, dict) else (kind,)


def _with_last(
    _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Append the last position of the whole sequence, by which the module chooses its factors."""
    if not _length.get():
        return None
    positions = named["position_ids"] if "position_ids" in named else args[1]
    last = torch.full_like(positions[..., :1], _length.get() - 1)
    positions = torch.cat((positions, last), dim=-1)
    if "position_ids" in named:
        return args, {**named, "position_ids": positions}
    return (args[0], positions, *args[2:]), named


def _without_last(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Leave out what belongs to that position."""
    if not _length.get():
        return None
    return tuple(part[..., :-1, :] for part in out) if isinstance(out, tuple) else out[..., :-1, :]
