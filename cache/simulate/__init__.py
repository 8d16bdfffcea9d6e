"""A run in simulated time on published machines.

This room knows rates and a routing trace. It does not know a real device.
"""
