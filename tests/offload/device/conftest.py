"""Kernels of this package run on the CPU here: by Triton's interpreter, or compiled for no GPU."""

from __future__ import annotations

import os
import sys

if "triton" not in sys.modules:  # it looks when it is imported
    os.environ["TRITON_INTERPRET"] = "1"
