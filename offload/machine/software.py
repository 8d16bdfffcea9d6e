"""Python, the libraries, and the variables of the environment that change what is done.

Knows: which packages are needed, which are extras. Does not know: whether they work.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from offload.home import offload_home, short
from offload.machine.finding import MISSING, SLOW, Finding
from offload.version import __version__

NEEDED = (
    "torch",
    "transformers",
    "hqq",
    "llvmlite",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)
EXTRAS = {"gguf": "GGUF files and the demo", "matplotlib": "plots"}  # name -> what for
VARIABLES = (
    "OFFLOAD_HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)


def software() -> Iterator[Finding]:
    """Versions."""
    yield Finding("offload", f"{__version__}, files in {short(offload_home())}")
    release = platform.release()
    subsystem = ", WSL" if "microsoft" in release.casefold() else ""
    kernel = release.partition("-")[0]
    yield Finding(
        "system",
        f"{platform.system()} {kernel}, {platform.machine()}{subsystem}",
        data={"platform": platform.platform()},
    )
    yield Finding("Python", platform.python_version())
    found = {name: _version(name) for name in (*NEEDED, *EXTRAS, "triton")}
    lacking = [name for name in NEEDED if found[name] is None]
    yield Finding(
        "libraries",
        ", ".join(f"{name} {found[name] or 'missing'}" for name in NEEDED),
        MISSING if lacking else "ok",
        f"pip install {' '.join(lacking)}" if lacking else "",
        {"versions": found},
    )
    if platform.system() == "Linux":  # where it is needed: elsewhere there are no wheels of it
        yield _triton(found["triton"])
    for name, use in EXTRAS.items():
        if found[name] is None:
            yield Finding(name, f"not here: only for {use}", MISSING, f"pip install {name}")
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if given:
        text = ", ".join(f"{name}={value}" for name, value in given.items())
        yield Finding("environment", text, data={"variables": given})


def _triton(found: str | None) -> Finding:
    if found is None:
        return Finding("Triton", "not here: GPU kernels need it", MISSING, "pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        remedy = "unset TRITON_INTERPRET: it is for tests"
        return Finding("Triton", f"{found}, interpreting: GPU kernels crawl", SLOW, remedy)
    return Finding("Triton", f"{found}, for GPU kernels")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
