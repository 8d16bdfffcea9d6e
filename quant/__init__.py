"""What the bytes mean: quantisation, packing, the expert record, the pack on disk, matmul."""
