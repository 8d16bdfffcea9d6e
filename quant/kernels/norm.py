"""Writes the kernel of RMSNorm: rows of bfloat16, divided by their root mean square.

It rounds where transformers' modules round. Letters: N rows, D columns.
"""

from llvmlite import ir

from offload.quant.kernels.writer import FLOAT, LANES, LONG, SHORT, Writer, every


class NormWriter(Writer):
    """Writes the kernel, whose entry is `run(words)`."""

    WORDS = (
        "x",  # [N, D]
        "weight",  # [D]
        "out",  # [N, D]
        "rows",
        "columns",  # a multiple of 16
        "epsilon",  # the bits of a float32
        "threads",  # 1
    )

    def __init__(self) -> None:
        super().__init__(openmp=False)
        part = self.begin("part", LONG, LONG)
        b, columns = self.b, self.word["columns"]
        epsilon = b.bitcast(b.trunc(self.word["epsilon"], ir.IntType(32)), FLOAT)
        size = b.sitofp(columns, FLOAT)
        root = self.declared("llvm.sqrt.f32", FLOAT, FLOAT)
        (total,) = self.zeros(1)
        with self.loop(self.word["rows"]) as row:
            b.store(every(FLOAT, 0.0), total)
            with self.loop(columns, step=LANES) as k:
                x = self.numbers(self.place("x", SHORT, self.cell(row, columns, k)), True)
                b.store(self.multiply_add(x, x, self.get(total)), total)
            mean = b.fdiv(self.across(self.get(total)), size)
            scale = b.fdiv(ir.Constant(FLOAT, 1.0), b.call(root, [b.fadd(mean, epsilon)]))
            scale = self.splat(scale)
            with self.loop(columns, step=LANES) as k:
                at = self.cell(row, columns, k)
                x = self.numbers(self.place("x", SHORT, at), True)
                weight = self.numbers(self.place("weight", SHORT, k), True)
                normed = self.rounded(b.fmul(x, scale), True)
                self.store(b.fmul(weight, normed), self.place("out", SHORT, at), True)
        b.ret_void()
        self.write_run(part)
