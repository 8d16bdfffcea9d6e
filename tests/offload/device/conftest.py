"""Kernels of this package run on the CPU here: by Triton's interpreter, or compiled for no GPU."""
