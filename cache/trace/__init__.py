"""Routing traces as values: the file, replays by another cache, what a trace shows.

This room knows integers only. It does not know models, tensors or devices.
"""
