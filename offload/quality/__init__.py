"""How good a model is: the perplexity of a text, and what quantising costs against a reference.

This room knows how texts are scored, which figures are computed from two models' scores, and the
file of figures that a later check is held against. It does not know how a model is run; any causal
language model of transformers can be measured, with or without our experts.
"""
