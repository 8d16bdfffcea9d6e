"""A peer without a model. Its process imports neither torch nor what the tests import."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from peer_process import Spec


def fake(pipe: Connection, spec: Spec, context: int, threads: int, scratch: Path) -> None:
    """A peer that answers at once, and fails at what `bits` names after its colon."""
    _, _, fatal = spec.bits.partition(":")
    answers: dict[str, Any] = {
        "distributions": np.log(np.full((2, 4), 0.25, dtype=np.float32)),
        "greedy": [1, 2],
        "timed": (0.5, 0.25),
        "facts": {"peak_memory": 2**30},
    }
    asked, times = "load", 0
    while True:
        times += asked == "timed"
        if fatal in (asked, f"{asked} {times}"):
            os._exit(3)
        if fatal == f"say so at {asked}":
            pipe.send(("failed", "Traceback:\nValueError: no"))
            return
        pipe.send(("ok", answers.get(asked)))
        if (message := pipe.recv()) is None:
            return
        asked = message[0]
