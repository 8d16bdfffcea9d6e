"""What fits into memory, as numbers, before anything is allocated.

This room knows the sizes of weights, KV cache and workspace, and resolves every "auto" to a number
once. It does not know how experts are moved or computed.
"""
