"""A pytest plugin for `make test-latest`: what our calls use and a library deprecates is an error.

Warning filters cannot do this. They compare the module that a warning is attributed to, which
decorators of torch and transformers make their own; and some deprecations of transformers are
records of its log. So the stack is read: a deprecation concerns this project if only the
libraries below and Python's own stand between the warning and a file of ours.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import sysconfig
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = tuple(f"{ROOT / name}/" for name in ("cache", "offload", "quant", "tests", "benchmarks"))
LIBRARIES = ("torch", "transformers", "typing_extensions")  # the last has `deprecated` of torch
SPECS = [spec for spec in map(importlib.util.find_spec, LIBRARIES) if spec is not None]
BETWEEN = ("<", *(str(spec.origin).removesuffix("__init__.py") for spec in SPECS))
BETWEEN += (f"{sysconfig.get_path('stdlib')}/",)
_warn = warnings.warn


def is_ours(frame: FrameType | None) -> bool:
    """Whether, from `frame` outwards, the first file that is none of a library is one of ours."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS) or not file.startswith(BETWEEN):
            return file.startswith(OURS)
        frame = frame.f_back
    return False


def warn(
    message: Warning | str,
    category: type[Warning] | None = None,
    stacklevel: int = 1,
    *rest: Any,
    **more: Any,
) -> None:
    """In place of `warnings.warn`: raises a deprecation of ours unless a filter ignores it."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, (FutureWarning, DeprecationWarning)) and is_ours(sys._getframe(1)):
        with warnings.catch_warnings(record=True) as shown:
            _warn(message, category, stacklevel + 1, *rest, **more)
        if shown:
            raise message if isinstance(message, Warning) else kind(message)
    else:
        _warn(message, category, stacklevel + 1, *rest, **more)


class Deprecations(logging.Handler):
    """Raises the records of a library's log that tell us of a deprecation."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and is_ours(sys._getframe(1)):
            raise FutureWarning(message)


HANDLER = Deprecations()


def pytest_load_initial_conftests() -> None:
    """Installed before anything of ours is imported."""
    warnings.warn = warn


def pytest_configure() -> None:
    """Installed again, for worker processes load the plugin later."""
    warnings.warn = warn
    importlib.import_module("transformers.utils.logging")  # sets the method that is replaced here
    logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
    for library in ("torch", "transformers"):
        logging.getLogger(library).addHandler(HANDLER)
