"""Tokens a second of a recorded run on a machine one need not have (`python -m
benchmarks.simulator`).

This folder knows rates, the costs of software, and a routing trace, whose steps it replays with the
real cache in simulated time. It does not know a real device. `offload plan` forecasts by a
formula instead; `compare.py` holds that formula against the simulator.
"""
