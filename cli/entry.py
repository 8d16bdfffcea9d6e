"""From arguments to an exit code.

Knows: which failures are one line, what is done about a stream that is gone. Does not know: what a
command does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from cli.exit_codes import DONE, FAILED, INTERRUPTED, USAGE
from cli.parser import build_parser
from offload.files import check_streams, give_up_unwritable
from offload.lines import is_memory, one_line


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with _ending_in_order():
        return _run(argv)


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as `sys.exit` does: a terminal is left as it was."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []
    numbers = [getattr(signal, name) for name in names]
    before = [signal.signal(number, _end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _run(argv: Sequence[str] | None) -> int:
    debug = makes_file = False
    try:
        check_streams()
        try:
            arguments = build_parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from there
        if arguments.command is None:
            build_parser().print_help(sys.stderr)
            return USAGE
        debug = arguments.debug
        makes_file = arguments.command == "quantize" or isinstance(
            getattr(arguments, "output", None), Path
        )
        logging.basicConfig(format="offload: %(message)s", level=logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        result: int = arguments.run(arguments)
        sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as `head` does
        give_up_unwritable()
        return FAILED if makes_file else DONE
    except Exception as error:
        text = one_line(error)
        if isinstance(error, OSError) and sys.stdout in give_up_unwritable():
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED
    except BaseException as error:  # a panic of a library written in Rust is no `Exception`
        if debug or not is_memory(error):
            raise
        print(f"offload: error: {one_line(error)}", file=sys.stderr)
        return FAILED
