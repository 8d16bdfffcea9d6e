"""How good a model is: perplexity, and what quantising costs."""
