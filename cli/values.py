"""What stands behind a flag, as a value or as an error of usage.

Knows: numbers, pairs, lists of names, and their limits. Does not know: flags.
"""

from __future__ import annotations

import argparse

MOST = 2**31 - 1  # of tokens and repetitions
MOST_THREADS = 1024  # OpenMP ends the process when the system refuses it a thread


def names(text: str) -> list[str]:
    return text.split(",")


def between(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
    return value


def count(text: str) -> int:
    return between(text, 0, MOST)


def positive(text: str) -> int:
    return between(text, 1, MOST)


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def bits(text: str) -> list[int]:
    return [between(part, 2, 16) for part in text.split(",")]


def switches(text: str) -> list[bool | None]:
    """Of "on,off,auto": None is auto."""
    known = {"on": True, "off": False, "auto": None}
    for part in names(text):
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is not on, off or auto")
    return [known[part] for part in names(text)]


def threads(text: str) -> int:
    return between(text, 1, MOST_THREADS)


def pair(text: str) -> tuple[int, int]:
    prompt, _, generated = text.partition(",")
    return positive(prompt), positive(generated)
