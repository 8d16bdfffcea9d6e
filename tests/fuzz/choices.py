"""Takes decisions from bytes, and damages good input accordingly.

The same bytes make the same bad input, whether a counter, hypothesis or atheris chose them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

T = TypeVar("T")

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "a" * 300, "../../../etc/passwd",
    "/etc/passwd", "a/b", "..", "\x00", "\x1b[2J", "‮אב", "experts-00000.safetensors", "4", "float32",
    "bfloat16", [], {}, [[]], [None], {"": 0}, [1, 2, 3], [-1, 10**12], [[[[1]]]],
)  # fmt: skip
SIZES = (0, 1, 2, 7, 255, 65535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


class Choices:
    """Takes decisions from bytes; after the last byte, every decision is the first choice."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """0 to `below` - 1."""
        size = 1 if below <= 256 else 2 if below <= 65536 else 4
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % below

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(len(choices))]


def harmed_bytes(good: bytes, choices: Choices, within: int | None = None) -> bytes:
    """`good` after one to four edits, in its first `within` bytes."""
    data = bytearray(good)
    for _ in range(1 + choices.number(4)):
        room = max(1, min(len(data), within or len(data)))
        at, kind = choices.number(room), choices.number(7)
        if kind == 0 and data:
            data[at] ^= 1 << choices.number(8)
        elif kind == 1 and data:
            data[at] = choices.number(256)
        elif kind == 2:
            del data[at : at + 1 + choices.number(16)]
        elif kind == 3:
            data[at:at] = bytes(choices.number(256) for _ in range(1 + choices.number(4)))
        elif kind == 4:
            data[at:at] = data[at : at + choices.number(64)]
        elif kind == 5:
            data[at : at + 8] = choices.pick(SIZES).to_bytes(8, "little")
        else:
            del data[at:]
    return bytes(data)


def harmed_value(good: Any, choices: Choices) -> Any:
    """A copy of the JSON value `good` with one to three of its parts replaced or removed."""
    value = deepcopy(good)
    for _ in range(1 + choices.number(3)):
        value = _with_one_change(value, choices)
    return value


def _with_one_change(value: Any, choices: Choices) -> Any:
    if not isinstance(value, dict | list) or not value or not choices.number(12):
        return deepcopy(choices.pick(NASTY))
    key = (
        choices.pick(sorted(value, key=str))
        if isinstance(value, dict)
        else choices.number(len(value))
    )
    match choices.number(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, list):
            value.insert(key, deepcopy(value[key]))
        case 1:
            value[str(choices.pick(NASTY))[:50]] = value.pop(key)
        case _:
            value[key] = _with_one_change(value[key], choices)
    return value


def harmed_json(good: Any, choices: Choices) -> bytes:
    """JSON of a harmed value, which is sometimes harmed as text as well."""
    text = json.dumps(harmed_value(good, choices)).encode()
    return harmed_bytes(text, choices) if not choices.number(8) else text


def harmed_text(parts: Sequence[str], choices: Choices, most: int = 12) -> str:
    """A text of up to `most` - 1 of the `parts`."""
    return "".join(choices.pick(parts) for _ in range(choices.number(most)))
