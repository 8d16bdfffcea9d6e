"""The parts of the check, and how long each may take.

Knows: their names, in order. Does not know: how one is run (`__main__`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cuda_check import kernels, link, models, suite
from benchmarks.cuda_check.setting import Setting
from benchmarks.cuda_check.shapes import CASES
from benchmarks.cuda_check.store import Part as Results


@dataclass(frozen=True)
class Part:
    """A part runs in a process of its own and may take so many seconds; None: a share of the
    rest. Only the tests see more than one GPU."""

    name: str
    run: Callable[[Setting, Results], None]
    seconds: float | None
    all_gpus: bool = False


PARTS = (
    Part("tests", suite.run, 85, all_gpus=True),
    Part("link", link.run, 60),
    Part("kernels", kernels.run, 80),
    *(Part(case.name, models.runner(case), None) for case in CASES),
)
