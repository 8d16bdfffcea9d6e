"""Text that comes from a model or a file, made fit for a terminal.

Knows: which characters a terminal obeys instead of showing. Does not know: where text comes from.
"""

from __future__ import annotations

# C0 without tab and newline, DEL, C1: a terminal could be told to move, to erase, or to answer.
_SHOWN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_SHOWN |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with its control characters as signs (ESC as U+241B); tabs and newlines stay."""
    return text.translate(_SHOWN)
