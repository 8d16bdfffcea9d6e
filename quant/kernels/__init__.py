"""Kernels, reached only through `quant.matmul`."""
