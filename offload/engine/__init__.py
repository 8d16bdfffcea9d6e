"""One MoE layer's call: ask the cache for a decision, start copies, compute, reduce once.

This room knows the order of a step and who plans it. It does not know which expert leaves
(`offload.cache`), how bytes move (`offload.transfer`) or what they mean (`offload.quant`).
"""
