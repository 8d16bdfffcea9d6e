"""Triton's interpreter, without what it does again for every call of a device function.

It patches `triton.language` for a launch and then again, by looking at every name in it, for each
function that a kernel calls: most of the time of a test. Once is enough.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Make device functions cheap to call in this process; for modules that test kernels."""
    patched: set[int] = set()

    def call(self: Any, *args: Any, **named: Any) -> Any:
        names = self.fn.__globals__
        if not any(value is tl for value in names.values()) and id(names) not in patched:
            patched.add(id(names))  # Triton's own functions, which know it under another name
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call
