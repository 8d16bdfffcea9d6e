"""Recorded runs: routing traces shown and replayed, heat maps, timelines.

This room knows how a recording is written, read and drawn. It does not know how a run is made.
"""
