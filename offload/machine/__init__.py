"""This computer: what `offload doctor` finds out about it, and how fast it is.

This room knows how to ask the system, drivers and libraries, and how to time copies, products and
reads. It does not know models, nor what budgets and forecasts make of the rates.
"""
