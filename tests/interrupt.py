"""Ctrl-C at a chosen moment."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def interrupt_before(call: Callable[[], object], at: int) -> bool:
    """Ctrl-C before instruction `at` of `call`, counted through all it calls; False: it ended."""
    left = at

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # an exception in what the collector calls would be swallowed
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False
