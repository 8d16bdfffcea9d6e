"""The hardware and versions that stand beside a figure."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import offload
from offload.machine.measure import processor_name

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """`hardware` and `versions`, as they go into results."""
    return {
        "hardware": {
            "cpu": processor_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": psutil.cpu_count(logical=False),
            "threads": torch.get_num_threads(),
            "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "moe-offload": offload.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
