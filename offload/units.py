"""Numbers as people write them: sizes, counts, shares and lists."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from offload.errors import BudgetError

SHARE = 0.9  # of the memory that is free at the start, used if the user names no budget
UBATCH = 2048  # tokens of a prompt that go through the model at once, and share each expert's load
# Models that must read a prompt as a whole: transformers 5.24 loses their recurrent state when
# several tokens follow earlier ones.
READ_WHOLE = frozenset({"jamba"})
SEES_PADDING = frozenset({"deepseek_v4"})  # models whose attention compresses padding, too
UNITS = {"": 1, "B": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 2**10), ("IB", 2**10), ("B", 10**3))
}
MOST_SLOTS = 2**31  # more than any model has
LEAST_BYTES = 2**20  # of a size without a unit: a smaller number was meant as GiB
MOST_BYTES = 2**60  # more than any machine has
MOST = 2**31 - 1  # tokens or repetitions


def parse_bytes(text: str | int | None) -> int | None:
    """Bytes from a number or text like "20GiB"; None gives None. Raises `BudgetError`."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise BudgetError(f"{text!r} is not a size: write bytes or a size like 20GiB")
    size = float(match.group(1)) * unit
    if size > MOST_BYTES:
        raise BudgetError(f"{text!r} is more than any machine has: write a size like 20GiB")
    return int(size)


def parse_gpus(gpus: str | Sequence[int | str]) -> list[str]:
    """The names of the devices in `gpus`. Raises `BudgetError`."""
    if not isinstance(gpus, str):
        names = [f"cuda:{gpu}" if isinstance(gpu, int) else gpu for gpu in gpus]
    else:
        parts = [part.strip() for part in gpus.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise BudgetError(
                f"--gpus {gpus!r} is not a list of GPUs: write their numbers like 0,1"
            )
        names = [f"cuda:{int(part)}" for part in parts]
    cuda = [name for name in names if name != "cpu"]
    if not names or len(set(cuda)) < len(cuda):
        raise BudgetError(
            f"--gpus {gpus!r} does not name each GPU once: write their numbers like 0,1"
        )
    return names


def parse_sizes(vram: str | int | None, cards: int) -> list[int | None]:
    """Bytes to use on each card, None where the user gave none. Raises `BudgetError`."""
    if not isinstance(vram, str) or "," not in vram:
        return [parse_bytes(vram)] * cards
    sizes = [parse_bytes(part) for part in vram.split(",")]
    if len(sizes) != cards:
        raise BudgetError(
            f"--vram has {len(sizes)} sizes for {cards} GPUs: give one for each, or one for all"
        )
    return sizes


def check_size(given: str | int | None) -> None:
    """Raise `BudgetError` for a number without a unit that cannot be meant as bytes."""
    if str(given).isdecimal() and 0 < float(given or 0) < LEAST_BYTES:
        raise BudgetError(f"{given!r} without a unit means bytes: write one, like '20GiB'")


def parse_slots(given: float | str | None, total: int) -> int | None:
    """Expert slots from a number, or a share of `total` like "25%" or 0.25; None gives None.

    Raises `BudgetError`.
    """
    if isinstance(given, float):
        if not 0 < given <= 1:
            raise BudgetError(
                f"{given} is not a share of the experts: write one above 0, at most 1.0, or a "
                "whole number of expert slots"
            )
        return max(1, round(total * given))
    if given is None or isinstance(given, int):
        return given
    text = str(given)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match.group(2) and "." in match.group(1)):
        raise BudgetError(
            f"{text!r} is not a number of expert slots: write a number or a share like 25%"
        )
    value = min(float(match.group(1)), MOST_SLOTS)
    if match.group(2) and value > 100:
        raise BudgetError(f"{text.strip()[:40]} is more than all experts: write at most 100%")
    return max(1, round(total * value / 100)) if match.group(2) else int(value)


def gib(size: int, digits: int = 2) -> str:
    """A size in GiB with `digits` after the point, or a smaller one in MiB with one digit less."""
    if size >= 2**30:
        return f"{size / 2**30:.{digits}f} GiB"
    return f"{size / 2**20:.{digits - 1}f} MiB"


def between(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
        return value

    return parse


count, positive = between(0, MOST), between(1, MOST)


def seed(text: str) -> int | None:
    """An argparse type: a seed; -1 stands for a random one."""
    value = between(-1, 2**63 - 1)(text)
    return None if value < 0 else value


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: several values with commas between them, each read by `parse`."""
    return lambda text: [parse(part) for part in text.split(",")]
