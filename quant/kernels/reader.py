"""Reading a record's matrix in LLVM IR: codes, scales, and where results go.

Knows: the order of bytes in a record (`quant.packing`, `quant.scales`). Does not know: what is done
with them.
"""

from __future__ import annotations

from llvmlite import ir
from offload.quant.codes import PLANES, TILE_ROWS
from offload.quant.kernels.kernel import WORDS, Kernel
from offload.quant.kernels.vectors import (
    BYTE,
    FLOAT,
    INT,
    LANES,
    LONG,
    POINTER,
    SHORT,
    Index,
    Value,
    Writer,
    every,
    vector,
)

VECTORS = TILE_ROWS // LANES
AHEAD = 64  # columns; how far weights are asked for before they are used
CACHE_LINE = 64


class Reader(Writer):
    """A writer of functions whose first argument points at the words."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.word: dict[str, Value] = {}  # of the function being written

    def begin(self, name: str, *more: Value) -> Value:
        """Begin a function of the words and `more`."""
        function = self.function(name, POINTER, *more)
        self.word = {
            word: self.b.load(self.at(function.args[0], LONG, n), typ=LONG)
            for n, word in enumerate(WORDS)
        }
        self.word["columns"] = self.times(self.word["groups"], self.word["group_size"])
        return function

    def place(self, word: str, kind: Value, index: Index) -> Value:
        """`&word[index]`."""
        return self.at(self.b.inttoptr(self.word[word], POINTER), kind, index)

    def cell(self, outer: Index, size: Index, inner: Index) -> Value:
        """The flat index of [outer, inner] where rows are `size` long."""
        return self.add(self.times(outer, size), inner)

    def codes(self, tile: Value, column: Value, index: int) -> Value:
        """Codes of one column and the tile's vector `index`, as float32."""
        b = self.b
        start = self.times(tile, self.times(self.word["columns"], 8 * self.kernel.bits))
        codes = None
        low = 0
        for width in PLANES[self.kernel.bits]:
            size = 8 * width  # bytes a column; as many rows share their place in them
            part, byte = divmod(index * LANES, size)
            at = self.place("weight", BYTE, self.add(start, self.times(column, size), byte))
            if index == 0:
                self.prefetch(self.at(at, BYTE, AHEAD * size))
            lanes = min(size, LANES)
            value = b.zext(self.load(at, BYTE, lanes), ir.VectorType(INT, lanes))
            if lanes < LANES:
                value = b.shuffle_vector(
                    value, value, every(INT, [n % lanes for n in range(LANES)])
                )
            shifts = [width * (part + n // lanes) for n in range(LANES)]
            value = b.and_(b.lshr(value, every(INT, shifts)), every(INT, 2**width - 1))
            value = b.shl(value, every(INT, low))
            codes = value if codes is None else b.or_(codes, value)
            start = self.add(start, self.times(self.word["columns"], size))
            low += width
        return b.sitofp(codes, vector(FLOAT))

    def scale(self, tile: Value, group: Value, index: int) -> tuple[Value, Value]:
        """Scale and offset of one group and the tile's vector `index`."""
        b = self.b
        row = self.cell(tile, TILE_ROWS, index * LANES)
        pair = self.cell(group, self.word["rows"], row)
        if self.kernel.scale_bits == 16:
            pairs = self.load(self.place("scales", INT, pair), INT)
            return self.low_bfloat16(pairs), self.high_bfloat16(pairs)
        pairs = b.zext(self.load(self.place("scales", SHORT, pair), SHORT), vector(INT))
        span = self.cell(b.sdiv(group, self.word["shared"]), self.word["rows"], row)
        steps = self.load(self.place("steps", LONG, span), LONG)
        codes = b.and_(pairs, every(INT, 255)), b.lshr(pairs, every(INT, 8))
        halves = steps, b.lshr(steps, every(LONG, 32))
        values = []
        for code, half in zip(codes, halves, strict=True):
            counted = b.trunc(half, vector(INT))
            product = b.fmul(b.sitofp(code, vector(FLOAT)), self.low_bfloat16(counted))
            values.append(b.fadd(product, self.high_bfloat16(counted)))
        return values[0], values[1]

    def prefetch_scales(self, tile: Value, group: Value) -> None:
        """Groups lie `rows` pairs apart: too far for the processor to guess."""
        size = self.kernel.scale_bits // 4  # bytes of a pair
        pair = self.cell(group, self.word["rows"], self.times(tile, TILE_ROWS))
        at = self.place("scales", BYTE, self.times(pair, size))
        for line in range(0, TILE_ROWS * size, CACHE_LINE):
            self.prefetch(self.at(at, BYTE, line))

    def store(self, value: Value, outer: Value, tile: Value, index: int) -> None:
        """The results of the tile's vector `index`: `out[outer]` has a place for every row."""
        rows = self.times(self.word["tiles"], TILE_ROWS)
        at = self.cell(outer, rows, self.cell(tile, TILE_ROWS, index * LANES))
        if self.kernel.bfloat16:
            self.b.store(self.to_bfloat16(value), self.place("out", SHORT, at), align=1)
        else:
            self.b.store(value, self.place("out", FLOAT, at), align=1)
