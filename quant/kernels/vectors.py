"""Loops and vectors in LLVM IR, shared by the kernels.

Knows: how llvmlite writes them. Does not know: what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

LANES = 16  # LLVM cuts vectors to what the machine has
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

Value = Any  # of the program being written; llvmlite has no types
Index = Any  # a value, or a number known now


def vector(kind: Value) -> Value:
    return ir.VectorType(kind, LANES)


def every(kind: Value, values: float | Sequence[int]) -> Value:
    """A constant vector: one value for all lanes, or one for each."""
    lanes = [values] * LANES if isinstance(values, int | float) else values
    return ir.Constant(vector(kind), [ir.Constant(kind, value) for value in lanes])


def number(value: Index) -> Value:
    return ir.Constant(LONG, value) if isinstance(value, int) else value


class Writer:
    """A module under construction; `b` writes at the end of the current block."""

    def __init__(self) -> None:
        self.module = ir.Module("kernel")
        self.b: Value = None
        # Fused where the machine can; elsewhere `llvm.fma` would call a function.
        fused = ir.FunctionType(vector(FLOAT), [vector(FLOAT)] * 3)
        self._fused = ir.Function(self.module, fused, f"llvm.fmuladd.v{LANES}f32")
        fetch = ir.FunctionType(VOID, [POINTER, INT, INT, INT])
        self._fetch = ir.Function(self.module, fetch, "llvm.prefetch.p0")

    def function(self, name: str, *arguments: Value) -> Value:
        """Begin a function."""
        function = ir.Function(self.module, ir.FunctionType(VOID, arguments), name)
        function.attributes.add("nounwind")
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        return function

    @contextmanager
    def loop(self, end: Index, start: Index = 0) -> Iterator[Value]:
        """`for index in range(start, end)`."""
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
        index.add_incoming(self.add(index, 1), b.block)
        b.branch(head)
        b.position_at_end(after)

    def add(self, *terms: Index) -> Value:
        total = number(terms[0])
        for term in terms[1:]:
            total = self.b.add(total, number(term))
        return total

    def times(self, a: Index, b: Index) -> Value:
        return self.b.mul(number(a), number(b))

    def at(self, pointer: Value, kind: Value, index: Index) -> Value:
        """`&pointer[index]`, counting in `kind`."""
        return self.b.gep(pointer, [number(index)], source_etype=kind)

    def load(self, pointer: Value, kind: Value, lanes: int = LANES) -> Value:
        return self.b.load(pointer, align=1, typ=ir.VectorType(kind, lanes))

    def splat(self, value: Value) -> Value:
        nothing = ir.Constant(vector(FLOAT), ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.b.shuffle_vector(one, nothing, every(INT, 0))

    def zeros(self, count: int) -> list[Value]:
        """Variables of 16 floats; LLVM keeps them in registers where it can."""
        with self.b.goto_entry_block():
            places = [self.b.alloca(vector(FLOAT)) for _ in range(count)]
        for place in places:
            self.b.store(every(FLOAT, 0.0), place)
        return places

    def get(self, place: Value) -> Value:
        return self.b.load(place, typ=vector(FLOAT))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        return self.b.call(self._fused, [a, b, c])

    def prefetch(self, pointer: Value) -> None:
        self.b.call(self._fetch, [pointer, *(ir.Constant(INT, n) for n in (0, 3, 1))])

    def low_bfloat16(self, value: Value) -> Value:
        """The lower halves of 32 bits, as float32."""
        return self.b.bitcast(self.b.shl(value, every(INT, 16)), vector(FLOAT))

    def high_bfloat16(self, value: Value) -> Value:
        return self.b.bitcast(self.b.and_(value, every(INT, 0xFFFF0000)), vector(FLOAT))

    def to_bfloat16(self, value: Value) -> Value:
        """float32 rounded to nearest even, as 16-bit integers."""
        b = self.b
        whole = b.bitcast(value, vector(INT))
        odd = b.and_(b.lshr(whole, every(INT, 16)), every(INT, 1))
        rounded = b.add(whole, b.add(odd, every(INT, 0x7FFF)))
        return b.trunc(b.lshr(rounded, every(INT, 16)), vector(SHORT))
