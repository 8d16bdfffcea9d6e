"""Writes the kernels for one matrix of a record: products with tokens, and dequantising.

A kernel runs over tiles of 64 rows, in vectors of 16 rows. Each row is summed by one thread in a
fixed order, so results depend neither on the number of threads nor on the number of tokens.
"""

from offload.quant.codes import TILE_ROWS
from offload.quant.kernels.reader import VECTORS, Kernel, Reader
from offload.quant.kernels.writer import FLOAT, LANES, LONG, Value, every


class MatrixWriter(Reader):
    """Writes one kernel, whose entry is `run(words)`."""

    def __init__(self, kernel: Kernel, *, wide: bool, openmp: bool) -> None:
        super().__init__(kernel, wide=wide, openmp=openmp)
        self.write_run(self._part(), self._prepare if kernel.tokens else None)

    def _part(self) -> Value:
        """Write `part(words, thread, threads)`, which computes one thread's share of the tiles."""
        function = self.begin("part", LONG, LONG)
        first, end = self.share(self.word["tiles"], *function.args[1:])
        if self.kernel.tokens:
            with self.loop(end, first) as tile, self.loop(self.word["blocks"]) as block:
                self._multiply(tile, block)
        else:  # the outer loop runs over groups, so that neighbouring results are written together
            with self.loop(self.word["groups"]) as group, self.loop(end, first) as tile:
                self._unpack(tile, group)
        self.b.ret_void()
        return function

    def _prepare(self) -> None:
        with self.loop(self.word["tokens"]) as token:
            self.sum_groups("x", token)

    def _multiply(self, tile: Value, block: Value) -> None:
        """Multiply one tile by a block of tokens; the last token fills up the last block."""
        tokens = [self.cell(block, self.kernel.tokens, t) for t in range(self.kernel.tokens)]
        last = self.add(self.word["tokens"], -1)
        results = self.products(tile, [self.least(token, last) for token in tokens])
        for token, places in zip(tokens, results, strict=True):
            for index, place in enumerate(places):
                self._store(self.get(place), token, tile, index)

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
                self._store(weight, column, tile, index)

    def _store(self, value: Value, outer: Value, tile: Value, index: int) -> None:
        """Store the results of the tile's vector `index` in `out[outer]`, which holds all rows."""
        rows = self.times(self.word["tiles"], TILE_ROWS)
        at = self.cell(outer, rows, self.cell(tile, TILE_ROWS, index * LANES))
        self.store(value, self.place("out", self.kind, at), self.kernel.bfloat16)
