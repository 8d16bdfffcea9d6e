"""Writes LLVM IR that reads a record's matrix: loops and vectors, codes and scales, results.

`quant.codes` describes the order of a record's bytes.

Letters: M tokens, B tokens of a block, K columns, g columns of a group, s groups that share a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from offload.quant.codes import PLANES, TILE_ROWS

LANES = 16  # numbers in a vector; LLVM splits vectors to fit the machine
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
POINTER = ir.PointerType()
VOID = ir.VoidType()
VECTORS = TILE_ROWS // LANES
AHEAD = 64  # columns; how far ahead of its use a weight is prefetched
CACHE_LINE = 64

# A kernel's only argument points at these 64-bit words, which `quant.kernels.cpu` fills.
WORDS = (
    "x",  # [M, K]
    "floats",  # scratch [blocks * B, K]: x in float32
    "sums",  # scratch [blocks * B, K/g]: x summed over each group
    "tokens",  # M
    "blocks",
    "weight",  # [tiles, K * bits * 8]
    "scales",  # [K/g, rows, 2], from the first row of the first tile on
    "steps",  # [K/g/s, rows, 4], from the same row on
    "out",  # [blocks * B, tiles * 64], or [K, tiles * 64] when unpacking
    "tiles",
    "rows",
    "groups",
    "group_size",
    "shared",  # s: groups that share a step
    "threads",
)

Value = Any  # a value in the program being written; llvmlite has no types
Index = Any  # a value, or a number that is known while the program is written


def vector(kind: Value) -> Value:
    return ir.VectorType(kind, LANES)


def every(kind: Value, values: float | Sequence[int]) -> Value:
    """A constant vector with one value for all lanes, or one value for each lane."""
    lanes = [values] * LANES if isinstance(values, int | float) else values
    return ir.Constant(vector(kind), [ir.Constant(kind, value) for value in lanes])


def number(value: Index) -> Value:
    return ir.Constant(LONG, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Kernel:
    """What a kernel is compiled for; the kernel learns sizes when it is called."""

    bits: int
    scale_bits: int
    bfloat16: bool  # dtype of tokens and results; else float32
    tokens: int  # B, 1 to 4; 0 for the kernel that dequantises the matrix, transposed


class Reader:
    """Writes an LLVM module of functions whose first argument points at `WORDS`.

    Its builder `b` appends to the current block.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.module = ir.Module("kernel")
        self.b: Value = None
        self.word: dict[str, Value] = {}  # the words of the function that is being written
        # `fmuladd` is fused only on machines that can; on others `llvm.fma` would call a function.
        fused = ir.FunctionType(vector(FLOAT), [vector(FLOAT)] * 3)
        self._fused = ir.Function(self.module, fused, f"llvm.fmuladd.v{LANES}f32")
        fetch = ir.FunctionType(VOID, [POINTER, INT, INT, INT])
        self._fetch = ir.Function(self.module, fetch, "llvm.prefetch.p0")

    def begin(self, name: str, *more: Value) -> Value:
        """Begin a function that takes a pointer to the words, and arguments of types `more`."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [POINTER, *more]), name)
        function.attributes.add("nounwind")
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.word = {
            word: self.b.load(self.at(function.args[0], LONG, n), typ=LONG)
            for n, word in enumerate(WORDS)
        }
        self.word["columns"] = self.times(self.word["groups"], self.word["group_size"])
        return function

    @contextmanager
    def loop(self, end: Index, start: Index = 0) -> Iterator[Value]:
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
        """The address `&pointer[index]` of an array of `kind`."""
        return self.b.gep(pointer, [number(index)], source_etype=kind)

    def load(self, pointer: Value, kind: Value, lanes: int = LANES) -> Value:
        return self.b.load(pointer, align=1, typ=ir.VectorType(kind, lanes))

    def splat(self, value: Value) -> Value:
        nothing = ir.Constant(vector(FLOAT), ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.b.shuffle_vector(one, nothing, every(INT, 0))

    def zeros(self, count: int) -> list[Value]:
        """`count` variables of 16 floats each; LLVM keeps them in registers where it can."""
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

    def place(self, word: str, kind: Value, index: Index) -> Value:
        """The address `&word[index]` of an array of `kind`."""
        return self.at(self.b.inttoptr(self.word[word], POINTER), kind, index)

    def cell(self, outer: Index, size: Index, inner: Index) -> Value:
        """The flat index of [outer, inner] in rows of `size`."""
        return self.add(self.times(outer, size), inner)

    def codes(self, tile: Value, column: Value, index: int) -> Value:
        """The codes in one column of the tile's vector of rows number `index`, as float32."""
        b = self.b
        start = self.times(tile, self.times(self.word["columns"], 8 * self.kernel.bits))
        codes = None
        low = 0
        for width in PLANES[self.kernel.bits]:
            size = 8 * width  # bytes of a column
            part, byte = divmod(index * LANES, size)
            at = self.place("weight", BYTE, self.add(start, self.times(column, size), byte))
            if index == 0:
                self.prefetch(self.at(at, BYTE, AHEAD * size))
            lanes = min(size, LANES)
            value = b.zext(self.load(at, BYTE, lanes), ir.VectorType(INT, lanes))
            if lanes < LANES:
                repeated = every(INT, [n % lanes for n in range(LANES)])
                value = b.shuffle_vector(value, value, repeated)
            shifts = [width * (part + n // lanes) for n in range(LANES)]
            value = b.and_(b.lshr(value, every(INT, shifts)), every(INT, 2**width - 1))
            value = b.shl(value, every(INT, low))
            codes = value if codes is None else b.or_(codes, value)
            start = self.add(start, self.times(self.word["columns"], size))
            low += width
        return b.sitofp(codes, vector(FLOAT))

    def scale(self, tile: Value, group: Value, index: int) -> tuple[Value, Value]:
        """The scales and offsets in one group of the tile's vector of rows number `index`."""
        b = self.b
        row = self.cell(tile, TILE_ROWS, index * LANES)
        pair = self.cell(group, self.word["rows"], row)
        if self.kernel.scale_bits == 16:
            pairs = self.load(self.place("scales", INT, pair), INT)
            return self.low_bfloat16(pairs), self.high_bfloat16(pairs)
        pairs = b.zext(self.load(self.place("scales", SHORT, pair), SHORT), vector(INT))
        span = self.cell(b.sdiv(group, self.word["shared"]), self.word["rows"], row)
        steps = self.load(self.place("steps", LONG, span), LONG)

        def counted(code: Value, half: Value) -> Value:
            step = b.trunc(half, vector(INT))
            product = b.fmul(b.sitofp(code, vector(FLOAT)), self.low_bfloat16(step))
            return b.fadd(product, self.high_bfloat16(step))

        scale = counted(b.and_(pairs, every(INT, 255)), steps)
        return scale, counted(b.lshr(pairs, every(INT, 8)), b.lshr(steps, every(LONG, 32)))

    def prefetch_scales(self, tile: Value, group: Value) -> None:
        """Prefetch a group's scales, because the processor cannot guess such distant addresses."""
        size = self.kernel.scale_bits // 4  # bytes of a pair
        pair = self.cell(group, self.word["rows"], self.times(tile, TILE_ROWS))
        at = self.place("scales", BYTE, self.times(pair, size))
        for line in range(0, TILE_ROWS * size, CACHE_LINE):
            self.prefetch(self.at(at, BYTE, line))

    def store(self, value: Value, outer: Value, tile: Value, index: int) -> None:
        """Store the results of the tile's vector `index` in `out[outer]`, which holds all rows."""
        rows = self.times(self.word["tiles"], TILE_ROWS)
        at = self.cell(outer, rows, self.cell(tile, TILE_ROWS, index * LANES))
        if self.kernel.bfloat16:
            self.b.store(self.to_bfloat16(value), self.place("out", SHORT, at), align=1)
        else:
            self.b.store(value, self.place("out", FLOAT, at), align=1)
