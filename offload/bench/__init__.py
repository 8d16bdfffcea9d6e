"""Measures tokens per second as llama-bench does, with the figures of the experts beside them.

This room knows llama-bench's tests, columns and JSON keys, and how figures follow from timed runs.
It does not know how a model is loaded or how its experts are served.
"""
