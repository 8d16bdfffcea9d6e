"""Expert records on their way: disk, host memory, device slots.

This room knows how bytes are copied, pinned and read ahead, urgent copies before guesses. It
does not know which expert is wanted or why.
"""
