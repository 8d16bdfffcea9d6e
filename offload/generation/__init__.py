"""From a prompt to an answer: tokens, prefill and decode, sampling, text, batches, answer files.

This room knows how a transformers model is driven step by step, and how a step is repeated with
fewer expert slots when memory runs out. It does not know where experts are stored or which of them
are resident; `offload.engine` computes the experts inside the model.
"""
