"""Measuring tokens/second the way llama-bench does, with the experts' figures beside."""
