"""`offload plan`: what fits on a machine and how fast it would run, before anything is downloaded.

This room knows a model by its config and index only. It does not load weights and touches no
device.
"""
