"""Everything that is looked at, in the order in which it is told.

Knows: the order; that one look that fails must not keep the others from being told. Does not know:
any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from offload.errors import reason
from offload.home import offload_home
from offload.machine.doctor import disk, memory, pin_limit
from offload.machine.finding import MISSING, Finding
from offload.machine.graphics import graphics
from offload.machine.processor_part import processor
from offload.machine.software import software

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
