"""Compiles the CPU's kernels in memory when they are first asked for.

LLVM comes with llvmlite, so no compiler needs to be installed. Compiling takes 0.1 s, so nothing is
kept on disk.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm

from offload.quant.kernels.layer import LayerKernel, LayerWriter
from offload.quant.kernels.matrix import MatrixWriter
from offload.quant.kernels.norm import NormWriter
from offload.quant.kernels.reader import Kernel
from offload.quant.kernels.rows import RowsKernel, RowsWriter
from offload.quant.kernels.writer import Writer

KernelCall = Callable[[tuple[int, ...]], None]  # the tuple holds the writer's `WORDS`

OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True)
class Processor:
    """A processor to compile for."""

    name: str
    features: str  # as LLVM writes them: "+avx2,-avx512f,..."

    @property
    def wide(self) -> bool:
        """Whether the processor has 32 registers of 16 floats."""
        return "+avx512f" in self.features.split(",")

    @property
    def dots(self) -> bool:
        """Whether the processor multiplies pairs of bfloat16 numbers, and looks 16 bits up."""
        return {"+avx512bf16", "+avx512bw"} <= set(self.features.split(","))


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
    writer = MatrixWriter(kernel, wide=processor.wide, openmp=share_openmp())
    return machine_code(writer, processor)


@functools.cache
def compiled_layer(kernel: LayerKernel, processor: Processor) -> KernelCall:
    """The machine code that computes a layer's experts."""
    writer = LayerWriter(kernel, wide=processor.wide, openmp=share_openmp())
    return machine_code(writer, processor)


@functools.cache
def compiled_rows(kernel: RowsKernel, processor: Processor) -> KernelCall:
    """The machine code for products with a dense matrix."""
    return machine_code(RowsWriter(kernel, openmp=share_openmp()), processor)


@functools.cache
def compiled_norm(processor: Processor) -> KernelCall:
    """The machine code of RMSNorm."""
    return machine_code(NormWriter(), processor)


def machine_code(writer: Writer, processor: Processor) -> KernelCall:
    """Compile what `writer` wrote for `processor`, and return its `run`."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(str(writer.module))
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
    words = ctypes.c_int64 * len(writer.WORDS)
    return lambda numbers: run(words(*numbers))
