"""Tokens in and out: prompts, sampling, text, batches, several answers, and going on when memory
runs out.

This room knows how a transformers model is stepped from ids to text. It does not know where
experts lie or who plans their copies: `offload.engine` serves them.
"""
