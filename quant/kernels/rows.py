"""Writes the kernel that multiplies few tokens by a dense matrix, row by row.

A row's products are added in the same order for any number of tokens and threads, so a result
depends on nothing but its token and its row.

Letters: M tokens, N rows, K columns.
"""

from dataclasses import dataclass

from llvmlite import ir

from offload.quant.kernels.writer import (
    FLOAT,
    INT,
    LANES,
    LONG,
    SHORT,
    Value,
    Writer,
    number,
    vector,
)

COLUMNS = 2 * LANES  # at once: a cache line of bfloat16
CHAINS = 4  # sums of a row that do not wait for each other
AHEAD = 2048  # columns; how far ahead of its use a weight is prefetched


@dataclass(frozen=True)
class RowsKernel:
    """What a kernel is compiled for."""

    dtype: str  # of tokens, matrix, bias and results: bfloat16, float16 or float32
    tokens: int  # M
    bias: bool
    dots: bool  # as in `reader.Kernel`


class RowsWriter(Writer):
    """Writes one kernel, whose entry is `run(words)`."""

    WORDS = (
        "x",  # [M, K]
        "weight",  # [N, K]
        "bias",  # [N]
        "out",  # [M, N]
        "rows",
        "columns",  # a multiple of `COLUMNS`
        "threads",
    )

    def __init__(self, kernel: RowsKernel, *, openmp: bool) -> None:
        super().__init__(openmp)
        self.kernel = kernel
        self.kind = {"bfloat16": SHORT, "float16": ir.HalfType(), "float32": FLOAT}[kernel.dtype]
        part = self.begin("part", LONG, LONG)
        first, end = self.share(self.word["rows"], *part.args[1:])
        with self.loop(end, first) as row:
            self._multiply(row)
        self.b.ret_void()
        self.write_run(part)

    def _multiply(self, row: Value) -> None:
        """Multiply a row by all tokens."""
        columns, step = self.word["columns"], CHAINS * COLUMNS
        sums = [self.zeros(CHAINS) for _ in range(self.kernel.tokens)]
        whole = self.b.sub(columns, self.b.srem(columns, number(step)))
        with self.loop(whole, step=step) as k:
            for chain in range(CHAINS):
                self._add(row, self.add(k, chain * COLUMNS), [places[chain] for places in sums])
        with self.loop(columns, whole, COLUMNS) as k:
            self._add(row, k, [places[0] for places in sums])
        for token, places in enumerate(sums):
            total = self.get(places[0])
            for place in places[1:]:
                total = self.b.fadd(total, self.get(place))
            self._finish(self.across(total), token, row)

    def _add(self, row: Value, k: Value, places: list[Value]) -> None:
        """Add the products of `COLUMNS` columns to each token's sum."""
        columns = self.word["columns"]
        at = self.cell(row, columns, k)
        self.prefetch(self.place("weight", self.kind, self.add(at, AHEAD)))
        weights = self._read("weight", at)
        for token, place in enumerate(places):
            total = self.get(place)
            for a, b in zip(weights, self._read("x", self.cell(token, columns, k)), strict=True):
                total = (self.dot if self.kernel.dots else self._fused)(total, a, b)
            self.b.store(total, place)

    def _fused(self, total: Value, a: Value, b: Value) -> Value:
        return self.multiply_add(a, b, total)

    def _read(self, word: str, index: Value) -> list[Value]:
        """A row's or a token's next `COLUMNS` numbers, as vectors that can be multiplied."""
        at = self.place(word, self.kind, index)
        if self.kind is SHORT:
            pairs = self.load(at, INT)
            if self.kernel.dots:
                return [pairs]
            return [self.low_bfloat16(pairs), self.high_bfloat16(pairs)]
        halves = [self.load(self.at(at, self.kind, n * LANES), self.kind) for n in (0, 1)]
        if self.kind is FLOAT:
            return halves
        return [self.b.fpext(half, vector(FLOAT)) for half in halves]

    def _finish(self, total: Value, token: int, row: Value) -> None:
        """Store one result, with its bias."""
        if self.kernel.bias:
            total = self.b.fadd(total, self._number("bias", row))
        at = self.place("out", self.kind, self.cell(token, self.word["rows"], row))
        if self.kind is SHORT:
            total = self.b.extract_element(self.to_bfloat16(self.splat(total)), ir.Constant(INT, 0))
        elif self.kind is not FLOAT:
            total = self.b.fptrunc(total, self.kind)
        self.b.store(total, at)

    def _number(self, word: str, index: Value) -> Value:
        value = self.b.load(self.place(word, self.kind, index), typ=self.kind)
        if self.kind is SHORT:
            wide = self.b.shl(self.b.zext(value, INT), ir.Constant(INT, 16))
            return self.b.bitcast(wide, FLOAT)
        return value if self.kind is FLOAT else self.b.fpext(value, FLOAT)
