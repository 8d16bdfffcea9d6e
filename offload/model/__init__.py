"""What a checkpoint's tensors are read from. Knows: files and formats. Does not know: experts."""
