"""Compiles a CPU kernel to machine code in memory when it is first asked for.

LLVM comes with llvmlite, so no compiler needs to be installed. Compiling takes 0.1 s, so nothing is
kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
from offload.quant.kernels.emit import Emitter
from offload.quant.kernels.kernel import Kernel

KernelCall = Callable[["ctypes.Array[ctypes.c_int64]"], None]  # the array holds `kernel.WORDS`

OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True)
class Processor:
    """A processor to compile for."""

    name: str
    features: str  # as LLVM writes them: "+avx2,-avx512f,..."

    @property
    def wide(self) -> bool:
        """Whether the processor has 32 registers of 16 floats."""
        return "+avx512f" in self.features.split(",")


@functools.cache
def this_processor() -> Processor:
    return Processor(llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


@functools.cache
def share_openmp() -> bool:
    """Let kernels call the OpenMP that torch has loaded (GNU's or LLVM's); False if there is none.

    A second pool of threads would compete with torch's for cores. Windows has no OpenMP to share.
    """
    try:
        loaded = ctypes.CDLL(None)
        places = {name: ctypes.cast(getattr(loaded, name), ctypes.c_void_p) for name in OPENMP}
    except (TypeError, OSError, AttributeError):
        return False
    for name, place in places.items():
        llvm.add_symbol(name, place.value)
    return True


@functools.cache
def compiled(kernel: Kernel, processor: Processor) -> KernelCall:
    """The machine code of `kernel` for `processor`, ready to be called."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text = str(Emitter(kernel, wide=processor.wide, openmp=share_openmp()).module)
    module = llvm.parse_assembly(text)
    # LLVM would halve vectors because older processors slowed down for long ones.
    features = processor.features + (",-prefer-256-bit" if processor.wide else "")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor.name, features=features, opt=3, jit=True
    )
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    run.engine = engine  # type: ignore[attr-defined]  # keeps the code alive
    return run
