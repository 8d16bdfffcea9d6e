"""Writes the CPU's kernels as LLVM IR and compiles them in memory when they are first asked for.

A kernel runs over tiles of 64 rows, in vectors of 16 rows. Each row is summed by one thread in a
fixed order, so results depend neither on the number of threads nor on the number of tokens.

LLVM comes with llvmlite, so no compiler needs to be installed. Compiling takes 0.1 s, so nothing is
kept on disk.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir

from offload.quant.kernels.reader import (
    FLOAT,
    INT,
    LANES,
    LONG,
    POINTER,
    SHORT,
    VECTORS,
    VOID,
    WORDS,
    Kernel,
    Reader,
    Value,
    every,
    number,
)

KernelCall = Callable[[tuple[int, ...]], None]  # the tuple holds `reader.WORDS`

OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class Emitter(Reader):
    """Writes one kernel, whose entry is `run(words)`."""

    def __init__(self, kernel: Kernel, *, wide: bool, openmp: bool) -> None:
        """`wide` machines have 32 registers of 16 floats; with `openmp`, threads share the work."""
        super().__init__(kernel)
        # How many vectors of rows at a time can keep their sums in registers.
        self._step = VECTORS if wide or not kernel.tokens else max(1, VECTORS // kernel.tokens)
        part = self._part()
        self._run(part, self._worker(part) if openmp else None)

    def _part(self) -> Value:
        """Write `part(words, thread, threads)`, which computes one thread's share of the tiles."""
        function = self.begin("part", LONG, LONG)
        _, thread, threads = function.args
        tiles = self.word["tiles"]
        first = self.b.sdiv(self.times(tiles, thread), threads)
        end = self.b.sdiv(self.times(tiles, self.add(thread, 1)), threads)
        if self.kernel.tokens:
            with self.loop(end, first) as tile, self.loop(self.word["blocks"]) as block:
                self._multiply(tile, block)
        else:  # the outer loop runs over groups, so that neighbouring results are written together
            with self.loop(self.word["groups"]) as group, self.loop(end, first) as tile:
                self._unpack(tile, group)
        self.b.ret_void()
        return function

    def _multiply(self, tile: Value, block: Value) -> None:
        """Multiply one tile by a block of tokens.

        With codes c and the middle code m, the sum of ((c - m) * scale + offset) * x over a group
        is scale * sum(c * x) + (offset - m * scale) * sum(x). Pairs have c - m in place of c.
        """
        count = self.kernel.tokens
        middle = every(FLOAT, -float(2 ** (self.kernel.bits - 1)))
        tokens = [self.cell(block, count, t) for t in range(count)]
        results = [self.zeros(VECTORS) for _ in tokens]
        with self.loop(self.word["groups"]) as group:
            self.prefetch_scales(tile, self.add(group, 1))
            for first in range(0, VECTORS, self._step):
                indices = range(first, first + self._step)
                sums = self._sum_group(tile, group, tokens, indices)
                for v, index in enumerate(indices):
                    scale, offset = self.scale(tile, group, index)
                    xs = [self._x("sums", token, group) for token in tokens]
                    shift = offset
                    if not self.kernel.dots:
                        shift = self.multiply_add(middle, scale, offset)
                    for x, codes, places in zip(xs, sums, results, strict=True):
                        result = self.get(places[index])
                        scaled = self.multiply_add(scale, self.get(codes[v]), result)
                        self.b.store(self.multiply_add(shift, x, scaled), places[index])
        for token, places in zip(tokens, results, strict=True):
            for index, place in enumerate(places):
                self.store(self.get(place), token, tile, index)

    def _sum_group(
        self, tile: Value, group: Value, tokens: list[Value], indices: range
    ) -> list[list[Value]]:
        """Sum code * x over a group's columns, for each token and vector."""
        sums = [self.zeros(len(indices)) for _ in tokens]
        if self.kernel.dots:
            self._sum_pairs(tile, group, tokens, indices, sums)
            return sums
        with self.loop(self.word["group_size"]) as k:
            column = self.cell(group, self.word["group_size"], k)
            codes = [self.codes(tile, column, index) for index in indices]
            for token, places in zip(tokens, sums, strict=True):
                x = self._x("floats", token, column)
                for code, place in zip(codes, places, strict=True):
                    self.b.store(self.multiply_add(x, code, self.get(place)), place)
        return sums

    def _sum_pairs(
        self,
        tile: Value,
        group: Value,
        tokens: list[Value],
        indices: range,
        sums: list[list[Value]],
    ) -> None:
        """Add (code - middle) * x over a group's columns to `sums`, two columns at a time."""
        last = self.add(self.word["tokens"], -1)
        sources = [self.least(token, last) for token in tokens]
        with self.loop(self.b.sdiv(self.word["group_size"], number(2))) as k:
            column = self.cell(group, self.word["group_size"], self.times(k, 2))
            xs = []
            for token in sources:
                at = self.place("x", SHORT, self.cell(token, self.word["columns"], column))
                xs.append(self.splat(self.b.load(at, typ=INT, align=2)))
            for v, index in enumerate(indices):
                for weights in self.weight_pairs(tile, column, index):
                    for x, places in zip(xs, sums, strict=True):
                        self.b.store(self.dot(self.get(places[v]), weights, x), places[v])

    def _x(self, word: str, token: Value, index: Value) -> Value:
        """One number of a token's "floats" or "sums", copied to all lanes."""
        size = self.word["columns" if word == "floats" else "groups"]
        at = self.place(word, FLOAT, self.cell(token, size, index))
        return self.splat(self.b.load(at, typ=FLOAT))

    def _unpack(self, tile: Value, group: Value) -> None:
        """Dequantise one tile's weights of one group.

        Product and sum are not fused, so the weights equal those of `quant.matmul.dequantize` to
        the last bit.
        """
        b = self.b
        middle = every(FLOAT, float(2 ** (self.kernel.bits - 1)))
        scales = [self.scale(tile, group, index) for index in range(VECTORS)]
        with self.loop(self.word["group_size"]) as k:
            column = self.cell(group, self.word["group_size"], k)
            for index, (scale, offset) in enumerate(scales):
                centred = b.fsub(self.codes(tile, column, index), middle)
                weight = b.fadd(b.fmul(centred, scale), offset)
                self.store(weight, column, tile, index)

    def _prepare(self) -> None:
        """Fill "floats" and "sums"; the last token is repeated until its block is full."""
        word = self.word
        last = self.add(word["tokens"], -1)
        (total,) = self.zeros(1)
        with self.loop(self.times(word["blocks"], self.kernel.tokens)) as token:
            source = self.least(token, last)
            with self.loop(word["groups"]) as group:
                self.b.store(every(FLOAT, 0.0), total)
                with self.loop(self.b.sdiv(word["group_size"], number(LANES))) as k:
                    column = self.cell(group, word["group_size"], self.times(k, LANES))
                    x = self.numbers("x", self.cell(source, word["columns"], column))
                    self.b.store(self.b.fadd(self.get(total), x), total)
                    if not self.kernel.dots:
                        to = self.cell(token, word["columns"], column)
                        self.b.store(x, self.place("floats", FLOAT, to), align=4)
                to = self.cell(token, word["groups"], group)
                self.b.store(self.across(self.get(total)), self.place("sums", FLOAT, to))

    def _worker(self, part: Value) -> Value:
        """Write `worker(words)`, which every thread of an OpenMP team calls."""
        function = self.begin("worker")
        who = []
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            ask = ir.Function(self.module, ir.FunctionType(INT, []), name)
            who.append(self.b.sext(self.b.call(ask, []), LONG))
        self.b.call(part, [function.args[0], *who])
        self.b.ret_void()
        return function

    def _run(self, part: Value, worker: Value | None) -> None:
        """Write `run(words)`, which does all the work on as many threads as the words say."""
        (words,) = self.begin("run").args
        b, one = self.b, number(1)
        alone = [words, number(0), one]
        if self.kernel.tokens:
            self._prepare()
        if worker is None:
            b.call(part, alone)
        else:
            kinds = [POINTER, POINTER, INT, INT]
            fork = ir.Function(self.module, ir.FunctionType(VOID, kinds), "GOMP_parallel")
            with b.if_else(b.icmp_signed("==", self.word["threads"], one)) as (serial, parallel):
                with serial:
                    b.call(part, alone)
                with parallel:
                    threads = b.trunc(self.word["threads"], INT)
                    b.call(fork, [worker, words, threads, ir.Constant(INT, 0)])
        b.ret_void()


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
    words = ctypes.c_int64 * len(WORDS)
    return lambda numbers: run(words(*numbers))
