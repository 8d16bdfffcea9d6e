"""What a checkpoint's generation_config.json may say.

Knows: which of its values are used, and of what kind they must be. Does not know: what they do
(`sampling`, `generation`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from offload.errors import CheckpointError, GenerationError
from offload.sampling import is_number, resolve_sampling

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
WHOLE_NUMBERS = ("top_k", "max_new_tokens", "bos_token_id", "pad_token_id")
DEEPEST = 16  # levels of lists in lists; transformers copies the values recursively


def check_generation_config(folder: Path) -> None:
    """Raise `CheckpointError` when the file in `folder` is there and cannot be used.

    It comes with the checkpoint, and transformers would fail in the middle of loading.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    remedy = "correct the file, fetch it again, or remove it"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {remedy}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is no table of names and values: {remedy}")
    for fault in _faults(values):
        raise CheckpointError(f"{file}: {fault}: {remedy}")
    try:
        resolve_sampling(GenerationConfig.from_dict(values))
    except GenerationError as error:
        raise CheckpointError(f"{file}: {error}: {remedy}") from None
    except Exception as error:  # whatever transformers raises on what is in the file
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} is not usable ({reason}): {remedy}") from None


def end_ids(value: Any) -> frozenset[int]:
    """The ids of an `eos_token_id`: none, one or several. Raises `GenerationError`."""
    ids = value if isinstance(value, list | tuple | set | frozenset) else [value]
    if value is None:
        return frozenset()
    if not all(is_number(item, Integral) for item in ids):
        raise GenerationError(f"eos_token_id is {value!r}: it must be a whole number, or several")
    return frozenset(int(item) for item in ids)


def _faults(values: dict[str, Any]) -> Iterator[str]:
    if _depth(values) > DEEPEST:
        yield f"its values are nested more than {DEEPEST} deep"
    for name in values:
        if callable(getattr(GenerationConfig, name, None)):
            yield f"{name} is not a parameter"
    for names, kind, what in ((NUMBERS, Real, "number"), (WHOLE_NUMBERS, Integral, "whole number")):
        for name in names:
            value = values.get(name)
            if value is not None and not is_number(value, kind):
                yield f"{name} is {value!r}: it must be a {what}"
    try:
        end_ids(values.get("eos_token_id"))
    except GenerationError as error:
        yield str(error)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for items in inner for x in items if isinstance(x, dict | list)]
        depth += 1
    return depth
