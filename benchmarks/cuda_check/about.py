"""The GPU, its link and its driver, beside every figure.

Knows: nvidia-smi, torch's device properties. Does not know: figures.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

import torch

from benchmarks.machine import machine

QUERY = (
    "driver_version",
    "pcie.link.gen.max",
    "pcie.link.gen.current",
    "pcie.link.width.max",
    "pcie.link.width.current",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)


def about() -> dict[str, Any]:
    """`hardware` and `versions`, with the GPU's."""
    described = machine()
    if torch.cuda.is_available():
        described["hardware"] |= _gpu()
        described["versions"]["cuda"] = torch.version.cuda
    for package in ("triton", "accelerate"):
        described["versions"][package] = _version(package)
    return described


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpus": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "vram_gib": round(properties.total_memory / 2**30, 1),
        **link_now(),
    }


def link_now() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; a link at rest may run slower than it can."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(QUERY)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
