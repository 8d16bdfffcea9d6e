"""Quantised weights as bytes, and products with them.

This room knows how weights become codes and scales, where these lie in an expert's record, how
records make up a pack on disk, and how the CPU and GPUs multiply by them. It does not know which
model or layer a record belongs to, which memory it is in, or how a pack was chosen.
"""
