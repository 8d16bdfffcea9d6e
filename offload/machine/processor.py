"""What the system says about the processor: its name, how busy it is.

Knows: /proc/cpuinfo, the system's load. Does not know: what is computed there, how fast.
"""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

CPUINFO = Path("/proc/cpuinfo")
BUSY = 0.5  # programs a core, from which on what is measured is too low


def about_processor() -> dict[str, str]:
    """What Linux says about the first core; nothing elsewhere."""
    try:
        first = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """As people know it, where the system tells; else its kind, like x86_64."""
    return about_processor().get("model name") or platform.processor() or platform.machine()


def programs_a_core() -> float:
    """That were running in the last minute."""
    return psutil.getloadavg()[0] / (psutil.cpu_count() or 1)
