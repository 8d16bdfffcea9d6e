"""The file formats of checkpoints: safetensors, float8, MXFP4 and GGUF, behind one protocol of
named tensors.

This room knows how each format stores a tensor and what llama.cpp calls it. It does not know
which tensors are experts, or what a pack is.
"""
