"""Everything that is looked at, in the order in which it is told.

Knows: the order; that one look that fails must not keep the others from being told. Does not know:
any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from offload.doctor.finding import MISSING, Finding
from offload.doctor.graphics import graphics
from offload.doctor.processor import processor
from offload.doctor.software import software
from offload.doctor.storage import disk, memory, pin_limit
from offload.errors import reason
from offload.home import offload_home

Look = Callable[[], Iterator[Finding]]


def looks() -> dict[str, Look]:
    """What is looked at, by name."""
    return {
        "software": software,
        "processor": processor,
        "memory": memory,
        "pin limit": lambda: pin_limit(torch.cuda.is_available()),
        "disk": lambda: disk(offload_home()),
        "GPUs": graphics,
    }


def examine() -> Iterator[Finding]:
    """Findings, each as soon as it is there: about ten seconds in all."""
    for name, look in looks().items():
        try:
            yield from look()
        except Exception as error:  # whatever a driver or a library raises
            remedy = "report it, with offload doctor --json"
            yield Finding(name, f"could not be looked at: {reason(error)}", MISSING, remedy)
