"""Writes LLVM IR that reads a record's matrix: loops and vectors, codes and scales, results.

`quant.codes` describes the order of a record's bytes.

Letters: M tokens, B tokens of a block, K columns, g columns of a group, s groups that share a step.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from offload.quant.codes import PLANES, TILE_ROWS

LANES = 16  # numbers in a vector; LLVM splits vectors to fit the machine
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


POINTER = ir.PointerType()
VOID = ir.VoidType()
VECTORS = TILE_ROWS // LANES
AHEAD = 64  # columns; how far ahead of its use a weight is prefetched
CACHE_LINE = 64

# A kernel's only argument points at these 64-bit words, which `quant.kernels.cpu` fills.
WORDS = (
    "x",  # [M, K]
    "floats",  # scratch [blocks * B, K]: x in float32, where `Kernel.dots` is False
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


def _shorts(values: Sequence[int]) -> Value:
    lanes = [ir.Constant(SHORT, value) for value in values]
    return ir.Constant(ir.VectorType(SHORT, len(lanes)), lanes)


def _bfloat16(value: int) -> int:
    """The bits of a bfloat16 number; exact for `value` from -256 to 256."""
    return int.from_bytes(struct.pack("<f", value)[2:], "little")


def _spread(b: Value, sources: Sequence[Value], places: Sequence[int]) -> Value:
    """16-bit words whose halves are both the byte at the word's place of the two `sources`."""
    kind = ir.VectorType(INT, 2 * len(places))
    mask = ir.Constant(kind, [ir.Constant(INT, place) for place in places for _ in (0, 1)])
    spread = b.shuffle_vector(*sources, mask)
    return b.bitcast(spread, ir.VectorType(SHORT, len(places)))


@dataclass(frozen=True)
class Kernel:
    """What a kernel is compiled for; the kernel learns sizes when it is called."""

    bits: int
    scale_bits: int
    bfloat16: bool  # dtype of tokens and results; else float32
    tokens: int  # B, 1 to 4; 0 for the kernel that dequantises the matrix, transposed
    dots: bool = False  # multiply pairs of bfloat16 by one instruction of AVX512-BF16


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
        short = ir.VectorType(SHORT, 2 * LANES)
        look_up = ir.FunctionType(short, [short, short])
        self._look_up = ir.Function(self.module, look_up, "llvm.x86.avx512.permvar.hi.512")
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        dot = ir.FunctionType(vector(FLOAT), [vector(FLOAT), pairs, pairs])
        self._dot = ir.Function(self.module, dot, "llvm.x86.avx512bf16.dpbf16ps.512")
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

    def least(self, a: Value, b: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def splat(self, value: Value) -> Value:
        nothing = ir.Constant(vector(value.type), ir.Undefined)
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

    def numbers(self, word: str, index: Value) -> Value:
        """16 tokens' numbers from `word[index]` on, as float32."""
        if not self.kernel.bfloat16:
            return self.load(self.place(word, FLOAT, index), FLOAT)
        shorts = self.load(self.place(word, SHORT, index), SHORT)
        return self.low_bfloat16(self.b.zext(shorts, vector(INT)))

    def across(self, value: Value) -> Value:
        """The sum of a vector's lanes, halves added to halves."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            moved = every(INT, [(n + lanes) % LANES for n in range(LANES)])
            value = self.b.fadd(value, self.b.shuffle_vector(value, value, moved))
        return self.b.extract_element(value, ir.Constant(INT, 0))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        return self.b.call(self._fused, [a, b, c])

    def dot(self, total: Value, a: Value, b: Value) -> Value:
        """`total` plus, in each lane, a sum of two products of bfloat16 numbers.

        `a` and `b` are 512 bits of any type; each product is exact.
        """
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        return self.b.call(self._dot, [total, self.b.bitcast(a, pairs), self.b.bitcast(b, pairs)])

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

    def weight_pairs(self, tile: Value, column: Value, index: int) -> Iterator[Value]:
        """Code minus middle, of 16 rows in `column` and the next, as pairs of bfloat16 numbers.

        They are yielded in parts whose sum they are, and each part is exact: a table of 32 numbers
        is looked up by 4 bits of a code at most. Bits above those are not cleared, so the table
        repeats.
        """
        b, bits = self.b, self.kernel.bits
        start = self.times(tile, self.times(self.word["columns"], 8 * bits))
        low = 0
        for width in PLANES[bits]:
            size = 8 * width  # bytes of a column
            at = self.place("weight", BYTE, self.add(start, self.times(column, size)))
            if index == 0:
                self.prefetch(self.at(at, BYTE, AHEAD * size))
            rows = range(index * LANES, (index + 1) * LANES)
            first = min(row % size for row in rows) if size > 2 * LANES else 0
            span = LANES if size > 2 * LANES else size  # bytes of a column that are loaded
            two = [self.load(self.at(at, BYTE, first + n * size), BYTE, span) for n in (0, 1)]
            words = _spread(b, two, [n * span + row % size - first for row in rows for n in (0, 1)])
            if width == 8:  # c - 128 is 128 + c % 128 and -256 or -128, both of which c's bits make
                yield b.or_(b.and_(words, _shorts([0x7F] * 32)), _shorts([0x4300] * 32))
                yield b.xor(b.and_(words, _shorts([0x80] * 32)), _shorts([0xC380] * 32))
                continue
            for piece in range(0, width, 4):
                shifts = [piece + width * (row // size) for row in rows for _ in (0, 1)]
                there = b.lshr(words, _shorts(shifts)) if any(shifts) else words
                known = min(width, 4)
                middle = 2 ** (bits - 1) if low + piece + known == bits else 0
                values = [((n % 2**known) << (low + piece)) - middle for n in range(2 * LANES)]
                table = _shorts([_bfloat16(value) for value in values])
                yield b.call(self._look_up, [table, there])
            start = self.add(start, self.times(self.word["columns"], size))
            low += width

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
