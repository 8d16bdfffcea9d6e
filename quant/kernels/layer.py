"""Writes the kernel that computes all experts of a layer in one call.

Every thread works on all experts: the tiles of all cells are shared out evenly, three times with a
meeting of the threads in between. A cell's result depends only on its token and its record, and a
token's sum only on its cells.

Letters: T tokens, k experts per token, S = T * k cells (a cell is one token at one of its experts),
C cells to compute, H hidden, I inner, g columns of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from offload.quant.codes import TILE_ROWS
from offload.quant.kernels.reader import Kernel, Reader
from offload.quant.kernels.writer import (
    FLOAT,
    INT,
    LANES,
    LONG,
    SHORT,
    Value,
    every,
    number,
    vector,
)
from offload.quant.program import OAI, Gate, Program
from offload.quant.record import MatrixLayout

ROUNDING = 1.5 * 2.0**23  # added and taken away again, it leaves a float32 number without fraction
# exp(r) for |r| <= ln(2)/2: 1 + r + r^2 * (these, by falling powers of r)
EXP = (1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5)
# erf(z) = 1 - t * (these, by falling powers of t) * exp(-z^2), t = 1 / (1 + ERF_T * z)
# (Abramowitz and Stegun 7.1.26; the error is at most 1.5e-7)
ERF_T, ERF = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@dataclass(frozen=True)
class LayerKernel:
    """What a kernel is compiled for."""

    program: Program
    bfloat16: bool  # dtype of hidden states and results; else float32
    dots: bool  # as in `reader.Kernel`, where the bits allow it

    def of(self, matrix: MatrixLayout) -> Kernel:
        """How the tiles of a matrix are multiplied."""
        dots = self.dots and self.bfloat16 and matrix.bits < 8
        return Kernel(matrix.bits, matrix.scale_bits, self.bfloat16, 1, dots)


class LayerWriter(Reader):
    """Writes one kernel, whose entry is `run(words)`."""

    WORDS = (
        "hidden",  # [T, H]
        "records",  # [C] addresses
        "cells",  # [C] int64 numbers of cells; the token is cell // k
        "out",  # [S, H]
        "weights",  # [T, k] float32
        "sum",  # [T, H]: the weighted sum over a token's cells, or 0 for none
        "token_sums",  # scratch [T, H/g]
        "token_floats",  # scratch [T, H] float32
        "raw",  # scratch [C, rows of the first matrix, padded to tiles]
        "inner",  # scratch [C, I]
        "inner_sums",  # scratch [C, I/g]
        "inner_floats",  # scratch [C, I] float32
        "count",  # C
        "tokens",  # T
        "k",
        "threads",
    )

    def __init__(self, kernel: LayerKernel, *, wide: bool, openmp: bool) -> None:
        self._layer, self._program = kernel, kernel.program
        super().__init__(kernel.of(kernel.program.up), wide=wide, openmp=openmp)
        self.write_run(self._part(), self._prepare)

    def begin(self, name: str, *more: Value) -> Value:
        """Begin a function as `Writer.begin` does; `_read_from` gives the words of a matrix."""
        return super(Reader, self).begin(name, *more)

    def _prepare(self) -> None:
        self._read_from(self._program.up, number(0), "hidden", "token", number(0))
        some = self.b.icmp_signed(">", self.word["count"], number(0))
        with self.b.if_then(some), self.loop(self.word["tokens"]) as token:
            self.sum_groups("x", token)

    def _part(self) -> Value:
        """Write `part(words, thread, threads)`, which does one thread's share of everything."""
        up, down = self._program.up, self._program.down
        function = self.begin("part", LONG, LONG)
        _, thread, threads = function.args
        words = self.word
        for matrix in (up, down):
            tiles = matrix.stored_rows // TILE_ROWS
            first, end = self.share(self.times(words["count"], tiles), thread, threads)
            with self.loop(end, first) as share:
                place = self.b.sdiv(share, number(tiles))
                tile = self.b.srem(share, number(tiles))
                cell = self._cell(place)
                record = self.b.load(self.place("records", LONG, place), typ=LONG)
                if matrix is up:
                    token = self.b.sdiv(cell, words["k"])
                    self._read_from(up, record, "hidden", "token", token)
                    self._multiply(up, record, tile, "raw", place)
                else:
                    self._read_from(down, record, "inner", "inner", place)
                    self._multiply(down, record, tile, "out", cell)
                self.word = words
            self.meet(threads)
            if matrix is up:
                self._activate(thread, threads)
                self.meet(threads)
        with self.b.if_then(self.b.icmp_signed("!=", words["sum"], number(0))):
            self._reduce(thread, threads)
        self.b.ret_void()
        return function

    def _cell(self, place: Value) -> Value:
        return self.b.load(self.place("cells", LONG, place), typ=LONG)

    def _read_from(
        self, matrix: MatrixLayout, record: Value, x: str, of_x: str, row: Value
    ) -> None:
        """Have `products` multiply `x[row]` by a matrix of a record."""
        self.kernel = self._layer.of(matrix)
        size = 2 if self._layer.bfloat16 else 4
        word = self.word
        self.word = {
            **word,
            "x": self.add(word[x], self.times(row, matrix.columns * size)),
            "sums": self.add(word[f"{of_x}_sums"], self.times(row, matrix.groups * 4)),
            "floats": self.add(word[f"{of_x}_floats"], self.times(row, matrix.columns * 4)),
            "weight": self.add(record, matrix.weight_offset),
            "scales": self.add(record, matrix.scale_offset),
            "steps": self.add(record, matrix.step_offset),
            "rows": number(matrix.stored_rows),
            "columns": number(matrix.columns),
            "groups": number(matrix.groups),
            "group_size": number(matrix.group_size),
            "shared": number(matrix.shared),
        }

    def _multiply(
        self, matrix: MatrixLayout, record: Value, tile: Value, out: str, to: Value
    ) -> None:
        """Store a tile's results, with their bias, in `out[to]`."""
        (places,) = self.products(tile, [number(0)])
        for index, place in enumerate(places):
            value = self.get(place)
            row = self.cell(tile, TILE_ROWS, index * LANES)
            if matrix.bias_offset >= 0:
                short = matrix.bias_dtype == "bfloat16"
                self.word["bias"] = self.add(record, matrix.bias_offset)
                at = self.place("bias", SHORT if short else FLOAT, row)
                value = self.b.fadd(self._rounded(value), self.numbers(at, short))
            at = self.place(out, self.kind, self.cell(to, matrix.stored_rows, row))
            self.store(value, at, self.bfloat16)

    # --- activations ------------------------------------------------------------------------------

    def _activate(self, thread: Value, threads: Value) -> None:
        """Fill "inner", "inner_sums" and, where they are read, "inner_floats"."""
        down, words = self._program.down, self.word
        self.kernel = self._layer.of(down)
        (total,) = self.zeros(1)
        first, end = self.share(self.times(words["count"], down.groups), thread, threads)
        with self.loop(end, first) as share:
            place = self.b.sdiv(share, number(down.groups))
            group = self.b.srem(share, number(down.groups))
            self.b.store(every(FLOAT, 0.0), total)
            with self.loop(down.group_size, step=LANES) as k:
                column = self.cell(group, down.group_size, k)
                inner = self._rounded(self._inner(place, column))
                self.b.store(self.b.fadd(self.get(total), inner), total)
                at = self.cell(place, down.columns, column)
                self.store(inner, self.place("inner", self.kind, at), self.bfloat16)
                if not self.kernel.dots:
                    self.store(inner, self.place("inner_floats", FLOAT, at), False)
            to = self.cell(place, down.groups, group)
            self.b.store(self.across(self.get(total)), self.place("inner_sums", FLOAT, to))

    def _inner(self, place: Value, column: Value) -> Value:
        """16 inner values of one cell, made as `Gate` makes them."""
        program, gate = self._program, self._program.gate
        assert gate is not None
        begin = self.cell(place, program.up.stored_rows, 0)
        if not program.gated:
            return self._function(gate.name, self._raw(begin, column))
        if program.interleaved:
            at = self.add(begin, self.times(column, 2))
            halves = [self._raw(at, n * LANES) for n in (0, 1)]
            g, u = (
                self.b.shuffle_vector(*halves, every(INT, list(range(odd, 2 * LANES, 2))))
                for odd in (0, 1)
            )
        else:
            g, u = (
                self._raw(begin, column),
                self._raw(begin, self.add(column, program.down.columns)),
            )
        if gate.limit is not None:
            g = self.smallest(g, every(FLOAT, gate.limit))
            u = self.largest(self.smallest(u, every(FLOAT, gate.limit)), every(FLOAT, -gate.limit))
        if gate.name == OAI:
            return self._oai(gate, g, u)
        return self.b.fmul(self._rounded(self._function(gate.name, g)), u)

    def _oai(self, gate: Gate, g: Value, u: Value) -> Value:
        b, one = self.b, every(FLOAT, 1.0)
        scaled = self._rounded(b.fmul(g, every(FLOAT, gate.alpha)))
        sigmoid = self._rounded(b.fdiv(one, b.fadd(one, self._exp(b.fneg(scaled)))))
        return b.fmul(self._rounded(b.fadd(u, one)), self._rounded(b.fmul(g, sigmoid)))

    def _function(self, name: str, x: Value) -> Value:
        """What `program.FUNCTIONS` has under `name`."""
        b, one, half = self.b, every(FLOAT, 1.0), every(FLOAT, 0.5)
        if name == "silu":
            return b.fdiv(x, b.fadd(one, self._exp(b.fneg(x))))
        if name in ("relu", "relu2"):
            positive = self.largest(x, every(FLOAT, 0.0))
            return positive if name == "relu" else b.fmul(positive, positive)
        if name == "gelu_tanh":
            cube = b.fmul(b.fmul(x, x), x)
            inside = self.multiply_add(cube, every(FLOAT, 0.044715), x)
            doubled = b.fmul(inside, every(FLOAT, 2 * math.sqrt(2 / math.pi)))
            # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2z))
            return b.fdiv(x, b.fadd(one, self._exp(b.fneg(doubled))))
        assert name == "gelu", name
        z = b.fmul(x, every(FLOAT, math.sqrt(0.5)))
        distance = self.largest(z, b.fneg(z))
        t = b.fdiv(one, self.multiply_add(distance, every(FLOAT, ERF_T), one))
        tail = b.fmul(self._polynomial(t, ERF), self._exp(b.fneg(b.fmul(z, z))))
        tail = b.fmul(b.fmul(tail, t), half)  # (1 - erf(|z|)) / 2
        below = b.fcmp_ordered("<", x, every(FLOAT, 0.0))
        return b.fmul(x, b.select(below, tail, b.fsub(one, tail)))

    def _exp(self, x: Value) -> Value:
        """e to the power of each lane, to about 1e-7 of its value; it never overflows."""
        b = self.b
        x = self.largest(self.smallest(x, every(FLOAT, 88.0)), every(FLOAT, -87.0))
        whole = self.multiply_add(x, every(FLOAT, 1 / math.log(2)), every(FLOAT, ROUNDING))
        whole = b.fsub(whole, every(FLOAT, ROUNDING))
        # ln(2) in two parts, the first of few bits, so that its multiples are exact
        r = self.multiply_add(whole, every(FLOAT, -0.693359375), x)
        r = self.multiply_add(whole, every(FLOAT, 0.693359375 - math.log(2)), r)
        power = self.multiply_add(self._polynomial(r, EXP), b.fmul(r, r), r)
        shifted = b.shl(b.fptosi(whole, vector(INT)), every(INT, 23))
        power = b.bitcast(b.fadd(power, every(FLOAT, 1.0)), vector(INT))
        return b.bitcast(b.add(power, shifted), vector(FLOAT))

    def _polynomial(self, x: Value, factors: tuple[float, ...]) -> Value:
        total = every(FLOAT, factors[0])
        for factor in factors[1:]:
            total = self.multiply_add(total, x, every(FLOAT, factor))
        return total

    def _raw(self, begin: Value, column: Value) -> Value:
        at = self.place("raw", self.kind, self.add(begin, column))
        return self.numbers(at, self.bfloat16)

    def _rounded(self, value: Value) -> Value:
        return self.rounded(value, self.bfloat16)

    # --- the sum ----------------------------------------------------------------------------------

    def _reduce(self, thread: Value, threads: Value) -> None:
        """Fill "sum": a token's cells times their weights, added in the order of the cells."""
        words, hidden = self.word, self._program.down.rows
        (total,) = self.zeros(1)
        parts = hidden // LANES
        first, end = self.share(self.times(words["tokens"], parts), thread, threads)
        with self.loop(end, first) as share:
            token = self.b.sdiv(share, number(parts))
            column = self.times(self.b.srem(share, number(parts)), LANES)
            self.b.store(every(FLOAT, 0.0), total)
            with self.loop(words["k"]) as n:
                cell = self.cell(token, words["k"], n)
                weight = self.splat(self.b.load(self.place("weights", FLOAT, cell), typ=FLOAT))
                at = self.place("out", self.kind, self.cell(cell, hidden, column))
                value = self.numbers(at, self.bfloat16)
                self.b.store(self.multiply_add(value, weight, self.get(total)), total)
            to = self.place("sum", self.kind, self.cell(token, hidden, column))
            self.store(self.get(total), to, self.bfloat16)
