"""Writes LLVM IR: loops and vectors, and a function whose work an OpenMP team shares."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

LANES = 16  # numbers in a vector; LLVM splits vectors to fit the machine
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

Value = Any  # a value in the program being written; llvmlite has no types
Index = Any  # a value, or a number that is known while the program is written


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def vector(kind: Value, lanes: int = LANES) -> Value:
    return ir.VectorType(kind, lanes)


def every(kind: Value, values: float | Sequence[int]) -> Value:
    """A constant vector with one value for all 16 lanes, or one value for each lane."""
    lanes = [values] * LANES if isinstance(values, int | float) else values
    return ir.Constant(vector(kind, len(lanes)), [ir.Constant(kind, value) for value in lanes])


def number(value: Index) -> Value:
    return ir.Constant(LONG, value) if isinstance(value, int) else value


def bfloat16_bits(value: float) -> int:
    """The bits of `value`, which must be a bfloat16 number."""
    return int.from_bytes(struct.pack("<f", value)[2:], "little")


class Writer:
    """Writes an LLVM module of functions whose first argument points at 64-bit words.

    Its builder `b` appends to the current block.
    """

    WORDS: tuple[str, ...]  # names of the words that every function gets

    def __init__(self, openmp: bool) -> None:
        """With `openmp`, threads share the work; else `run` does all of it."""
        self.openmp = openmp
        self.module = ir.Module("kernel")
        self.b: Value = None
        self.word: dict[str, Value] = {}  # the words of the function that is being written

    # --- functions and loops ----------------------------------------------------------------------

    def begin(self, name: str, *more: Value) -> Value:
        """Begin a function that takes a pointer to the words, and arguments of types `more`."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [POINTER, *more]), name)
        function.attributes.add("nounwind")
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.word = {
            word: self.b.load(self.at(function.args[0], LONG, n), typ=LONG)
            for n, word in enumerate(self.WORDS)
        }
        return function

    def declared(self, name: str, result: Value, *arguments: Value) -> Value:
        """The function `name` outside the module."""
        if name not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(result, list(arguments)), name)
        return self.module.globals[name]

    def write_run(self, part: Value, prepare: Callable[[], None] | None = None) -> None:
        """Write the entry `run(words)`: `prepare`, then `part(words, thread, threads)`.

        As many threads as the word "threads" says each do their part.
        """
        worker = None
        if self.openmp:
            worker = self.begin("worker")  # every thread of the team calls it
            asks = ("omp_get_thread_num", "omp_get_num_threads")
            who = [self.b.sext(self.b.call(self.declared(ask, INT), []), LONG) for ask in asks]
            self.b.call(part, [worker.args[0], *who])
            self.b.ret_void()
        (words,) = self.begin("run").args
        if prepare is not None:
            prepare()
        alone = [words, number(0), number(1)]
        if worker is None:
            self.b.call(part, alone)
        else:
            fork = self.declared("GOMP_parallel", VOID, POINTER, POINTER, INT, INT)
            one = self.b.icmp_signed("==", self.word["threads"], number(1))
            with self.b.if_else(one) as (serial, parallel):
                with serial:
                    self.b.call(part, alone)
                with parallel:
                    threads = self.b.trunc(self.word["threads"], INT)
                    self.b.call(fork, [worker, words, threads, ir.Constant(INT, 0)])
        self.b.ret_void()

    def share(self, count: Index, thread: Value, threads: Value) -> tuple[Value, Value]:
        """The first and the end of a thread's share of `count` things."""
        first = self.b.sdiv(self.times(count, thread), threads)
        return first, self.b.sdiv(self.times(count, self.add(thread, 1)), threads)

    def meet(self, threads: Value) -> None:
        """Wait until all threads of the team have come here."""
        if self.openmp:
            several = self.b.icmp_signed(">", threads, number(1))
            with self.b.if_then(several):
                self.b.call(self.declared("GOMP_barrier", VOID), [])

    @contextmanager
    def loop(self, end: Index, start: Index = 0, step: int = 1) -> Iterator[Value]:
        """Make what is written in this context the body of `for index in range(start, end)`."""
        b = self.b
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(LONG)
        index.add_incoming(number(start), before)
        b.cbranch(b.icmp_signed("<", index, number(end)), body, after)
        b.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, step), b.block)
        b.branch(head)
        b.position_at_end(after)

    # --- indices and memory -----------------------------------------------------------------------

    def add(self, *terms: Index) -> Value:
        total = number(terms[0])
        for term in terms[1:]:
            total = self.b.add(total, number(term))
        return total

    def times(self, a: Index, b: Index) -> Value:
        return self.b.mul(number(a), number(b))

    def least(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def cell(self, outer: Index, size: Index, inner: Index) -> Value:
        """The flat index of [outer, inner] in rows of `size`."""
        return self.add(self.times(outer, size), inner)

    def at(self, pointer: Value, kind: Value, index: Index) -> Value:
        """The address `&pointer[index]` of an array of `kind`."""
        return self.b.gep(pointer, [number(index)], source_etype=kind)

    def place(self, word: str, kind: Value, index: Index) -> Value:
        """The address `&word[index]` of an array of `kind`."""
        return self.at(self.b.inttoptr(self.word[word], POINTER), kind, index)

    def load(self, pointer: Value, kind: Value, lanes: int = LANES) -> Value:
        return self.b.load(pointer, align=1, typ=vector(kind, lanes))

    def prefetch(self, pointer: Value) -> None:
        fetch = self.declared("llvm.prefetch.p0", VOID, POINTER, INT, INT, INT)
        self.b.call(fetch, [pointer, *(ir.Constant(INT, n) for n in (0, 3, 1))])

    # --- vectors ----------------------------------------------------------------------------------

    def zeros(self, count: int) -> list[Value]:
        """`count` variables of 16 floats each; LLVM keeps them in registers where it can."""
        with self.b.goto_entry_block():
            places = [self.b.alloca(vector(FLOAT)) for _ in range(count)]
        for place in places:
            self.b.store(every(FLOAT, 0.0), place)
        return places

    def get(self, place: Value) -> Value:
        return self.b.load(place, typ=vector(FLOAT))

    def splat(self, value: Value) -> Value:
        nothing = ir.Constant(vector(value.type), ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.b.shuffle_vector(one, nothing, every(INT, 0))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        # `fmuladd` is fused only on machines that can; on others `llvm.fma` would call a function.
        fused = self.declared(f"llvm.fmuladd.v{LANES}f32", *[vector(FLOAT)] * 4)
        return self.b.call(fused, [a, b, c])

    def dot(self, total: Value, a: Value, b: Value) -> Value:
        """`total` plus, in each lane, a sum of two products of bfloat16 numbers.

        `a` and `b` are 512 bits of any type; each product is exact. Needs AVX512-BF16.
        """
        pairs = vector(_BFloat(), 2 * LANES)
        dot = self.declared(
            "llvm.x86.avx512bf16.dpbf16ps.512", vector(FLOAT), vector(FLOAT), pairs, pairs
        )
        return self.b.call(dot, [total, self.b.bitcast(a, pairs), self.b.bitcast(b, pairs)])

    def look_up(self, table: Value, indices: Value) -> Value:
        """The words of `table`, 32 of 16 bits, whose places are the low 5 bits of `indices`.

        Needs AVX512-BW.
        """
        words = vector(SHORT, 2 * LANES)
        look_up = self.declared("llvm.x86.avx512.permvar.hi.512", words, words, words)
        return self.b.call(look_up, [table, indices])

    def smallest(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered("<", b, a), b, a)  # where a is NaN, a

    def largest(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", b, a), b, a)

    def across(self, value: Value) -> Value:
        """The sum of a vector's lanes, halves added to halves."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            moved = every(INT, [(n + lanes) % LANES for n in range(LANES)])
            value = self.b.fadd(value, self.b.shuffle_vector(value, value, moved))
        return self.b.extract_element(value, ir.Constant(INT, 0))

    def low_bfloat16(self, value: Value) -> Value:
        """The lower halves of 32-bit words as float32."""
        return self.b.bitcast(self.b.shl(value, every(INT, 16)), vector(FLOAT))

    def high_bfloat16(self, value: Value) -> Value:
        return self.b.bitcast(self.b.and_(value, every(INT, 0xFFFF0000)), vector(FLOAT))

    def to_bfloat16(self, value: Value) -> Value:
        """float32 values rounded to the nearest bfloat16 (ties to even), as 16-bit integers."""
        b = self.b
        whole = b.bitcast(value, vector(INT))
        odd = b.and_(b.lshr(whole, every(INT, 16)), every(INT, 1))
        rounded = b.add(whole, b.add(odd, every(INT, 0x7FFF)))
        return b.trunc(b.lshr(rounded, every(INT, 16)), vector(SHORT))

    def numbers(self, pointer: Value, bfloat16: bool) -> Value:
        """16 numbers from `pointer` on, as float32."""
        if not bfloat16:
            return self.load(pointer, FLOAT)
        return self.low_bfloat16(self.b.zext(self.load(pointer, SHORT), vector(INT)))

    def rounded(self, value: Value, bfloat16: bool) -> Value:
        """float32 values as a tensor of bfloat16 would hold them, if that is asked for."""
        if not bfloat16:
            return value
        return self.low_bfloat16(self.b.zext(self.to_bfloat16(value), vector(INT)))

    def store(self, value: Value, pointer: Value, bfloat16: bool) -> None:
        """Store 16 float32 numbers, rounded to bfloat16 if that is asked for."""
        self.b.store(self.to_bfloat16(value) if bfloat16 else value, pointer, align=1)
