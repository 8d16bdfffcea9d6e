"""Packs: which weights get how many bits, and how a checkpoint becomes a pack that opens in
seconds.

This room knows recipes and where packs lie. It does not know how a weight is encoded
(`offload.quant`) or how a model runs.
"""
