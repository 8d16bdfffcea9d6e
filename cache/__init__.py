"""The expert cache: which experts are resident, which leave, what is loaded ahead.

This room is plain Python over integers: it knows layers, experts and slots by their numbers, and
that the same calls lead to the same decisions. It does not know bytes, tensors, threads, clocks or
models. `decision.py` has the values it hands out, `cache.py` makes them, `eviction.py` and
`policies.py` choose who leaves; `trace/` records and replays.
"""
