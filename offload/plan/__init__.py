"""`offload plan`: what fits on a machine and how fast it would run, before anything is downloaded.

This room knows a model by its config and index, and a machine by its memory and rates. It loads no
weights and computes nothing on a device, but for the second in which this machine is measured.
"""
