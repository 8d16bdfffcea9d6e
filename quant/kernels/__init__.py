"""Machine code for products with packed weights, used through `quant.matmul` and `quant.experts`.

This room knows how kernels read a record's bytes: LLVM IR for CPUs, Triton for GPUs. It does not
know when a kernel is the quickest way, or whether its results can be trusted on this machine.
"""
