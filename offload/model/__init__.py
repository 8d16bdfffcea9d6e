"""The model as transformers has it, and the checkpoint it is made from.

This room knows where a model's name leads, how a checkpoint's tensors become parameters, and where
transformers lets its experts be replaced. It does not know packs, memory budgets, or how experts
are computed.
"""
