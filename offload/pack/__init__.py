"""Packs: how many bits each weight gets, and how a checkpoint becomes a pack that opens in seconds.

This room knows recipes, what a pack will hold, where packs are kept and how they are made. It does
not know how a weight is encoded (`offload.quant`) or how a model runs.
"""
