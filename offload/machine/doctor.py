"""Examines software, processor, memory, pin limit and disk; `graphics.py` examines GPUs."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from offload.files import existing, offload_home, short
from offload.lines import reason
from offload.machine.finding import MISSING, OK, SLOW, Finding
from offload.machine.graphics import graphics
from offload.machine.measure import (
    BUSY,
    about_processor,
    measure,
    processor_name,
    programs_a_core,
    read_rate,
)
from offload.machine.memory import ram
from offload.quant.matmul import cpu_kernel_works, matmul_packed, matmul_unpacked
from offload.units import gib
from offload.version import __version__

LITTLE_RAM = 2**30
# One channel of DDR4-2400 carries 19 GB/s, and a copy both reads and writes.
SLOW_COPY_GB_PER_S = 6.0
SLOW_DISK_GB_PER_S = 1.0  # SATA reaches 0.55, an NVMe disk of PCIe 3 about 3
LITTLE_DISK = 20 * 2**30


def memory() -> Iterator[Finding]:
    """Findings about RAM: its size and speed."""
    now = ram()
    limit = " (the limit of this container)" * now.limited
    yield Finding(
        "RAM",
        f"{gib(now.total)}{limit}, {gib(now.available)} free",
        data={"total_bytes": now.total, "available_bytes": now.available},
    )
    if now.available < LITTLE_RAM:
        yield Finding("RAM copies", "not measured", SLOW, "RAM is nearly full: close programs")
        return
    rates = measure(torch.device("cpu"))
    threads = torch.get_num_threads()
    copies, products = rates.link_gb_per_s, rates.memory_gb_per_s
    slow = copies < SLOW_COPY_GB_PER_S
    yield Finding(
        "RAM copies",
        f"{copies:.1f} GB/s by one thread, one expert per copy",
        SLOW if slow else OK,
        _slow_copies() if slow else "",
        {"gb_per_s": copies},
    )
    yield Finding(
        "RAM products",
        f"weights read at {products:.1f} GB/s, {threads} thread{'s' * (threads != 1)}",
        data={"gb_per_s": products},
    )


def _slow_copies() -> str:
    """The remedy for slow copies; other programs cause them more often than memory modules."""
    modules = "fill both memory channels, and enable XMP/EXPO in the BIOS"
    if programs_a_core() > BUSY:
        return f"the CPU is busy: run this again when it is idle; if copies stay slow, {modules}"
    return modules


def pin_limit(has_gpu: bool) -> Iterator[Finding]:
    """Findings about how much memory the system lets a program lock."""
    try:
        import resource
    except ImportError:  # Windows lacks this module
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else gib(limit)
    data = {"memlock_bytes": None if unlimited else limit}
    enough = unlimited or limit >= ram().total // 2
    if enough or not has_gpu:
        yield Finding("pin limit", text if has_gpu else f"{text}; used with a GPU only", data=data)
        return
    yield Finding(
        "pin limit",
        f"{text} (ulimit -l)",
        SLOW,
        "if pinning fails: add `* - memlock unlimited` to /etc/security/limits.conf, log in again",
        data,
    )


def disk(home: Path) -> Iterator[Finding]:
    """Findings about the disk that holds `home`, where packs are kept."""
    place = existing(home)
    free = shutil.disk_usage(place).free
    yield Finding(
        "disk space",
        f"{gib(free)} free at {short(place)}",
        MISSING if free < LITTLE_DISK else OK,
        "free some space, or choose another place with OFFLOAD_HOME" if free < LITTLE_DISK else "",
        {"free_bytes": free},
    )
    try:
        rate = read_rate(place)
    except OSError as error:
        remedy = "name a place that can be written with OFFLOAD_HOME"
        why = f"{short(place)} cannot be written ({error.strerror or error})"
        yield Finding("disk reads", f"not measured: {why}", MISSING, remedy)
        return
    slow = rate.gb_per_s < SLOW_DISK_GB_PER_S
    yield Finding(
        "disk reads",
        f"{rate.gb_per_s:.2f} GB/s, {rate.how}",
        SLOW if slow else OK,
        "experts that RAM does not hold wait for it: an NVMe disk (OFFLOAD_HOME), or fewer bits"
        if slow
        else "",
        {"gb_per_s": rate.gb_per_s, "how": rate.how},
    )


SETS = {  # a processor's flag in Linux -> its usual name
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "VNNI",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
}
BITS = (2, 3, 4, 5, 6, 8)


def processor() -> Iterator[Finding]:
    """Findings about cores, instruction sets and CPU kernels."""
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False)
    load = programs_a_core()
    busy = load > BUSY
    yield Finding(
        "processor",
        f"{processor_name()}, {cores or '?'} cores, {threads} thread{'s' * (threads != 1)} used",
        SLOW if busy else OK,
        f"the CPU is busy (load {load:.1f} per core): measured speeds are too low; close programs"
        if busy
        else "",
        {"cores": cores, "threads": threads, "load": load},
    )
    yield _instruction_sets(about_processor())
    yield _kernels()


def _instruction_sets(about: dict[str, str]) -> Finding:
    flags = set((about.get("flags") or about.get("Features") or "").split())
    known = [text for flag, text in SETS.items() if flag in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    data = {"instruction_sets": known, "torch_capability": capability}
    value = f"{', '.join(known) or 'not readable here'}; torch uses {capability}"
    if flags and not flags & {"avx2", "asimd"}:
        remedy = "without AVX2 or NEON the CPU is many times slower: use a GPU or another machine"
        return Finding("instruction sets", value, SLOW, remedy, data)
    return Finding("instruction sets", value, data=data)


def _kernels() -> Finding:
    """Whether the kernels for each number of bits compile here and give the right results."""
    begin = time.perf_counter()
    broken = [
        bits
        for bits in BITS
        if not all(
            cpu_kernel_works(way, bits, 16, torch.bfloat16)
            for way in (matmul_packed, matmul_unpacked)
        )
    ]
    seconds = time.perf_counter() - begin
    data = {"broken_bits": broken, "seconds": seconds}
    if broken:
        return Finding(
            "CPU kernels",
            f"do not work for {', '.join(map(str, broken))} bits",
            MISSING,
            "pip install -U llvmlite; until then products are many times slower",
            data,
        )
    return Finding(
        "CPU kernels", f"compiled, self-test passed for {BITS[0]} to {BITS[-1]} bits", data=data
    )


NEEDED = (
    "torch",
    "transformers",
    "hqq",
    "llvmlite",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)
EXTRAS = {"gguf": "GGUF files and the demo", "matplotlib": "plots"}  # name -> what it is needed for
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
    """Findings about versions and environment variables."""
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
    found = {name: installed_version(name) for name in (*NEEDED, *EXTRAS, "triton")}
    lacking = [name for name in NEEDED if found[name] is None]
    yield Finding(
        "libraries",
        ", ".join(f"{name} {found[name] or 'missing'}" for name in NEEDED),
        MISSING if lacking else OK,
        f"pip install {' '.join(lacking)}" if lacking else "",
        {"versions": found},
    )
    if platform.system() == "Linux":  # there are no wheels of Triton elsewhere
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


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Look = Callable[[], Iterator[Finding]]


def looks() -> dict[str, Look]:
    """All checks, each under the name that is shown if it fails."""
    return {
        "software": software,
        "processor": processor,
        "memory": memory,
        "pin limit": lambda: pin_limit(torch.cuda.is_available()),
        "disk": lambda: disk(offload_home()),
        "GPUs": graphics,
    }


def examine() -> Iterator[Finding]:
    """Yield all findings as they are made, which takes about ten seconds."""
    for name, look in looks().items():
        try:
            yield from look()
        except Exception as error:  # drivers and libraries may raise anything
            remedy = "report it, with offload doctor --json"
            yield Finding(name, f"check failed: {reason(error)}", MISSING, remedy)
