"""Writes LLVM IR that reads a record's matrix: codes and scales.

`quant.codes` describes the order of a record's bytes.

Letters: M tokens, B tokens of a block, K columns, g columns of a group, s groups that share a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llvmlite import ir

from offload.quant.codes import PLANES, TILE_ROWS
from offload.quant.kernels.writer import (
    BYTE,
    FLOAT,
    INT,
    LANES,
    LONG,
    SHORT,
    Value,
    Writer,
    bfloat16_bits,
    every,
    vector,
)

VECTORS = TILE_ROWS // LANES
AHEAD = 64  # columns; how far ahead of its use a weight is prefetched
CACHE_LINE = 64

# A kernel's only argument points at these 64-bit words, which `quant.kernels.cpu` fills.
WORDS = (
    "x",  # [M, K]
    "floats",  # scratch [M, K]: x in float32, where `Kernel.dots` is False
    "sums",  # scratch [M, K/g]: x summed over each group
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
    # Whether pairs of bfloat16 are multiplied by one instruction of AVX512-BF16. For 8 bits, whose
    # codes are no table's indices, floats are quicker.
    dots: bool = False


class Reader(Writer):
    """Writes functions that read matrices of records. `word` has what `WORDS` describes."""

    WORDS: tuple[str, ...] = WORDS

    def __init__(self, kernel: Kernel, *, wide: bool, openmp: bool) -> None:
        """`wide` machines have 32 registers of 16 floats."""
        super().__init__(openmp)
        self.kernel = kernel
        self.bfloat16 = kernel.bfloat16
        self.kind = SHORT if kernel.bfloat16 else FLOAT  # of tokens and results
        # How many vectors of rows at a time can keep their sums in registers.
        self._step = VECTORS if wide or not kernel.tokens else max(1, VECTORS // kernel.tokens)

    def begin(self, name: str, *more: Value) -> Value:
        """Begin a function as `Writer.begin` does."""
        function = super().begin(name, *more)
        self.word["columns"] = self.times(self.word["groups"], self.word["group_size"])
        return function

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
            value = b.zext(self.load(at, BYTE, lanes), vector(INT, lanes))
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

        They are the sum of what is yielded, one part for each plane. A part is exact: it is looked
        up in a table by the plane's bits. Bits above those are not cleared, so the table repeats.
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
            two = [self.load(self.at(at, BYTE, n * size), BYTE, size) for n in (0, 1)]
            words = _spread(b, two, [n * size + row % size for row in rows for n in (0, 1)])
            shifts = [width * (row // size) for row in rows for _ in (0, 1)]
            middle = 2 ** (bits - 1) if low + width == bits else 0
            values = [((n % 2**width) << low) - middle for n in range(2 * LANES)]
            table = every(SHORT, [bfloat16_bits(value) for value in values])
            yield self.look_up(table, b.lshr(words, every(SHORT, shifts)))
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

    # --- products ---------------------------------------------------------------------------------

    def sum_groups(self, word: str, token: Value) -> None:
        """Fill "sums" of a token whose numbers are at `word`, and "floats" where they are read."""
        columns, groups, size = (self.word[n] for n in ("columns", "groups", "group_size"))
        (total,) = self.zeros(1)
        with self.loop(groups) as group:
            self.b.store(every(FLOAT, 0.0), total)
            with self.loop(size, step=LANES) as k:
                at = self.cell(token, columns, self.cell(group, size, k))
                x = self.numbers(self.place(word, self.kind, at), self.kernel.bfloat16)
                self.b.store(self.b.fadd(self.get(total), x), total)
                if not self.kernel.dots:
                    self.store(x, self.place("floats", FLOAT, at), False)
            to = self.place("sums", FLOAT, self.cell(token, groups, group))
            self.b.store(self.across(self.get(total)), to)

    def products(self, tile: Value, tokens: Sequence[Value]) -> list[list[Value]]:
        """Multiply a tile by each of the `tokens`, which are indices into "x", "floats" and "sums".

        Returns, for each token, the places of its results, 16 rows each. A result does not depend
        on the other tokens.

        With codes c and the middle code m, the sum of ((c - m) * scale + offset) * x over a group
        is scale * sum(c * x) + (offset - m * scale) * sum(x). Pairs have c - m in place of c.
        """
        middle = every(FLOAT, -float(2 ** (self.kernel.bits - 1)))
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
        return results

    def _sum_group(
        self, tile: Value, group: Value, tokens: Sequence[Value], indices: range
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
        tokens: Sequence[Value],
        indices: range,
        sums: list[list[Value]],
    ) -> None:
        """Add (code - middle) * x over a group's columns to `sums`, two columns at a time."""
        with self.loop(self.word["group_size"], step=2) as k:
            column = self.cell(group, self.word["group_size"], k)
            xs = []
            for token in tokens:
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
