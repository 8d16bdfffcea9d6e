"""Whether a model said the same, wherever its experts came from and whoever planned.

Knows: runs by name, which begins with their engine's. Does not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

from benchmarks.cuda_check.seam import DEVICE, HOST
from benchmarks.cuda_check.store import Row

Found = TypeVar("Found")


class NotEqualError(Exception):
    """Answers that should be one differ."""


def logits_rows(digests: Mapping[str, str]) -> Iterator[Row]:
    """Whether logits were the same to the last bit: of each engine's runs, and of all."""
    for engine, runs in _groups(digests):
        found = sorted(set(runs.values()))
        yield {
            "kind": "logits",
            "engine": engine,
            "runs": len(runs),
            "bit_equal": len(found) == 1,
            "digests": ", ".join(found),
        }


def tokens_rows(said: Mapping[str, Sequence[int]]) -> Iterator[Row]:
    """Whether greedy tokens were the same, as above; `agree` is how many at least, from the first
    on."""
    for engine, runs in _groups(said):
        first, *others = runs.values()
        agree = min([len(first), *(_common(first, other) for other in others)])
        yield {
            "kind": "tokens",
            "engine": engine,
            "runs": len(runs),
            "equal": all(tuple(other) == tuple(first) for other in others),
            "tokens": max(map(len, runs.values())),
            "agree": agree,
        }


def need_equal(row: Row) -> None:
    """Raise `NotEqualError` where a row of `tokens_rows` says that answers differ."""
    if not row["equal"]:
        raise NotEqualError(
            f"{row['runs']} answers of {row['tokens']} tokens agree in the first {row['agree']}"
        )


def _groups(of_runs: Mapping[str, Found]) -> Iterator[tuple[str, dict[str, Found]]]:
    """The runs of each engine, and of both where there are both."""
    engines = {
        engine: {name: found for name, found in of_runs.items() if name.startswith(engine)}
        for engine in (DEVICE, HOST)
    }
    yield from ((engine, runs) for engine, runs in engines.items() if runs)
    if all(engines.values()):
        yield "both", dict(of_runs)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    longest = min(len(one), len(other))
    return next(at for at in count() if at == longest or one[at] != other[at])
